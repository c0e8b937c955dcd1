import math

import pytest
import torch

from peftcli.ops.low_rank import (
    add_expanded,
    add_low_rank,
    add_low_rank_reference,
    low_rank,
    merged_low_rank,
    projected_gradient,
    projected_gradient_reference,
)
from tests.methods.building import assert_close
from tests.tolerances import EXACT, HALF

I, O, R, S = 6, 10, 3, 1.7  # noqa: E741


def factors(dtype=torch.float64):
    return torch.randn(R, I, dtype=dtype), torch.randn(O, R, dtype=dtype)


@pytest.mark.parametrize("shape", [(), (4,), (2, 4), (0,), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_add_low_rank_equals_its_reference(shape, dtype):
    A, B = factors(dtype)
    x, y = torch.randn(*shape, I, dtype=dtype), torch.randn(*shape, O, dtype=dtype)
    expected = add_low_rank_reference(y.clone(), x, A, B, S)
    found = add_low_rank(y, x, A, B, S)
    assert found.shape == expected.shape
    assert found.data_ptr() == y.data_ptr(), "a copy of y was made"
    if shape != (0,):
        assert_close(found, expected, EXACT[dtype])


def test_y_that_cannot_be_written_into_gives_the_same():
    A, B = factors()
    x, y = torch.randn(2, 4, I, dtype=torch.float64), torch.randn(O, 4, 2, dtype=torch.float64).permute(2, 1, 0)
    assert not y.is_contiguous()
    kept = y.clone()
    assert_close(add_low_rank(y, x, A, B, S), add_low_rank_reference(kept, x, A, B, S), EXACT[torch.float64])
    assert torch.equal(y, kept)


def test_an_input_whose_rows_lie_apart():
    A, B = factors()
    x = torch.randn(I, 4, 2, dtype=torch.float64).permute(2, 1, 0)
    y = torch.randn(2, 4, O, dtype=torch.float64)
    expected = add_low_rank_reference(y.clone(), x, A, B, S)
    assert_close(add_low_rank(y, x, A, B, S), expected, EXACT[torch.float64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_its_dtype_and_computes_the_update_in_the_factors(dtype):
    A, B = factors(torch.float32)
    x, y = torch.randn(5, I).to(dtype), torch.zeros(5, O, dtype=dtype)
    found = add_low_rank(y, x, A, B, S)
    assert found.dtype == dtype
    assert torch.equal(found, low_rank(x, A, B, S).to(dtype))  # only the last rounding is y's
    assert_close(found.float(), add_low_rank_reference(y.float(), x.float(), A, B, S), HALF[dtype])


def test_low_rank_is_the_update_alone():
    A, B = factors()
    x = torch.randn(5, I, dtype=torch.float64)
    zero = torch.zeros(5, O, dtype=torch.float64)
    assert_close(low_rank(x, A, B, S), add_low_rank_reference(zero, x, A, B, S), EXACT[torch.float64])


def test_gradients():
    A, B = (factor.requires_grad_() for factor in factors())
    W = torch.randn(O, I, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, I, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: add_low_rank(t[0] @ t[3].T, t[0], t[1], t[2], S), (x, A, B, W))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merging_rounds_once(dtype):
    A, B = factors(torch.float64 if dtype == torch.float64 else torch.float32)
    W = torch.randn(O, I).to(dtype)
    kept = W.clone()
    merged = merged_low_rank(W, A, B, S)
    assert merged.dtype == dtype
    assert torch.equal(W, kept), "the base weight was written into"
    if dtype in EXACT:
        assert_close(merged, W + S * B @ A, EXACT[dtype])
    else:
        assert torch.equal(merged, merged_low_rank(W.float(), A, B, S).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_projected_gradient_equals_its_reference(dtype):
    A, gradient = torch.randn(R, I, dtype=dtype), torch.randn(O, R, dtype=dtype)
    kept = A.clone()
    found = projected_gradient(gradient, A, S)
    assert_close(found, projected_gradient_reference(gradient, A, S), EXACT[dtype])
    assert torch.equal(A, kept)
    assert found.dtype == dtype


def test_the_projected_gradient_of_an_a_without_full_rank_does_not_pass_as_a_number():
    found = projected_gradient(torch.ones(O, 2), torch.zeros(2, I), S)
    assert float(found.abs().min()) > 1e6 or not torch.isfinite(found).any()


# ---- written in place, with gradients ----


@pytest.mark.parametrize("shape", [(5,), (2, 4)], ids=str)
@pytest.mark.parametrize("frozen", ["none", "u", "B"])
def test_gradients_of_what_is_written_in_place(shape, frozen):
    y, u = torch.randn(*shape, O, dtype=torch.float64), torch.randn(*shape[::-1], R, dtype=torch.float64)
    u = u.transpose(0, -2) if len(shape) == 2 else u  # rows that lie apart
    B = factors()[1]
    tensors = {"y": y, "u": u, "B": B}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name != frozen)
    assert torch.autograd.gradcheck(lambda y, u, B: add_expanded(y * 1, u, B, S), (y, u, B))


def test_a_result_may_be_used_twice_and_written_into_again():
    A, B = (factor.requires_grad_() for factor in factors())
    x = torch.randn(2, 4, I, dtype=torch.float64, requires_grad=True)

    def twice(x, A, B):
        y = add_low_rank(x.new_zeros(2, 4, O), x, A, B, S)
        return add_low_rank(y * y, x, A, B, S) + add_expanded(x.new_ones(2, 4, O), x @ A.T, B, 1.0)

    assert torch.autograd.gradcheck(twice, (x, A, B))


def test_only_the_input_and_the_thin_side_are_kept(kept_shapes):
    """Nothing of the output's size, and of the inputs' what A's gradient needs."""
    A, B = (factor.requires_grad_() for factor in factors())
    W = torch.randn(O, I, dtype=torch.float64)
    x = torch.randn(2, 4, I, dtype=torch.float64, requires_grad=True)
    floor = kept_shapes(lambda: torch.nn.functional.linear(x, W))
    found = kept_shapes(lambda: add_low_rank(torch.nn.functional.linear(x, W), x, A, B, S))
    expected = [*floor, x.shape, A.shape, (2, 4, R), B.shape]
    assert sorted(map(math.prod, found)) == sorted(map(math.prod, expected))


def test_an_output_of_a_custom_function_is_left_alone():
    class Packed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy * 2

    A, B = factors()
    x = torch.randn(2, 4, I, dtype=torch.float64, requires_grad=True)
    y = Packed.apply(torch.randn(2, 4, O, dtype=torch.float64, requires_grad=True))
    before = y.detach().clone()
    assert_close(add_low_rank(y, x, A, B, S), add_low_rank_reference(before, x, A, B, S), EXACT[torch.float64])
    assert torch.equal(y, before)


def test_under_autocast_the_update_is_rounded_with_what_it_is_added_to():
    A, B = (factor.requires_grad_() for factor in factors(torch.float32))
    x, W = torch.randn(5, I, requires_grad=True), torch.randn(O, I)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.nn.functional.linear(x, W)
        found = add_low_rank(y, x, A, B, S)
    assert found.data_ptr() == y.data_ptr(), "a copy of y was made"
    assert_close(found.float(), add_low_rank_reference(x @ W.T, x, A, B, S), 2 * HALF[torch.bfloat16])
    found.float().sum().backward()
    gradients = torch.autograd.grad(add_low_rank_reference(x @ W.T, x, A, B, S).sum(), (x, A, B))
    for tensor, expected in zip((x, A, B), gradients, strict=True):
        assert tensor.grad.dtype == torch.float32
        assert_close(tensor.grad, expected, 2 * HALF[torch.bfloat16])
