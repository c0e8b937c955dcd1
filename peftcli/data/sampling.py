"""The order of samples as pure functions of the seed, so that step k can be had without running steps 0 to k - 1.

Resuming needs no state but the number of the next step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from peftcli.errors import DataError

Indices = npt.NDArray[np.int64]


@lru_cache(maxsize=2)  # every step of an epoch asks for the same one
def permutation(n: int, seed: int, epoch: int) -> Indices:
    """Returns a random order of `range(n)`, the same for the same arguments on any machine.

    It sorts raw generator output: NumPy promises never to change that, but may change `Generator.permutation`, and a
    run must resume in the same order after an upgrade.
    """
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    order = np.argsort(keys, kind="stable").astype(np.int64, copy=False)
    order.setflags(write=False)
    return order


def split(n: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Returns the rows for training and those held out, each in their own order.

    Args:
        n: Number of rows.
        fraction: How much of them to hold out, above 0 and below 1; rounded to whole rows.
        seed: Decides which.

    Raises:
        DataError: One side would be empty.
    """
    held_out = round(n * fraction)
    if not 0 < held_out < n:
        side = "evaluation" if held_out == 0 else "training"
        hint = f"use at least {1 / n:.3g}" if n > 1 and held_out == 0 else "give more rows or name a `data.eval` file"
        raise DataError(f"data.eval_fraction: {fraction} of {n:,} rows leaves none for {side}", hint=hint)
    order = permutation(n, seed, 0)
    return sorted(order[held_out:].tolist()), sorted(order[:held_out].tolist())


def micro_batches(
    samples: Indices, batch_size: int, accumulation: int, rank: int = 0, world_size: int = 1
) -> list[list[int]]:
    """Returns one rank's share of the samples of one optimizer step, as micro-batches of at most `batch_size`.

    All ranks get the same number of micro-batches, since each is a collective step. Of the few samples that may be
    left for an epoch's last step, the shares differ by one at most, and a rank may get an empty micro-batch.

    Args:
        samples: The samples of the step, at most batch_size × accumulation × world_size of them.
        batch_size: Samples per device and micro-batch.
        accumulation: Micro-batches per step.
        rank: Whose share to return.
        world_size: Number of ranks.
    """
    rounds = -(-len(samples) // (batch_size * world_size))
    assert rounds <= accumulation, "more samples than a step holds"
    shares = np.array_split(samples, rounds * world_size)
    return [share.tolist() for share in shares[rank::world_size]]


def shares(n: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[range]:
    """Yields the positions of one rank's batches of `n` samples, each of which one rank gets once.

    All ranks get the same number of batches, since each may be a collective step; the last may be empty.
    """
    rounds = -(-n // (batch_size * world_size))
    for start in range(rank * batch_size, rounds * batch_size * world_size, batch_size * world_size):
        yield range(min(start, n), min(start + batch_size, n))


class Plan(Protocol):
    """Which samples each optimizer step uses: a `StepPlan`, or a `packing.PackPlan`."""

    @property
    def samples_per_step(self) -> int:
        """What a full optimizer step takes, over all ranks: samples, or packs of them."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps until every sample was used once."""

    def samples(self, global_step: int) -> Indices:
        """Returns the indices of all ranks' samples of optimizer step `global_step`, from 0."""

    def step(self, global_step: int) -> list[list[Any]]:
        """Returns this rank's micro-batches of optimizer step `global_step`, from 0."""


GROUPED_STEPS = 50
"""Steps whose samples are sorted by length together; transformers' length-grouped sampler takes as many."""


@dataclass(frozen=True, eq=False)
class ByLength:
    """A random order of samples in which those of a step have about the same length.

    All but the few samples of an epoch's last, smaller step are shuffled, sorted by length within `GROUPED_STEPS` steps
    at a time, and cut into steps, whose order is then drawn. So a long step comes as likely first as last, and any
    sample may be in the smaller one.

    Attributes:
        lengths: Tokens of each sample [N].
        per_step: Samples of a step, over all ranks.
        seed: Decides the order.
    """

    lengths: npt.NDArray[np.int64]
    per_step: int
    seed: int

    def order(self, epoch: int) -> Indices:
        """Returns all samples' indices [N], step by step."""
        return _by_length(self, epoch)


@lru_cache(maxsize=2)
def _by_length(grouping: ByLength, epoch: int) -> Indices:
    order, per_step = permutation(len(grouping.lengths), grouping.seed, epoch), grouping.per_step
    num_steps = len(order) // per_step
    full, rest = np.split(order, [num_steps * per_step])
    chunks = np.split(full, range(per_step * GROUPED_STEPS, len(full), per_step * GROUPED_STEPS))
    ordered = [chunk[np.argsort(-grouping.lengths[chunk], kind="stable")] for chunk in [*chunks, rest]]
    steps = np.concatenate(ordered[:-1]).reshape(num_steps, per_step)
    # Steps are drawn by numbers of their own, which say nothing of which sample is where.
    return np.concatenate([steps[permutation(num_steps, grouping.seed + 1, epoch)].ravel(), ordered[-1]])


@dataclass(frozen=True)
class StepPlan:
    """Which samples each optimizer step uses. Every epoch uses each sample once; its last step may be smaller.

    The samples of a step depend on batch_size × accumulation × world_size only, not on how that product is made up.

    Attributes:
        num_samples: Samples in the dataset.
        batch_size: Samples per device and micro-batch.
        accumulation: Micro-batches per optimizer step.
        seed: Decides the order.
        rank: Whose share `step` returns.
        world_size: Number of ranks.
        lengths: Tokens of each sample, where steps and micro-batches are to hold samples of like length; see
            `ByLength`. The samples of a step then depend on the same product, and on the lengths.
    """

    num_samples: int
    batch_size: int
    accumulation: int
    seed: int
    rank: int = 0
    world_size: int = 1
    lengths: npt.NDArray[np.int64] | None = None

    @cached_property
    def _by_length(self) -> ByLength | None:
        return None if self.lengths is None else ByLength(self.lengths, self.samples_per_step, self.seed)

    @property
    def samples_per_step(self) -> int:
        """Samples of one full optimizer step, over all ranks."""
        return self.batch_size * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps until every sample was used once."""
        return -(-self.num_samples // self.samples_per_step)

    def samples(self, global_step: int) -> Indices:
        """Returns the indices of all ranks' samples of optimizer step `global_step`, from 0."""
        epoch, position = divmod(global_step, self.steps_per_epoch)
        grouped = self._by_length
        order = permutation(self.num_samples, self.seed, epoch) if grouped is None else grouped.order(epoch)
        start = position * self.samples_per_step
        return order[start : start + self.samples_per_step]

    def step(self, global_step: int) -> list[list[int]]:
        """Returns this rank's micro-batches, lists of sample indices, of optimizer step `global_step`, from 0."""
        samples = self.samples(global_step)
        return micro_batches(samples, self.batch_size, self.accumulation, self.rank, self.world_size)
