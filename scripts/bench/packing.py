"""What it costs that samples have different lengths: padded, grouped by length, joined and packed batches.

A Llama of 8 layers (hidden 512) with LoRA of rank 16 trains on the demo data, whose samples are short, and on samples
of widely different lengths. Each layout takes a step in turn; its tokens a second are those of the samples, without
padding, so that layouts whose steps hold more of them compare.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scripts.bench import methods, timing
from scripts.bench.table import Cell, Options, Table

if TYPE_CHECKING:
    from peftcli.data import EncodedDataset
    from peftcli.data.batching import Batches
    from peftcli.data.sampling import Plan

Lengths = npt.NDArray[np.int64]
PADDED, GROUPED, MASKED, JOINED, PACKED = (
    "padded",
    "padded, grouped by length",
    "joined, under a mask",
    "joined, sample by sample",
    "packed, sample by sample",
)
LAYOUTS = (PADDED, GROUPED, MASKED, JOINED, PACKED)


def run(options: Options) -> list[Table]:
    """Returns each layout's tokens a second on both kinds of data."""
    import torch

    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    num = 60 if options.smoke else 1000
    short = rng.integers(8, 32, num)
    mixed = np.clip(rng.lognormal(4.3, 0.9, num).astype(np.int64), 8, 512)
    return [
        table("Layouts of a batch: 8 short samples (8 to 31 tokens)", short, 256, options),
        table("Layouts of a batch: 8 samples of 8 to 512 tokens, log-normal", mixed, 512, options),
    ]


def table(title: str, lengths: Lengths, capacity: int, options: Options) -> Table:
    """Returns the layouts' figures for samples of these lengths."""
    model = methods.ours("lora", methods.ALL_LINEAR)(methods.llama(small=options.smoke))
    rounds = 1 if options.smoke else 3 * options.rounds
    sizes: dict[str, list[tuple[int, int]]] = {name: [] for name in LAYOUTS}
    steps = {name: step(copy.deepcopy(model), name, lengths, capacity, sizes[name]) for name in LAYOUTS}
    timing.log(f"{title}: {rounds} rounds")
    seconds = timing.interleaved(steps, rounds)
    measured = {name: sizes[name][-rounds:] for name in LAYOUTS}
    speeds = {
        name: [tokens / taken for (tokens, _), taken in zip(measured[name], seconds[name], strict=True)]
        for name in LAYOUTS
    }
    rows: dict[str, dict[str, Cell]] = {
        name: {
            "tokens a second": statistics.median(speeds[name]),
            "ratio": statistics.median(a / b for a, b in zip(speeds[name], speeds[PADDED], strict=True)),
            "slots filled": statistics.mean(tokens / slots for tokens, slots in measured[name]),
        }
        for name in LAYOUTS
    }
    return Table(title, rows, (f"Medians of {rounds} interleaved rounds. Packs hold {capacity} tokens.",))


def step(model: Any, layout: str, lengths: Lengths, capacity: int, sizes: list[tuple[int, int]]) -> Callable[[], None]:
    """Returns what trains the next step, and adds to `sizes` how many tokens it held, and how many slots."""
    import torch

    from peftcli import attention
    from peftcli.training import loss

    if layout in (JOINED, PACKED):
        attention.use(model, torch.device("cpu"))
    plan, batches = layout_of(layout, lengths, capacity)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4, fused=True)

    def one() -> None:
        (indices,) = plan.step(len(sizes))
        batch = batches.batch(indices)
        loss.score(model, batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sizes.append((batch.num_tokens, batch.input_ids.numel()))

    return one


def layout_of(layout: str, lengths: Lengths, capacity: int) -> tuple[Plan, Batches]:
    """Returns which samples each step takes, and what makes batches of them."""
    from peftcli.data.batching import Batcher, PackBatcher
    from peftcli.data.packing import PackPlan, Packs
    from peftcli.data.sampling import StepPlan

    samples = dataset(lengths)
    if layout == PACKED:
        packs = Packs(lengths, capacity, 0)
        per_step = max(1, round(8 * float(lengths.mean()) / capacity))  # about as many tokens as the others have
        batcher = Batcher(samples, 0, 512, joins=True, always=True)
        return PackPlan(packs, StepPlan(len(packs), per_step, 1, 0)), PackBatcher(batcher, by_row=False)
    joins = layout in (MASKED, JOINED)
    plan = StepPlan(len(lengths), 8, 1, 0, lengths=lengths if layout == GROUPED else None)
    return plan, Batcher(samples, 0, 512, joins=joins, always=joins)


def dataset(lengths: Lengths) -> EncodedDataset:
    """Returns samples of these lengths and of random tokens, all of which but the first are learned."""
    from peftcli.data import EncodedDataset, Sample

    rng = np.random.default_rng(1)
    return EncodedDataset.of(
        [Sample(rng.integers(1, 8192, n).astype(np.int32), np.ones(n, np.uint8)) for n in lengths.tolist()]
    )
