import pytest
import torch

from peftcli.ops.sparse import dense, places, sparse_product, sparse_product_reference
from tests.methods.building import assert_close
from tests.tolerances import EXACT

M, N, T = 6, 10, 4


def drawn(count, dtype=torch.float64):
    """Returns places of `count` entries, their values in the order of those places, and inputs [N, T]."""
    taken = torch.randperm(M * N)[:count]
    at = places(taken // N, taken % N, M, N)
    return at, torch.randn(count, dtype=dtype), torch.randn(N, T, dtype=dtype)


@pytest.mark.parametrize("count", [1, 7, 30, M * N])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_product_and_gradients_equal_the_reference(count, dtype):
    at, values, x = drawn(count, dtype)
    found, expected = ((values.clone().requires_grad_(), x.clone().requires_grad_()) for _ in range(2))
    g = torch.randn(M, T, dtype=dtype)
    results = []
    for inputs, product in ((found, sparse_product), (expected, sparse_product_reference)):
        results.append(product(*inputs, at))
        results[-1].backward(g)
    assert_close(*results, EXACT[dtype])
    for one, other in zip(found, expected, strict=True):
        assert_close(one.grad, other.grad, EXACT[dtype])


def test_gradcheck():
    at, values, x = drawn(20)
    tensors = values.requires_grad_(), x.requires_grad_()
    assert torch.autograd.gradcheck(lambda values, x: sparse_product(values, x, at), tensors)


@pytest.mark.parametrize("wanted", ["values", "x"])
def test_only_the_gradient_that_is_wanted_is_computed(wanted):
    at, values, x = drawn(20)
    (values if wanted == "values" else x).requires_grad_()
    sparse_product(values, x, at).sum().backward()
    assert (values.grad is None) == (wanted == "x")
    assert (x.grad is None) == (wanted == "values")


def test_each_value_is_at_its_place():
    rows, columns = torch.tensor([3, 0, 3, 5]), torch.tensor([9, 2, 1, 2])
    at = places(rows, columns, M, N)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    S = dense(values[at.order], at)
    assert S.shape == (M, N)
    assert S[rows, columns].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert S.count_nonzero() == 4


def test_an_input_that_is_not_contiguous_and_one_of_no_tokens():
    at, values, x = drawn(20)
    assert_close(sparse_product(values, x.T.contiguous().T, at), sparse_product(values, x, at), EXACT[torch.float64])
    assert sparse_product(values, x[:, :0], at).shape == (M, 0)


def test_autograd_keeps_nothing_that_grows_with_both_entries_and_tokens():
    at, values, x = drawn(M * N)
    values, x = values.requires_grad_(), x.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        sparse_product(values, x, at)
    assert kept
    assert max(kept) < M * N * T
