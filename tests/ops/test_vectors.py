import pytest
import torch

from peftcli.ops.vectors import add_scaled, add_scaled_reference, scaled
from tests.methods.building import assert_close
from tests.tolerances import EXACT, HALF

O, R = 7, 4  # noqa: E741
SHAPES = [(), (4,), (2, 5), (0,), (2, 1, 5)]


def made(shape, dtype=torch.float64):
    """Returns y, u, b, B and d."""
    shapes = ((*shape, O), (*shape, R), (O,), (O, R), (R,))
    return tuple(torch.randn(one, dtype=dtype) for one in shapes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("tracked", [True, False])
def test_it_equals_its_reference_and_is_written_into_y(shape, dtype, tracked):
    y, u, b, B, d = made(shape, dtype)
    expected = add_scaled_reference(y.clone(), u, b, B, d)
    with torch.set_grad_enabled(tracked):
        found = add_scaled(y, u, b.requires_grad_(), B, d.requires_grad_())
    assert found.data_ptr() == y.data_ptr(), "a copy of y was made"
    assert found.shape == expected.shape
    if found.numel():
        assert_close(found, expected, EXACT[dtype])


@pytest.mark.parametrize("shape", [(5,), (2, 4), (0,)], ids=str)
@pytest.mark.parametrize("frozen", ["none", "u", "b", "d"])
def test_gradients(shape, frozen):
    y, u, b, B, d = made(shape)
    tensors = {"y": y, "u": u, "b": b, "d": d}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name != frozen)
    run = torch.autograd.gradcheck
    assert run(lambda y, u, b, d: add_scaled(y * 1, u, b, B, d), tuple(tensors.values()))


def test_rows_that_lie_apart():
    y, u, b, B, d = made((2, 5))
    u = u.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(add_scaled(y.clone(), u, b, B, d), add_scaled_reference(y, u, b, B, d), EXACT[torch.float64])


def test_a_matrix_that_trains_gets_its_gradient():
    y, u, b, B, d = made((2, 5))
    assert torch.autograd.gradcheck(lambda B: add_scaled(y * 1, u, b, B, d), (B.requires_grad_(),))


def test_nothing_of_the_matrixs_size_is_kept_but_the_matrix(kept_shapes):
    y, u, b, B, d = made((2, 5))
    found = kept_shapes(lambda: add_scaled(y, u.requires_grad_(), b.requires_grad_(), B, d.requires_grad_()))
    assert sorted(found) == sorted([(2, 5, R), (O,), (O, R), (R,)])


def test_an_output_in_another_dtype_is_added_to():
    y, u, b, B, d = made((6,), torch.float32)
    found = add_scaled(y.bfloat16(), u, b.requires_grad_(), B, d)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), add_scaled_reference(y, u, b, B, d), HALF[torch.bfloat16])


def test_under_autocast_vectors_and_their_gradients_stay_float32():
    y, u, b, B, d = made((6,), torch.float32)
    vectors = b.requires_grad_(), d.requires_grad_()
    slope = torch.randn_like(y)
    expected = torch.autograd.grad(add_scaled_reference(y, u, b, B, d), vectors, slope)
    with torch.autocast("cpu", torch.bfloat16):
        found = add_scaled(y.bfloat16(), u.bfloat16(), b, B, d)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), add_scaled_reference(y, u, b, B, d), 2 * HALF[torch.bfloat16])
    for one, other in zip(torch.autograd.grad(found, vectors, slope.bfloat16()), expected, strict=True):
        assert one.dtype == torch.float32
        assert_close(one, other, 2 * HALF[torch.bfloat16])


def test_the_matrix_that_it_is():
    _, u, b, B, d = made((5,))
    assert_close(u @ scaled(b, B, d).T, b * ((d * u) @ B.T), EXACT[torch.float64])
