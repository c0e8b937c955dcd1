"""What an adapter keeps in memory beside the model: the floor, peftcli and PEFT.

The peak of what torch's allocator has handed out during a step's forward and backward pass, over what it had before:
activations, gradients and temporary results, those inside of kernels too. It is counted, not sampled: every allocation
is an event of the profiler's. Two models: one whose layers keep all of their inputs anyway (6 feed-forwards with ReLU,
2048 → 8192 → 2048, 256 tokens), where LoRA need not keep anything of their size and DoRA one tensor for each output,
since a ReLU keeps its result alone; and the Llama of `methods`.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench import methods, timing
from scripts.bench.table import Cell, Options, Table

if TYPE_CHECKING:
    import torch

ROWS = ("lora", "lora, dropout 0.05", "dora", "dora, dropout 0.05")


def run(options: Options) -> list[Table]:
    """Returns the peaks of both models."""
    import torch

    torch.set_num_threads(options.threads)
    small = options.smoke
    x = torch.randn(8 if small else 256, 64 if small else 2048).requires_grad_()
    ids = torch.randint(8192, (1, 8) if small else (2, 256), generator=torch.Generator().manual_seed(0))
    return [
        table(
            "Peak over the model: feed-forwards with ReLU",
            feed_forwards(*(1, 64, 256) if small else (6, 2048, 8192)),
            lambda model: model(x).sum().backward(),
            dict.fromkeys(ROWS, r"(up|down)\d"),
        ),
        table(
            "Peak over the model: Llama",
            methods.with_inputs_that_need_a_gradient(methods.llama(small=small)),
            lambda model: model(input_ids=ids, labels=ids).loss.backward(),
            {row: methods.targets_of(row) for row in (*ROWS, "vera")},
        ),
    ]


def feed_forwards(num_layers: int, narrow: int, wide: int) -> torch.nn.Module:
    """Returns linear layers, to `wide` and back to `narrow`, each with a ReLU after it, whose result is kept anyway."""
    from torch import nn

    model = nn.Sequential()
    for i in range(num_layers):
        for name, linear in (("up", nn.Linear(narrow, wide)), ("down", nn.Linear(wide, narrow))):
            model.add_module(f"{name}{i}", linear)
            model.add_module(f"relu_{name}{i}", nn.ReLU())
    return model


def table(title: str, model: Any, run_step: Callable[[Any], object], targets_of: Mapping[str, str]) -> Table:
    """Returns the peak of each row's step by each contestant, on the modules that it adapts."""
    least = peak_mb(methods.frozen(copy.deepcopy(model)), run_step)
    rows: dict[str, dict[str, Cell]] = {}
    for name, targets in targets_of.items():
        timing.log(f"{title}: {name}")
        ours = peak_mb(methods.ours(name, targets)(copy.deepcopy(model)), run_step)
        theirs = peak_mb(methods.peft(name, targets)(copy.deepcopy(model)), run_step)
        rows[name] = {
            "floor MB": least,
            "peftcli MB": ours,
            "PEFT MB": theirs,
            "peftcli ÷ floor": ours / least,
            "PEFT ÷ floor": theirs / least,
        }
    return Table(title, rows, ("The gradients of what trains are part of it.",))


def peak_mb(model: Any, run_step: Callable[[Any], object]) -> float:
    """Returns the most that torch's allocator held during a step over what it held before, in MB."""
    from torch.profiler import ProfilerActivity, profile

    model.train()
    run_step(model)  # so that what is made once is there
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run_step(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]) for event in events if event.get("name") == "[memory]"]
    changes.sort(key=lambda change: change[0])
    before = changes[0][1]["Total Allocated"] - changes[0][1]["Bytes"]
    peak: float = max(arguments["Total Allocated"] for _, arguments in changes) - before
    return peak / 1e6
