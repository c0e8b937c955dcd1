import pytest
import torch

from peftcli.ops.bottleneck import ACTIVATIONS, bottleneck, bottleneck_reference
from tests.methods.building import assert_close
from tests.tolerances import EXACT, HALF

I, M, O = 24, 5, 40  # noqa: E741


def weights(dtype=torch.float64):
    shapes = (M, I), (M,), (O, M), (O,)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("sigma", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_it_equals_its_reference(sigma, scale, dtype):
    h, (D, b_D, U, b_U) = torch.randn(3, 7, I, dtype=dtype), weights(dtype)
    found = bottleneck(h, D, b_D, U, b_U, sigma, scale)
    assert_close(found, bottleneck_reference(h, D, b_D, U, b_U, sigma, scale), EXACT[dtype])
    without = bottleneck(h, D, None, U, None, sigma, scale)
    assert_close(without, bottleneck_reference(h, D, 0 * b_D, U, 0 * b_U, sigma, scale), EXACT[dtype])


def test_the_activations_are_those_of_their_names():
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    written = {
        "gelu": x * (1 + torch.erf(x / 2**0.5)) / 2,
        "relu": x.clamp_min(0),
        "tanh": (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
        "swish": x / (1 + (-x).exp()),
    }
    assert set(ACTIVATIONS) == set(written)
    for name, expected in written.items():
        assert_close(ACTIVATIONS[name](x), expected, EXACT[torch.float64])


def test_it_computes_in_the_weights_precision():
    h, (D, b_D, U, b_U) = torch.randn(3, I).bfloat16(), weights(torch.float32)
    found = bottleneck(h, D, b_D, U, b_U, torch.tanh, 2.0)
    assert found.dtype == torch.float32
    assert_close(found, bottleneck_reference(h.float(), D, b_D, U, b_U, torch.tanh, 2.0), EXACT[torch.float32])
    with torch.autocast("cpu", torch.bfloat16):
        half = bottleneck(h, D, b_D, U, b_U, torch.tanh, 2.0)
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), found, HALF[torch.bfloat16])


def test_gradcheck():
    tensors = [torch.randn(2, I, dtype=torch.float64), *weights()]
    for tensor in tensors:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: bottleneck(*given, torch.tanh, 3.0), tensors, fast_mode=True)
