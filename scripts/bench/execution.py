"""What recomputing, compiling and moving activations cost, and what they save.

A training step (forward, backward and AdamW's) of LoRA and DoRA, r 16 on all linear layers, run plainly and with each
option of `training:` that trades time for memory, or seconds at the start for time. Compiling is measured with empty
caches, as on a machine that has not seen the model, and again with what that left, as a second run finds it. Where
there is a GPU, all is measured there. Elsewhere nothing can be offloaded; what would be is counted.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.bench import memory, methods, timing
from scripts.bench.table import Cell, Options, Table

if TYPE_CHECKING:
    import torch

PLAIN, RECOMPUTED, COMPILED, BOTH, OFFLOADED = (
    "plain",
    "gradient_checkpointing",
    "torch_compile",
    "both",
    "activation_offloading",
)
TOGETHER = ((PLAIN, RECOMPUTED, COMPILED, OFFLOADED), (BOTH,))
"""The ways that are measured together. One of them is compiled at most: another one would find parts of its code."""
SMOKE = ((PLAIN, RECOMPUTED, OFFLOADED),)
"""The same in a smoke run, without compiling, which takes its half minute whatever the model."""
ROWS = ("lora", "lora, dropout 0.05", "dora", "dora, dropout 0.05")
NOTE = (
    "Time: the median of a step's by the plain one's in the same round. Peak: of what torch's allocator held during a "
    "step over what it held before, by the plain one's. First steps: what two took beyond two later ones, with empty "
    "caches, and again with what those left. Pays after: the former by what a step saves."
)


@dataclass
class Contestant:
    """A model that is run in one way.

    Attributes:
        model: The adapted model.
        step: One training step.
        forward: One forward and backward pass, for its peak.
        moved: Bytes that each forward pass so far has moved to the host's memory.
        first: What its first two steps took where it is compiled, in seconds: with empty caches, and with full ones.
    """

    model: Any
    step: Callable[[], None]
    forward: Callable[[Any], None]
    moved: list[int]
    first: Sequence[float] = ()


def run(options: Options) -> list[Table]:
    """Returns a table for a Llama of 8 layers, and one for the demo model where it is there."""
    import torch

    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.smoke:
        return [table("Llama of 1 layer", methods.llama(small=True), (1, 8), device, options)]
    found = [table("Llama of 8 layers", methods.llama(), (2, 256), device, options)]
    name = options.model.name
    if options.model.is_dir() and wanted(name, options):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, use_cache=False)
        found.append(table(name, model, (8, 24), device, options))
    return [one for one in found if one.rows]


def wanted(name: str, options: Options) -> list[tuple[str, list[str]]]:
    """Returns what is asked for of the model called `name`: a row, and ways to run it that are measured together."""
    rows, groups = (ROWS[:1], SMOKE) if options.smoke else (ROWS, TOGETHER)
    found = [(row, [way for way in ways if options.wants(f"{name}: {row}: {way}")]) for row in rows for ways in groups]
    return [(row, ways) for row, ways in found if ways]


def table(name: str, model: Any, shape: tuple[int, int], device: torch.device, options: Options) -> Table:
    """Returns each row's figures, one line for each way to run it."""
    import torch

    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    found: dict[str, dict[str, Cell]] = {}
    for row, ways in wanted(name, options):
        timing.log(f"{name}: {row}: {', '.join(ways)}")
        for way, figures in measured(row, ways, model, ids, options).items():
            found.setdefault(f"{row}: {way}", figures)
    note = f"{shape[0]} × {shape[1]} tokens, float32 on {device.type}."
    return Table(f"Ways to run a step: {name}", found, (note, NOTE))


def measured(
    row: str, ways: Sequence[str], model: Any, ids: torch.Tensor, options: Options
) -> dict[str, dict[str, Cell]]:
    """Returns the figures of the ways asked for, and of those with which they are compared."""
    beside = (PLAIN, RECOMPUTED) if BOTH in ways else (PLAIN,)
    entrants = {way: contestant(row, way, copy.deepcopy(model), ids) for way in dict.fromkeys((*beside, *ways))}
    # On a CPU what is offloaded is copied beside itself: that takes no time that a GPU's run would take.
    timed = {way: one.step for way, one in entrants.items() if way != OFFLOADED or ids.is_cuda}
    with empty_caches():
        for way, one in entrants.items():
            if way in (COMPILED, BOTH):
                one.first = started(one)
            elif way == OFFLOADED and way not in timed:
                one.step()  # for what it moves
        rounds = 1 if options.smoke else 3 * options.rounds
        seconds = timing.interleaved(timed, rounds)
        found = lines(entrants, seconds, on_gpu=ids.is_cuda)
    entrants.clear()
    gc.collect()
    return found


@contextmanager
def empty_caches() -> Iterator[None]:
    """Has torch's compiler forget all that it has compiled, on disk too while entered, and after it again."""
    import torch
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    with fresh_cache():
        yield
    torch._dynamo.reset()


def started(one: Contestant) -> list[float]:
    """Returns the seconds of the first two steps: with empty caches and, as a second process has them, full."""
    import torch

    seconds = []
    for _ in range(2):
        torch._dynamo.reset()  # what is in memory, not what is on disk
        begun = time.perf_counter()
        one.step()
        one.step()
        seconds.append(time.perf_counter() - begun)
    return seconds


def lines(
    entrants: Mapping[str, Contestant], seconds: Mapping[str, Sequence[float]], *, on_gpu: bool
) -> dict[str, dict[str, Cell]]:
    """Returns the figures of each way to run one row."""
    ratios = timing.ratios(seconds, PLAIN)
    medians = {way: statistics.median(taken) for way, taken in seconds.items()}
    peaks = {way: peak_mb(one, on_gpu=on_gpu) for way, one in entrants.items() if way in seconds}
    found: dict[str, dict[str, Cell]] = {}
    for way, one in entrants.items():
        found[way] = {
            "time": ratios.get(way),
            "peak": peaks[way] / peaks[PLAIN] if way in peaks else None,
            "peak MB": peaks.get(way),
        }
        if way in (COMPILED, BOTH):
            compiling, again = (first - 2 * medians[way] for first in one.first)
            saved = medians[PLAIN if way == COMPILED else RECOMPUTED] - medians[way] if way in medians else 0.0
            found[way] |= {
                "first steps, seconds": compiling,
                "again, seconds": again,
                "pays after steps": math.ceil(compiling / saved) if saved > 0 else "never",
            }
        if way == OFFLOADED:
            found[way]["moved MB"] = one.moved[-1] / 1e6
    return found


def peak_mb(one: Contestant, *, on_gpu: bool) -> float:
    """Returns the most that the device's allocator held during a forward and backward pass over what it held before."""
    import torch

    if not on_gpu:
        return memory.peak_mb(one.model, one.forward)
    one.model.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one.forward(one.model)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def contestant(row: str, way: str, model: Any, ids: torch.Tensor) -> Contestant:
    """Returns `model`, adapted as the row says and run in the way called `way`."""
    import torch

    from peftcli.recipe.schema import TrainingSection
    from peftcli.run import execution
    from peftcli.training import offloading

    model = methods.ours(row, methods.ALL_LINEAR)(model).to(ids.device).train()
    section = TrainingSection(gradient_checkpointing=way in (RECOMPUTED, BOTH), torch_compile=way in (COMPILED, BOTH))
    execution.set_up(model, section, ids.device, fills_cache=False)
    policy = offloading.policy_of(model, ids.device) if way == OFFLOADED else None
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4, fused=True)
    moved: list[int] = []

    def forward(model: Any) -> None:
        saving = offloading.while_saving(policy)
        with saving:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        moved.append(saving.num_bytes if isinstance(saving, offloading.Offloading) else 0)

    def step() -> None:
        forward(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ids.is_cuda:
            torch.cuda.synchronize()

    return Contestant(model, step, forward, moved)
