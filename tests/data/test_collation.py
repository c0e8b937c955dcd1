import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peftcli.data.collation import IGNORED, choose_layout, collate, samples_of
from peftcli.data.dataset import Sample


def sample(ids, supervised):
    return Sample(np.array(ids, np.int32), np.array(supervised, np.uint8))


A = sample([5, 6, 7], [1, 0, 1])
B = sample([8, 9, 10, 11, 12], [0, 0, 1, 1, 1])


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=request.param,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double().eval()


def losses(model, batch):
    """The summed loss of each sample of a batch, shifted by one as training shifts it."""
    with torch.no_grad():
        logits = model(**batch.model_inputs(), use_cache=False).logits
    labels = torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    if batch.position_ids is None:
        return loss.sum(dim=1)
    return torch.stack([part.sum() for part in loss[0].tensor_split(starts(batch)[1:])])


def starts(batch):
    return (batch.position_ids[0] == 0).nonzero().flatten().tolist()


def test_padded():
    batch = collate([A, B], 3, "padded")
    assert batch.input_ids.tolist() == [[5, 6, 7, 3, 3], [8, 9, 10, 11, 12]]
    assert batch.labels.tolist() == [[-100, -100, 7, -100, -100], [-100, -100, 10, 11, 12]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.position_ids is None
    assert (batch.num_tokens, batch.num_supervised) == (8, 4)


def test_flat():
    batch = collate([A, B], 3, "flat")
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch.labels.tolist() == [[-100, -100, 7, -100, -100, 10, 11, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch.attention_mask is None
    assert (batch.num_tokens, batch.num_supervised) == (8, 4)


def test_padding_without_a_padding_token():
    assert collate([A, B], None, "padded").input_ids[0, 3:].tolist() == [0, 0]


@pytest.mark.parametrize("layout", ["padded", "flat"])
def test_samples_can_be_read_back(layout):
    again = samples_of(collate([A, B], 3, layout))
    assert [one.input_ids.tolist() for one in again] == [[5, 6, 7], [8, 9, 10, 11, 12]]
    assert [one.supervised.tolist() for one in again] == [[0, 0, 1], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize("layout", ["padded", "flat"])
def test_no_samples_take_part_without_effect(layout, model):
    batch = collate([], 3, layout)
    assert (batch.num_tokens, batch.num_supervised) == (0, 0)
    assert losses(model, batch).tolist() == [0.0]


def test_moving_a_batch():
    batch = collate([A, B], 3, "padded").to("meta")
    assert {batch.input_ids.device.type, batch.labels.device.type, batch.attention_mask.device.type} == {"meta"}
    assert batch.position_ids is None
    assert collate([A], 3, "flat").to("meta").position_ids.device.type == "meta"


def test_layouts_give_each_sample_the_same_loss(model):
    generator = np.random.default_rng(0)
    samples = [
        sample(generator.integers(1, 64, n), generator.integers(0, 2, n) | (np.arange(n) == n - 1))
        for n in (1, 2, 7, 12, 30, 12)
    ]
    alone = torch.cat([losses(model, collate([one], 0, "padded")) for one in samples])
    assert (alone[1:] > 0).all()
    for layout in ("padded", "flat"):
        torch.testing.assert_close(losses(model, collate(samples, 0, layout)), alone, rtol=1e-8, atol=1e-8)


def test_samples_of_a_flat_batch_do_not_see_each_other(model):
    before = losses(model, collate([A, B], 0, "flat"))
    changed = losses(model, collate([sample([40, 41, 42], [0, 1, 1]), B], 0, "flat"))
    assert before[1] == changed[1]
    assert before[0] != changed[0]


@pytest.mark.parametrize(
    ("lengths", "hidden_size", "expected"),
    [
        ([100] * 8, 576, "padded"),  # nothing to save, and attention to lose
        ([10, 20, 30, 400], 576, "flat"),  # most of the rectangle is padding
        ([700, 900, 1000, 800], 64, "padded"),  # narrow: attention between samples dominates
        ([700, 900, 1000, 800], 4096, "flat"),  # wide: the matrices do
        ([512], 576, "padded"),
        ([], 576, "padded"),
    ],
)
def test_layout_of_least_cost(lengths, hidden_size, expected):
    assert choose_layout(lengths, hidden_size) == expected
