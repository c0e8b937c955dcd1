"""How a step's time grows with what a recipe can make larger: what an adapter adds should not grow faster than that.

Each row has one size four times, doubled each time. What the adapter adds is a step's time less that of the frozen
model at the same size, in the same round. Its growth is the p of the line through log(added) by log(size), which is 1
for what grows in proportion, 2 for a square, and below 1 where a fixed part is still to be seen. For the model alone it
is that of the whole step: attention to all earlier tokens is a square, with any adapter.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from scripts.bench import methods, timing
from scripts.bench.table import Cell, Options, Table

LAYERS, TOKENS = 4, 256
SIZES: dict[str, tuple[int, ...]] = {
    "rank, lora": (32, 64, 128, 256),
    "rank, dora": (32, 64, 128, 256),
    "rank, vera": (128, 256, 512, 1024),
    "heads, hydralora": (2, 4, 8, 16),
    "adapted modules, lora": (7, 14, 28, 56),
    "layers, lora": (2, 4, 8, 16),
    "layers, no adapter": (2, 4, 8, 16),
    "tokens, lora": (128, 256, 512, 1024),
    "tokens, dora": (128, 256, 512, 1024),
    "tokens, no adapter": (128, 256, 512, 1024),
}
"""The sizes of each row: what grows, and the method, or none."""
SMOKE = {"heads, hydralora": (1, 2), "tokens, lora": (4, 8)}
"""The same in a smoke run, of a small model."""
ALONE = "no adapter"
CHANGE_THE_MODEL = ("layers", "tokens")
"""What makes the frozen model's own step longer."""
LINEAR = 1.1
"""A growth up to which is called linear: what outgrows a cache costs more a unit without being worse than linear."""


def run(options: Options) -> list[Table]:
    """Returns, for each row, what the adapter adds at each size and how that grows."""
    import torch

    torch.set_num_threads(options.threads)
    rounds = 1 if options.smoke else 5 * options.rounds
    wanted = {name: sizes for name, sizes in (SMOKE if options.smoke else SIZES).items() if options.wants(name)}
    rows: dict[str, dict[str, Cell]] = {}
    for name, sizes in wanted.items():
        timing.log(f"{name}: {rounds} rounds")
        rows[name] = row(name, sizes, rounds, small=options.smoke)
    note = (
        f"Llama (hidden 512), 8 layers with adapted modules, else {LAYERS}, and {TOKENS} tokens, unless they are the "
        f"row's; rank 16 unless it is; medians of {rounds} interleaved rounds, and the middle half of the growths."
    )
    return [Table("Growth of what an adapter adds to a step", rows, (note,))]


def row(name: str, sizes: Sequence[int], rounds: int, *, small: bool) -> dict[str, Cell]:
    """Returns the figures of one row."""
    steps = {f"{size}": step(name, size, small=small) for size in sizes}
    what, _, kind = name.partition(", ")
    if kind != ALONE:
        steps |= {f"alone at {size}": step(f"{what}, {ALONE}", size, small=small) for size in floors(what, sizes)}
    seconds = timing.interleaved(steps, rounds, unmeasured=2)
    own = np.array([seconds[f"{size}"] for size in sizes])
    if kind != ALONE:
        own = own - np.array([seconds[f"alone at {size if what in CHANGE_THE_MODEL else sizes[0]}"] for size in sizes])
    largest = 1000 * float(np.median(seconds[f"{sizes[-1]}"]))
    return {"sizes": " ".join(map(str, sizes)), "ms a step, last": largest, **growth(sizes, own)}


def floors(what: str, sizes: Sequence[int]) -> Sequence[int]:
    """Returns the sizes at which the frozen model is timed: one, where it is the same at all."""
    return sizes if what in CHANGE_THE_MODEL else sizes[:1]


def growth(sizes: Sequence[int], seconds: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Cell]:
    """Returns what `seconds` [sizes, rounds] say of one row; figures that noise has made negative are None."""
    medians = np.median(seconds, axis=1)
    units = medians / np.array(sizes)
    powers = [exponent(sizes, one) for one in seconds.T if (one > 0).all()]
    low, middle, high = quartiles(powers) if len(powers) * 2 > seconds.shape[1] else (None, None, None)
    return {
        "added ms": " ".join(f"{1000 * one:.2f}" for one in medians),
        "a unit, last ÷ first": float(units[-1] / units[0]) if units[0] > 0 and units[-1] > 0 else None,
        "growth": middle,
        "middle half": None if low is None or high is None else f"{low:.2f} – {high:.2f}",
        "worse than linear": "not told from noise" if low is None else "yes" if low > LINEAR else "no",
    }


def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Returns p of the least-squares line log(seconds) = c + p·log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the three quartiles; of one value, that value."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def step(name: str, size: int, *, small: bool) -> Callable[[], None]:
    """Returns one training step at a size of a row."""
    import torch

    from peftcli import inject
    from peftcli import methods as own

    what, _, kind = name.partition(", ")
    layers = {"layers": size, "adapted modules": 8}.get(what, LAYERS)
    model = methods.with_inputs_that_need_a_gradient(methods.llama(layers, small=small))
    length = size if what == "tokens" else TOKENS
    ids = torch.randint(8192, (1, length), generator=torch.Generator().manual_seed(0))
    if kind == ALONE:
        return methods.step(methods.frozen(model), ids)
    fields: dict[str, Any] = {"r": 16, "target_modules": methods.ALL_LINEAR}
    if what == "rank":
        fields["r"] = size
    if what == "heads":
        fields["num_heads"] = size
    if what == "adapted modules":  # seven in each layer
        fields["layers"] = list(range(max(1, size // 7)))
    method = own.load(kind)
    inject.graft(model, method, method.Config.model_validate(fields), seed=0)
    return methods.step(model, ids)
