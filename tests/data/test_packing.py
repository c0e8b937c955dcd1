"""Packs: every sample once, none split, as few as best-fit-decreasing promises, the same on every machine and rank."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftcli.data.batching import Batcher, PackBatcher
from peftcli.data.collation import IGNORED
from peftcli.data.dataset import EncodedDataset, Sample
from peftcli.data.packing import PackPlan, Packs, best_fit_decreasing
from peftcli.data.sampling import StepPlan

CAPACITY = 20
lengths_of = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60)


def packs_of(lengths, seed=0):
    return Packs(np.array(lengths), CAPACITY, seed)


def fewest(lengths, capacity):
    """Returns the fewest packs that there can be, by trying them all: each length in every pack with room for it."""
    best = len(lengths)

    def place(index, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if index == len(lengths):
            best = len(rooms)
            return
        for pack in {rooms.index(room) for room in set(rooms) if room >= lengths[index]}:
            place(index + 1, [room - lengths[index] * (i == pack) for i, room in enumerate(rooms)])
        place(index + 1, [*rooms, capacity - lengths[index]])

    place(0, [])
    return best


def reference(lengths, capacity):
    """Returns best-fit-decreasing by looking at all packs for each length: the rooms that are left."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [index for index, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda index: rooms[index])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(lengths_of)
def test_it_is_best_fit_decreasing(lengths):
    falling = np.array(sorted(lengths, reverse=True))
    packs = best_fit_decreasing(falling, CAPACITY)
    filled = np.bincount(packs, weights=falling)
    assert sorted((CAPACITY - filled).astype(int).tolist()) == reference(lengths, CAPACITY)


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=9))
def test_as_few_packs_as_promised(lengths):
    best = fewest(sorted(lengths, reverse=True), CAPACITY)
    assert best <= len(packs_of(lengths)) <= 11 / 9 * best + 6 / 9


def test_no_lengths_and_full_ones():
    assert len(packs_of([])) == 0
    assert len(packs_of([CAPACITY] * 3)) == 3
    assert packs_of([CAPACITY] * 3).fill == 1


@given(lengths_of, st.integers(0, 3), st.integers(0, 2))
def test_every_sample_once_an_epoch_and_no_pack_too_full(lengths, seed, epoch):
    packs = packs_of(lengths, seed)
    contents = packs.contents(epoch)
    assert len(contents) == len(packs)
    assert sorted(np.concatenate(contents).tolist()) == list(range(len(lengths)))
    assert all(0 < packs.lengths[pack].sum() <= CAPACITY for pack in contents)


def test_epochs_mix_the_samples_anew():
    packs = packs_of([4, 5, 6, 5] * 20)
    partners = [{tuple(sorted(pack.tolist())) for pack in packs.contents(epoch)} for epoch in range(3)]
    for one, other in pairwise(partners):
        assert len(one & other) < len(one) / 4
    again = packs_of([4, 5, 6, 5] * 20).contents(1)
    assert all((one == other).all() for one, other in zip(again, packs.contents(1), strict=True))


@given(lengths_of, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_ranks_share_the_packs_of_a_step(lengths, batch, accumulation, world):
    packs = packs_of(lengths)

    def plan(rank, batch=batch, accumulation=accumulation, world=world):
        return PackPlan(packs, StepPlan(len(packs), batch, accumulation, 3, rank, world))

    ranks = [plan(rank) for rank in range(world)]
    steps = ranks[0].steps_per_epoch
    seen = []
    for step in range(steps):
        shares = [one.step(step) for one in ranks]
        assert len({len(share) for share in shares}) == 1  # each micro-batch is a collective step
        taken = [sample for share in shares for micro in share for pack in micro for sample in pack]
        assert sorted(taken) == sorted(ranks[0].samples(step).tolist())
        # However the product is made up, a step has the same samples.
        alone = plan(0, batch * accumulation * world, 1, 1)
        assert sorted(alone.samples(step).tolist()) == sorted(taken)
        seen += taken
    assert sorted(seen) == list(range(len(lengths)))


def batcher(lengths, *, by_row, **options):
    samples = [
        Sample(np.full(length, 10 + index, np.int32), np.ones(length, np.uint8), task=index)
        for index, length in enumerate(lengths)
    ]
    return PackBatcher(Batcher(EncodedDataset.of(samples), 1, 64, joins=True, **options), by_row)


def test_a_batch_of_packs_end_to_end():
    batch = batcher([3, 2, 2], by_row=False).batch([[2, 0], [1]])
    assert batch.input_ids.tolist() == [[12, 12, 10, 10, 10, 11, 11]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0, 1]]
    assert (batch.attention_mask, batch.num_tokens, batch.num_supervised) == (None, 7, 4)


def test_a_batch_of_packs_row_by_row():
    batch = batcher([3, 2, 2], by_row=True).batch([[2, 0], [1]])
    assert batch.input_ids.tolist() == [[12, 12, 10, 10, 10], [11, 11, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]]  # the filling is a sample of its own
    ignored = IGNORED
    assert batch.labels.tolist() == [[ignored, 12, ignored, 10, 10], [ignored, 11, *[ignored] * 3]]
    assert batch.task_ids.tolist() == [[2, 2, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert (batch.attention_mask, batch.num_tokens, batch.num_supervised) == (None, 7, 4)


@pytest.mark.parametrize("by_row", [True, False])
def test_virtual_tokens_and_several_prompts(by_row):
    batch = batcher([2, 1], by_row=by_row, prompts=[(90,), (91,)]).batch([[1], [0]])
    rows = batch.input_ids.tolist()
    assert rows == (
        [[90, 11, 1], [90, 10, 10], [91, 11, 1], [91, 10, 10]] if by_row else [[90, 11, 90, 10, 10, 91, 11, 91, 10, 10]]
    )


@pytest.mark.parametrize("by_row", [True, False])
def test_a_rank_without_packs(by_row):
    batch = batcher([2, 1], by_row=by_row).batch([])
    assert (batch.input_ids.shape, batch.num_tokens, batch.num_supervised) == ((1, 1), 0, 0)
