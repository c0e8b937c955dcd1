import pytest
import torch

from peftcli.ops.heads import add_heads, add_heads_reference, gates
from tests.methods.building import assert_close
from tests.tolerances import EXACT, HALF

O, R, N, S = 10, 3, 4, 1.7  # noqa: E741


def made(shape, heads=N, dtype=torch.float64):
    """Returns y, u with that many heads, the gates and B."""
    y, u = torch.randn(*shape, O, dtype=dtype), torch.randn(*shape, heads, R, dtype=dtype)
    return y, u, torch.rand(*shape, N, dtype=dtype), torch.randn(O, N * R, dtype=dtype)


@pytest.mark.parametrize("heads", [1, N], ids=["one thin side", "one for each head"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 5), (0,), (2, 1, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_add_heads_equals_its_reference(shape, heads, dtype):
    y, u, omega, B = made(shape, heads, dtype)
    expected = add_heads_reference(y.clone(), u, omega, B, S)
    found = add_heads(y, u, omega, B, S)
    assert found.data_ptr() == y.data_ptr(), "a copy of y was made"
    assert found.shape == expected.shape
    if shape != (0,):
        assert_close(found, expected, EXACT[dtype])


def test_gates_may_choose_and_may_hold_for_a_whole_sample():
    y, u, _, B = made((2, 5))
    chosen = torch.tensor([[[False, True, False, False]], [[True, False, False, False]]])
    expected = torch.stack([y[i] + S * u[i, :, head] @ B[:, head * R :][:, :R].T for i, head in enumerate((1, 0))])
    assert_close(add_heads(y, u, chosen, B, S), expected, EXACT[torch.float64])


def test_half_precision_rounds_the_gated_thin_side_once():
    y, u, omega, B = made((6,), dtype=torch.float32)
    found = add_heads(y.bfloat16(), u, omega, B, S)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), add_heads_reference(y, u, omega, B, S), HALF[torch.bfloat16])
    low = add_heads(y.bfloat16(), u.bfloat16(), omega, B.bfloat16(), S)  # under autocast, but for the gates
    assert_close(low.float(), add_heads_reference(y, u, omega, B, S), 2 * HALF[torch.bfloat16])


@pytest.mark.parametrize("heads", [1, N])
def test_gradients(heads):
    y, u, omega, B = made((2, 3), heads)
    tensors = tuple(tensor.requires_grad_() for tensor in (u, omega, B))
    assert torch.autograd.gradcheck(lambda u, omega, B: add_heads(y.clone(), u, omega, B, S), tensors)


def test_gates_are_a_softmax():
    x, router = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(N, 7, dtype=torch.float64)
    raw = (x @ router.T).exp()
    omega = gates(x, router)
    assert_close(omega, raw / raw.sum(-1, keepdim=True), EXACT[torch.float64])
    assert_close(omega.sum(-1), torch.ones(2, 5, dtype=torch.float64), EXACT[torch.float64])


def test_large_logits_do_not_overflow():
    omega = gates(torch.full((1, 1), 1e4), torch.tensor([[1.0], [-1.0]]))
    assert torch.equal(omega, torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gates_are_float32_whatever_the_input_and_autocast_are(dtype):
    x, router = torch.randn(5, 64).to(dtype), torch.randn(N, 64)
    expected = gates(x.float(), router)
    with torch.autocast("cpu", torch.bfloat16):
        found = gates(x, router)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert not torch.equal(found, (x @ router.to(dtype).T).softmax(-1).float()), "rounding would not show"
