from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli.data.sampling import StepPlan, permutation, split
from peftcli.errors import DataError
from tests.tolerances import STANDARD_ERRORS


def test_the_order_never_changes():
    """If this fails, runs that were started before will not resume in the order that they started with."""
    assert permutation(10, 42, 0).tolist() == PINNED
    assert permutation(10, 42, 1).tolist() != PINNED
    assert permutation(10, 43, 0).tolist() != PINNED


PINNED = [0, 1, 4, 2, 6, 8, 5, 9, 7, 3]

plans = st.builds(
    lambda n, batch, accumulation, world, seed: (n, batch, accumulation, seed, world),
    n=st.integers(1, 60),
    batch=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    world=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)


@settings(max_examples=150, deadline=None)
@given(plans)
def test_every_sample_is_used_once_an_epoch(plan):
    n, batch, accumulation, seed, world = plan
    ranks = [StepPlan(n, batch, accumulation, seed, rank, world) for rank in range(world)]
    steps = ranks[0].steps_per_epoch
    for epoch in range(2):
        used = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            shares = [rank.step(step) for rank in ranks]
            assert len({len(share) for share in shares}) == 1, "ranks must take part in the same micro-batches"
            assert len(shares[0]) <= accumulation
            assert all(len(micro) <= batch for micro in chain.from_iterable(shares))
            sizes = [sum(map(len, share)) for share in shares]
            assert max(sizes) - min(sizes) <= 1
            used += chain.from_iterable(chain.from_iterable(shares))
        assert sorted(used) == list(range(n))


@settings(max_examples=50, deadline=None)
@given(plans)
def test_a_step_is_the_same_however_it_is_reached(plan):
    n, batch, accumulation, seed, world = plan
    one = StepPlan(n, batch, accumulation, seed, 0, world)
    walked = [one.step(step) for step in range(2 * one.steps_per_epoch)]
    permutation.cache_clear()
    last = len(walked) - 1
    assert StepPlan(n, batch, accumulation, seed, 0, world).step(last) == walked[last]


def test_the_samples_of_a_step_do_not_depend_on_the_ranks():
    def used(batch, accumulation, world):
        plans = [StepPlan(50, batch, accumulation, 7, rank, world) for rank in range(world)]
        return [
            sorted(chain.from_iterable(chain.from_iterable(plan.step(step) for plan in plans)))
            for step in range(plans[0].steps_per_epoch)
        ]

    assert used(8, 1, 1) == used(2, 4, 1) == used(2, 1, 4) == used(2, 2, 2)


def test_full_micro_batches_are_full():
    plan = StepPlan(100, 3, 2, 0, rank=1, world_size=2)
    assert [len(micro) for micro in plan.step(0)] == [3, 3]
    assert plan.steps_per_epoch == 9
    assert [len(micro) for micro in plan.step(8)] == [2]  # 4 samples for 2 ranks


def test_the_split_is_fixed_and_disjoint():
    train, held_out = split(101, 0.1, 3)
    assert len(held_out) == 10
    assert sorted(train + held_out) == list(range(101))
    assert (train, held_out) == split(101, 0.1, 3)
    assert held_out != split(101, 0.1, 4)[1]
    assert train == sorted(train)


@pytest.mark.parametrize(
    ("n", "fraction", "side"), [(10, 0.01, "evaluation"), (10, 0.99, "training"), (1, 0.5, "eval")]
)
def test_a_split_that_leaves_a_side_empty(n, fraction, side):
    with pytest.raises(DataError, match=f"leaves none for {side}"):
        split(n, fraction, 0)


def test_orders_are_even():
    """Each sample is equally likely at each place: chi-squared over 3,000 orders, 99.9 % quantile of 25 degrees."""
    orders = np.array([permutation(6, 1, epoch) for epoch in range(3000)])
    counts = np.array([[(orders[:, place] == i).sum() for i in range(6)] for place in range(6)])
    assert ((counts - 500) ** 2 / 500).sum() * 5 / 6 < 52.6


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=80),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
)
def test_grouped_by_length_every_sample_still_comes_once(lengths, batch, accumulation, world, epoch):
    lengths = np.array(lengths)
    ranks = [StepPlan(len(lengths), batch, accumulation, 7, rank, world, lengths) for rank in range(world)]
    alone = StepPlan(len(lengths), batch * accumulation * world, 1, 7, lengths=lengths)
    first, seen = epoch * alone.steps_per_epoch, []
    for step in range(first, first + alone.steps_per_epoch):
        taken = [index for rank in ranks for micro in rank.step(step) for index in micro]
        assert sorted(taken) == sorted(alone.samples(step).tolist())
        seen += taken
    assert sorted(seen) == list(range(len(lengths)))


def test_grouped_by_length_pads_less_and_favours_no_length():
    lengths = np.random.default_rng(0).integers(1, 100, 4_003)
    padded, first_means = {}, []
    for grouped in (None, lengths):
        plan = StepPlan(len(lengths), 8, 1, 7, lengths=grouped)
        batches = [micro for step in range(plan.steps_per_epoch) for micro in plan.step(step)]
        padded[grouped is not None] = sum(lengths[micro].max() * len(micro) for micro in batches) - lengths.sum()
    assert padded[True] < padded[False] / 20
    for epoch in range(20):
        steps = range(epoch * plan.steps_per_epoch, epoch * plan.steps_per_epoch + 50)
        first_means.append(np.mean([lengths[plan.samples(step)].mean() for step in steps]))
    # Fifty steps of a length each, uniform over 1 … 99: the mean of so many has a standard error of 28.6 / √1000.
    assert abs(np.mean(first_means) - lengths.mean()) < STANDARD_ERRORS * 28.6 / 1000**0.5
    lasts = {tuple(plan.samples((epoch + 1) * plan.steps_per_epoch - 1).tolist()) for epoch in range(5)}
    assert len(lasts) == 5  # the smaller last step has others in each epoch
