"""Packing: samples put together into packs of about equally many tokens, and which packs each step uses.

How many packs there are, and of which lengths they are made, follows from the lengths alone. Which of the samples of
one length goes into which of its places, and the order of the packs, are drawn anew for each epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from peftcli.data.sampling import Indices, StepPlan, permutation


def best_fit_decreasing(lengths: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
    """Returns the pack, from 0, that each of `lengths` [N], which fall, goes into: the fullest with room for it.

    At most 11/9 of the fewest packs that there could be, and 6/9 of one, are used (Johnson, 1974).

    Args:
        lengths: Tokens of each sample, the longest first, none more than `capacity`.
        capacity: Tokens that a pack holds.
    """
    packs = np.empty(len(lengths), np.int64)
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by the room that is left in them
    rooms, count = 0, 0  # bit r of `rooms`: some pack has room for r tokens
    for position, length in enumerate(lengths.tolist()):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, pack, count = capacity, count, count + 1
        with_room[room - length].append(pack)
        rooms |= 1 << (room - length)
        packs[position] = pack
    return packs


@dataclass(frozen=True, eq=False)
class Packs:
    """The samples of a dataset in packs.

    Attributes:
        lengths: Tokens of each sample, virtual tokens included [N].
        capacity: Tokens that a pack holds.
        seed: Decides who is in a pack with whom, as far as lengths leave it open.
    """

    lengths: npt.NDArray[np.int64]
    capacity: int
    seed: int

    @cached_property
    def _places(self) -> npt.NDArray[np.int64]:
        """The pack of each place [N]; places are in falling order of length."""
        assert int(self.lengths.max(initial=0)) <= self.capacity, "a sample is longer than a pack"
        return best_fit_decreasing(-np.sort(-self.lengths), self.capacity)

    def __len__(self) -> int:
        """Returns the number of packs, the same in every epoch."""
        return int(self._places.max(initial=-1)) + 1

    @property
    def fill(self) -> float:
        """The share of the packs' room that holds tokens, 0 … 1."""
        return float(self.lengths.sum()) / max(len(self) * self.capacity, 1)

    def contents(self, epoch: int) -> list[Indices]:
        """Returns the samples of each pack in one epoch."""
        return _contents(self, epoch)

    def describe(self) -> str:
        """Returns a sentence on how many packs there are and how full."""
        return (
            f"{len(self.lengths):,} samples in {len(self):,} packs of {self.capacity:,} tokens, "
            f"{100 * self.fill:.1f} % filled."
        )


@lru_cache(maxsize=2)  # every step of an epoch asks for the same
def _contents(packs: Packs, epoch: int) -> list[Indices]:
    # The order of packs is drawn from (seed, epoch), too: samples are spread by numbers of their own.
    order = permutation(len(packs.lengths), packs.seed + 1, epoch)
    by_length = order[np.argsort(-packs.lengths[order], kind="stable")]
    by_pack = np.argsort(packs._places, kind="stable")
    ends = np.cumsum(np.bincount(packs._places, minlength=len(packs)))
    return np.split(by_length[by_pack], ends[:-1])


@dataclass(frozen=True)
class PackPlan:
    """Which packs each optimizer step uses; see `StepPlan`, for which a pack counts as one sample.

    Attributes:
        packs: The samples in packs.
        steps: The plan of steps over packs.
    """

    packs: Packs
    steps: StepPlan

    @property
    def samples_per_step(self) -> int:
        """Packs of one full optimizer step, over all ranks."""
        return self.steps.samples_per_step

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps until every sample was used once."""
        return self.steps.steps_per_epoch

    def samples(self, global_step: int) -> Indices:
        """Returns the indices of all ranks' samples of optimizer step `global_step`, from 0."""
        contents = self.packs.contents(global_step // self.steps_per_epoch)
        return np.concatenate([contents[pack] for pack in self.steps.samples(global_step)])

    def step(self, global_step: int) -> list[list[list[int]]]:
        """Returns this rank's micro-batches of optimizer step `global_step`: lists of packs, lists of samples."""
        contents = self.packs.contents(global_step // self.steps_per_epoch)
        return [[contents[pack].tolist() for pack in packs] for packs in self.steps.step(global_step)]
