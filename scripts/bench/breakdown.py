"""Where the time of a training step goes: the frozen model's and each method's, by kind of operation.

On the model and the batch of the part `methods`. Times are those of torch's profiler, which adds its own to every
operation, so that what is small looks larger than it is; it shows where to look, and `methods` what that is worth.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from scripts.bench import methods, timing
from scripts.bench.table import Cell, Options, Table

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
BASE, ADAPTERS, ATTENTION = "the base's products ms", "adapters' products ms", "attention ms"
ELEMENTWISE, PYTHON, OPTIMIZER = "elementwise ms", "autograd and Python ms", "optimizer ms"
COLUMNS = (BASE, ADAPTERS, ATTENTION, ELEMENTWISE, PYTHON, OPTIMIZER)
OWN_SIZES: Mapping[str, frozenset[int]] = {"vera": frozenset({256}), "hydralora, 3 heads": frozenset({3, 16, 48})}
"""Sizes that only an adapter's tensors have, where they are not just the rank 16."""


def run(options: Options) -> list[Table]:
    """Returns the milliseconds of each kind of operation in a step of each method."""
    import torch

    torch.set_num_threads(options.threads)
    steps, shape = (1, (1, 8)) if options.smoke else (5, (2, 200))
    ids = torch.randint(8192, shape, generator=torch.Generator().manual_seed(0))
    model = methods.with_inputs_that_need_a_gradient(methods.llama(small=options.smoke))
    rows: dict[str, dict[str, Cell]] = {methods.FLOOR: _profiled(methods.frozen(copy.deepcopy(model)), ids, steps)}
    for name in methods.OURS:
        timing.log(f"breakdown of {name}")
        adapted = methods.ours(name, methods.targets_of(name))(copy.deepcopy(model))
        rows[name] = _profiled(adapted, ids, steps, OWN_SIZES.get(name, frozenset({16})))
    note = f"Means of {steps} steps under torch's profiler; 2 × 200 tokens, which no other size equals."
    return [Table("Where the time of a step goes", rows, (note,))]


def _profiled(model: Any, ids: Any, steps: int, own: frozenset[int] = frozenset()) -> dict[str, Cell]:
    """Returns a step's milliseconds by kind; a product is the adapter's where one of its sizes is in `own`."""
    from torch.profiler import ProfilerActivity, profile

    step = methods.step(model, ids)
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        for _ in range(steps):
            step()
    found: defaultdict[str, float] = defaultdict(float)
    for one in profiled.key_averages(group_by_input_shape=True):
        found[_kind(one.key, one.input_shapes, own)] += one.self_cpu_time_total / 1000 / steps
    return {column: found[column] for column in COLUMNS}


def _kind(name: str, shapes: Any, own: frozenset[int]) -> str:
    """Returns the column that an operation belongs to."""
    if "adamw" in name.lower() or name.startswith("Optimizer."):
        return OPTIMIZER
    if name in PRODUCTS:
        sizes = {size for shape in shapes for size in shape if isinstance(size, int)}
        return ADAPTERS if sizes & own else BASE
    if "scaled_dot_product" in name:
        return ATTENTION
    return ELEMENTWISE if name.startswith("aten::") else PYTHON
