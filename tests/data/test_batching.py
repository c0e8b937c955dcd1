"""Which layout each batch gets, and the order of an evaluation."""

import numpy as np
import pytest

from peftcli.data.batching import Batcher
from peftcli.data.collation import choose_layout, samples_of
from peftcli.data.dataset import EncodedDataset, Sample

LENGTHS = (3, 9, 1, 9, 5, 2, 7)
UNEVEN, EVEN = (0, 1), (1, 3)  # of 3 and 9 tokens, of 9 and 9


def make_batcher(**options):
    samples = [
        Sample(np.full(length, 10 + index, np.int32), np.ones(length, np.uint8)) for index, length in enumerate(LENGTHS)
    ]
    return Batcher(EncodedDataset.of(samples), **{"pad_token_id": 1, "hidden_size": 64, "joins": True, **options})


def is_flat(batch):
    return batch.position_ids is not None


def indices(batch):
    return [int(sample.input_ids[0]) - 10 for sample in samples_of(batch)]


def test_the_cheaper_layout_where_both_are_allowed():
    assert choose_layout([3, 9], 64) == "flat"
    assert choose_layout([9, 9], 64) == "padded"
    batcher = make_batcher()
    assert is_flat(batcher.batch(UNEVEN))
    assert not is_flat(batcher.batch(EVEN))


@pytest.mark.parametrize("chosen", [UNEVEN, EVEN])
def test_never_joined_where_that_is_not_allowed(chosen):
    assert not is_flat(make_batcher(joins=False).batch(chosen))
    assert not is_flat(make_batcher(joins=False, always=True).batch(chosen))
    assert is_flat(make_batcher(always=True).batch(chosen))


def test_a_batch_has_the_samples_asked_for_in_their_order():
    for joins in (True, False):
        assert indices(make_batcher(joins=joins).batch([4, 0, 6])) == [4, 0, 6]


def test_padding():
    batch = make_batcher(joins=False, pad_token_id=99).batch([0, 2])
    assert batch.input_ids.tolist() == [[10, 10, 10], [12, 99, 99]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50])
def test_an_evaluation_sees_every_sample_once_the_longest_first(batch_size):
    batches = list(make_batcher().in_order_of_length(batch_size))
    order = [index for batch in batches for index in indices(batch)]
    assert sorted(order) == list(range(7))
    lengths = [LENGTHS[index] for index in order]
    assert lengths == sorted(LENGTHS, reverse=True)
    assert [len(indices(batch)) for batch in batches] == [
        min(batch_size, 7 - start) for start in range(0, 7, batch_size)
    ]


def test_an_empty_share_of_a_step_is_a_batch_without_supervision():
    batch = make_batcher().batch([])
    assert (batch.num_tokens, batch.num_supervised) == (0, 0)
