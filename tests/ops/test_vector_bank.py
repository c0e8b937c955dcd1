import pytest
import torch

from peftcli.ops import vector_bank as ops
from tests.methods.building import assert_close
from tests.tolerances import EXACT, HALF

h, b = 9, 5
FP64 = EXACT[torch.float64]


def tensors(dtype=torch.float64):
    return torch.randn(3, 2, h).to(dtype), torch.randn(h, b).to(dtype)


@pytest.mark.parametrize("k", [1, 2, 4, h])
def test_mixing_equals_its_reference(k):
    logits, bank = tensors()
    assert_close(ops.mixed_vectors(logits, bank, k), ops.mixed_vectors_reference(logits, bank, k), FP64)


def test_mixing_by_hand():
    logits = torch.tensor([0.5, 3.0, -1.0, 2.0]).double()
    bank = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]).double()
    w = torch.tensor(1.0).double().sigmoid()  # the softmax of 3 and 2
    assert_close(ops.mixed_vectors(logits, bank, 2), w * bank[1] + (1 - w) * bank[3], FP64)
    assert torch.equal(ops.mixed_vectors(logits, bank, 1), bank[1])


def test_of_all_vectors_it_is_the_plain_softmax():
    logits, bank = tensors()
    assert_close(ops.mixed_vectors(logits, bank, h), logits.softmax(-1) @ bank, FP64)


def test_only_the_chosen_get_a_gradient():
    logits, bank = tensors()
    logits.requires_grad_()
    bank.requires_grad_()
    weights = torch.randn(3, 2, b, dtype=torch.float64)
    found = torch.autograd.grad((ops.mixed_vectors(logits, bank, 3) * weights).sum(), (logits, bank))
    expected = torch.autograd.grad((ops.mixed_vectors_reference(logits, bank, 3) * weights).sum(), (logits, bank))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, FP64)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(3).indices, True)
    assert torch.equal(found[0] != 0, chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    logits, bank = tensors(dtype)
    found = ops.mixed_vectors(logits, bank, 2)
    assert found.dtype == dtype
    assert torch.equal(found, ops.mixed_vectors(logits.float(), bank.float(), 2).to(dtype))
    assert_close(found.double(), ops.mixed_vectors(logits.double(), bank.double(), 2), HALF[dtype])


@pytest.mark.parametrize("k", [1, 2, 4, h])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_was_chosen_is_kept_and_the_rest_forgotten(k, dtype):
    logits, bank = tensors(dtype)
    indices, weights = ops.only_chosen(logits, k)
    assert (indices.shape, weights.shape) == ((3, 2, k), (3, 2, k - 1))
    again = ops.logits_of_chosen(indices, weights, h)
    assert again.dtype == dtype
    assert_close(ops.mixed_vectors(again, bank, k), ops.mixed_vectors(logits, bank, k), EXACT[dtype])
    assert torch.equal(again.topk(k).indices.sort().values, logits.topk(k).indices.sort().values)
    assert bool(((again == ops.NOT_CHOSEN).sum(-1) == h - k).all())
    assert torch.isfinite(again).all()


def test_a_last_weight_that_rounding_made_nothing_or_less_stays_finite():
    indices = torch.tensor([[4, 2, 7]] * 2, dtype=torch.uint8)
    weights = torch.tensor([[1.0, 0.0], [0.7, 0.3000001]])
    logits = ops.logits_of_chosen(indices, weights, h)
    assert torch.isfinite(logits).all()
    assert torch.equal(logits.topk(3).indices.sort().values, indices.long().sort().values)
    mixed = ops.mixed_vectors(logits, torch.eye(h), 3)
    assert_close(mixed[:, [4, 2]], weights, EXACT[torch.float32])


@pytest.mark.parametrize(
    ("num_vectors", "dtype"), [(255, torch.uint8), (256, torch.int16), (32767, torch.int16), (32768, torch.int32)]
)
def test_indices_are_as_small_as_they_can_be(num_vectors, dtype):
    logits = torch.arange(num_vectors).float()
    indices, _ = ops.only_chosen(logits, 2)
    assert indices.dtype == dtype
    assert indices.tolist() == [num_vectors - 1, num_vectors - 2]
