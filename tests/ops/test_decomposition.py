import pytest
import torch

from peftcli.ops import decomposition as ops
from tests.methods.building import assert_close
from tests.tolerances import CANCELLED, EXACT, HALF

I, O, R, S = 7, 12, 4, 0.8  # noqa: E741
DTYPES = [torch.float64, torch.float32]


def tensors(dtype=torch.float64):
    W, A, B = torch.randn(O, I), torch.randn(R, I), torch.randn(O, R)
    return W.to(dtype), A.to(dtype), B.to(dtype)


def factored(W, A, B, scale=S):
    return ops.factored_row_norms(ops.squared_row_norms(W), W @ A.T, A, B, scale)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
def test_squared_row_norms(dtype):
    W = torch.randn(O, I).to(dtype)
    c = ops.squared_row_norms(W)
    assert c.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(c, (W.double() ** 2).sum(1).to(c.dtype), EXACT[c.dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_norms_are_those_of_the_rows(dtype):
    W, A, B = tensors(dtype)
    V = W + S * B @ A
    expected = torch.stack([row.dot(row).sqrt() for row in V])
    n, lost = factored(W, A, B)
    assert_close(n, expected, EXACT[dtype])
    assert_close(ops.direct_row_norms(W, A, B, S), expected, EXACT[dtype])
    assert n.dtype == dtype
    assert not lost.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1.0, 0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 0.0])
def test_an_update_that_nearly_cancels_its_row(eps, dtype):
    """s·BA = −(1 − eps) W in the even rows: digits are lost as 1/eps², and every row that lost them is told."""
    _, A, B = tensors(dtype)
    B[1::2] = torch.randn(O // 2, R, dtype=dtype)
    W = -S * B @ A
    B[0::2] *= 1 - eps
    W[1::2] = torch.randn(O // 2, I, dtype=dtype)
    exact = ops.direct_row_norms(W.double(), A.double(), B.double(), S)
    n, lost = factored(W, A, B)
    assert torch.isfinite(n).all()
    assert not lost[1::2].any()
    assert bool(lost[0::2].all()) == bool(lost[0::2].any()) == (eps**2 < ops.CANCELLATION_LIMIT)  # n² is eps² c
    relative = ((n.double() - exact).abs() / exact)[~lost]
    assert float(relative.max()) <= CANCELLED[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    W, A, B = tensors(dtype)
    for n in (factored(W, A, B)[0], ops.direct_row_norms(W, A, B, S)):
        assert n.dtype == torch.float32
    direct = ops.direct_row_norms(W, A, B, S)
    assert_close(direct, ops.direct_row_norms(W.float(), A.float(), B.float(), S), EXACT[torch.float32])
    assert_close(factored(W, A, B)[0], direct, HALF[dtype])  # W Aᵀ was rounded to half before


def test_zero_rows_have_length_zero_and_a_finite_gradient():
    W, A, B = tensors()
    W[2], B[2] = 0, 0
    A.requires_grad_()
    B.requires_grad_()
    for norms in (lambda: factored(W, A, B)[0], lambda: ops.direct_row_norms(W, A, B, S)):
        n = norms()
        assert n[2] == 0
        gradients = torch.autograd.grad(n.sum(), (A, B))
        assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_the_factored_norms_gradient_is_the_direct_ones():
    W, A, B = tensors()
    A.requires_grad_()
    B.requires_grad_()
    weights = torch.randn(O, dtype=torch.float64)
    found = torch.autograd.grad((factored(W, A, B)[0] * weights).sum(), (A, B))
    expected = torch.autograd.grad((ops.direct_row_norms(W, A, B, S) * weights).sum(), (A, B))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, EXACT[torch.float64])


def test_magnitude_ratio():
    m, n = torch.tensor([3.0, -2.0, 0.0, 5.0, 0.0]), torch.tensor([2.0, 4.0, 1.0, 0.0, 0.0])
    assert torch.equal(ops.magnitude_ratio(m, n), torch.tensor([1.5, -0.5, 0.0, 1.0, 1.0]))


@pytest.mark.parametrize("biased", [True, False])
def test_rescaling_equals_its_reference(biased):
    h, g = torch.randn(3, 5, O, dtype=torch.float64), torch.randn(O, dtype=torch.float64)
    b = torch.randn(O, dtype=torch.float64) if biased else None
    assert_close(ops.rescale_rows(h, b, g), ops.rescale_rows_reference(h, b, g), EXACT[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rescaling_by_one_changes_no_bit(dtype):
    h, b = torch.randn(50, O).to(dtype), torch.randn(O).to(dtype)
    found = ops.rescale_rows(h, b, torch.ones(O))
    assert found.dtype == dtype
    assert torch.equal(found, h)


def test_in_half_precision_a_ratio_near_one_is_not_rounded_away():
    """A ratio of 1.001 is 1 in bfloat16; only its distance from 1 may be rounded."""
    h, g = torch.full((1, O), 1000.0, dtype=torch.bfloat16), torch.full((O,), 1.003)
    assert torch.equal(ops.rescale_rows(h, None, g), (h.float() * 1.003).bfloat16())
    assert not torch.equal(ops.rescale_rows(h, None, g), h)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merging_gives_each_row_its_length_and_rounds_once(dtype):
    W, A, B = tensors(torch.promote_types(dtype, torch.float32))
    W, m, delta = W.to(dtype), torch.randn(O).to(A.dtype), S * B @ A
    kept = W.clone()
    merged = ops.merged_decomposition(W, delta, m)
    assert merged.dtype == dtype
    assert torch.equal(W, kept), "the base weight was written into"
    V = W.to(A.dtype) + delta
    expected = m[:, None] * V / V.norm(dim=1, keepdim=True)
    if dtype in EXACT:
        assert_close(merged, expected, EXACT[dtype])
        assert_close(merged.norm(dim=1), m.abs(), EXACT[dtype])
    else:
        assert torch.equal(merged, ops.merged_decomposition(W.float(), delta, m).to(dtype))


# ---- the two ways to rescale ----


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 2)], ids=str)
def test_the_gradients_of_rescaling(shape, biased, kept):
    h = torch.randn(*shape, O, dtype=torch.float64, requires_grad=True)
    g = (torch.rand(O, dtype=torch.float64) + 0.5).requires_grad_()
    b = torch.randn(O, dtype=torch.float64) if biased else None
    assert torch.autograd.gradcheck(lambda h, g: ops.rescale_rows(h * 1, b, g, kept=kept), (h, g))


def test_which_factors_are_small():
    """From its result alone, a row that is 0 could not tell what it was."""
    m, n = torch.tensor([2.0, -2 * ops.SMALLEST_RATIO, 3.0]), torch.tensor([2.0, 2.0, 1.0])
    assert not ops.has_small(m, n)
    assert ops.has_small(m * 0.99, n)
    assert ops.has_small(torch.tensor([1.0, 0.0]), torch.ones(2))
    assert not ops.has_small(torch.zeros(2), torch.zeros(2))  # which pass as they are


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smallest", [ops.SMALLEST_RATIO, 0.5])
def test_the_gradient_told_from_the_result(dtype, smallest):
    """Rounding the result by eps moves it by no more than eps / g, of which the smallest g is bounded."""
    h, b, weights = torch.randn(50, O).to(dtype), torch.randn(O).to(dtype), torch.randn(50, O).to(dtype)
    g = torch.full((O,), smallest, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    gradients = [
        torch.autograd.grad(ops.rescale_rows(h.clone(), b, g, kept=kept), g, weights)[0] for kept in (True, False)
    ]
    tolerance = {**EXACT, **HALF}[dtype]
    assert_close(*gradients, tolerance if smallest == 0.5 else tolerance / smallest)


def test_what_rescaling_keeps(kept_shapes):
    """One tensor of the output's size: the input, or the result that the next operation keeps, too."""
    g = (torch.rand(O) + 0.5).requires_grad_()
    for kept in (True, False):
        h = torch.randn(3, 4, O)
        results = []
        shapes = kept_shapes(
            lambda h=h, kept=kept, results=results: results.append(ops.rescale_rows(h, None, g, kept=kept))
        )
        assert sorted(shapes) == [(3, 4, O), (O,)]
        assert (results[0].data_ptr() == h.data_ptr()) == kept


def test_a_result_that_is_kept_and_then_written_into_does_not_pass():
    g = (torch.rand(O) + 0.5).requires_grad_()
    for kept in (True, False):
        y = ops.rescale_rows(torch.randn(3, O), None, g, kept=kept)
        y += 1
        if kept:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        else:
            y.sum().backward()
