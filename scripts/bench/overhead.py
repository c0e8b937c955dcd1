"""What an adapted module costs beside its arithmetic: Python, autograd and the calls of small operations.

Four tokens go forward and back through the part `methods`' rows on a Llama of 8 layers (hidden 32), on one thread, so
that there is next to nothing to compute. On a CPU it is what a small step's time goes into; a GPU computes meanwhile,
and waits where this takes longer than what it computes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from statistics import median
from typing import Any

from scripts.bench import methods, timing
from scripts.bench.table import Cell, Options, Table


def run(options: Options) -> list[Table]:
    """Returns the microseconds of a module with an adapter less those of one without."""
    import torch

    torch.set_num_threads(1)
    rounds = 1 if options.smoke else 10 * options.rounds
    model = methods.with_inputs_that_need_a_gradient(_tiny_llama(1 if options.smoke else 8))
    rows: dict[str, dict[str, Cell]] = {}
    for name in methods.OURS:
        timing.log(f"overhead of {name}: {rounds} rounds")
        makers = {methods.FLOOR: methods.frozen, "peftcli": methods.ours(name, methods.targets_of(name))}
        if name not in methods.WITHOUT_PEFT:
            makers["PEFT"] = methods.peft(name, methods.targets_of(name))
        models = {tool: make(copy.deepcopy(model)) for tool, make in makers.items()}
        num_modules = sum(bool(re.fullmatch(methods.targets_of(name), one)) for one, _ in model.named_modules())
        seconds = timing.interleaved({tool: _passes(one) for tool, one in models.items()}, rounds, unmeasured=3)
        bare = seconds.pop(methods.FLOOR)
        rows[name] = {
            f"{tool}, µs": median(own - other for own, other in zip(each, bare, strict=True)) / num_modules * 1e6
            for tool, each in seconds.items()
        }
    torch.set_num_threads(options.threads)
    note = f"Forward and backward pass of one of its modules, medians of {rounds} interleaved rounds; one thread."
    return [Table("An adapted module beside its arithmetic", rows, (note,))]


def _tiny_llama(num_layers: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config).float().train()


def _passes(model: Any) -> Callable[[], None]:
    """Returns a forward and a backward pass of `model`."""
    import torch

    ids = torch.arange(4)[None]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def once() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        for parameter in trained:
            parameter.grad = None

    return once
