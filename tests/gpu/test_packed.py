"""Packed layers on a GPU: bitsandbytes has kernels of their own for it, which no test on a CPU runs."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peftcli import quantization
from peftcli.quantization.layers import pack_4_bits
from peftcli.recipe import QuantizationSection
from tests.gpu.conftest import DEVICE, needs_cuda
from tests.methods.building import adapt, assert_close, int8_product, loss_of, token_ids, trainable
from tests.test_quantization import dense_twin
from tests.tolerances import EXACT, HALF, INT8_INPUTS, PACKED_ELSEWHERE

pytestmark = needs_cuda
IN, OUT = 128, 192
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BY_DTYPE = {torch.float32: EXACT[torch.float32], **HALF}
FOUR_BITS = {
    "nf4": QuantizationSection(),
    "fp4": QuantizationSection(type="fp4"),
    "single": QuantizationSection(double_quant=False),
}
each_section = pytest.mark.parametrize("section", FOUR_BITS.values(), ids=FOUR_BITS.keys())
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def layer_of(section, dtype=torch.float32):
    """Returns a packed layer on the device that computes in `dtype`, and the dense weight [O, I] it stands for."""
    section = section.model_copy(update={"compute_dtype": str(dtype).removeprefix("torch.")})
    model = nn.Sequential(nn.Linear(IN, OUT)).requires_grad_(False)
    quantization.quantize(model, section, device=DEVICE)
    return model[0], quantization.unpacked(model[0])


def inputs(*shape, dtype=torch.float32):
    return torch.randn(*shape, IN).to(DEVICE, dtype)


@each_section
@each_dtype
@pytest.mark.parametrize("shape", [(1,), (3, 5), (64,)], ids=["one row", "few rows", "many rows"])
def test_forward_and_backward_are_a_dense_layers(shape, dtype, section):
    """A single row and several take different kernels; so does a pass without gradients."""
    layer, W = layer_of(section, dtype)
    assert W.dtype == dtype
    x = inputs(*shape, dtype=dtype).requires_grad_()
    y = layer(x)
    expected = F.linear(x.detach().double(), W.double(), layer.bias.double())
    assert_close(y.double(), expected, BY_DTYPE[dtype])
    with torch.no_grad():
        assert_close(layer(x).double(), expected, BY_DTYPE[dtype])
    slope = torch.randn_like(y)
    y.backward(slope)
    assert_close(x.grad.double(), slope.double() @ W.double(), BY_DTYPE[dtype])
    assert layer.weight.grad is None


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_int8_is_the_papers_product(threshold, training):
    """On a GPU the inputs are rounded in training too; the gradient is that of the unrounded product."""
    layer, W = layer_of(QuantizationSection(type="int8", outlier_threshold=threshold))
    layer.train(training)
    x = inputs(6)
    x[2, 7] = 9.0  # an outlier
    x.requires_grad_()
    y = layer(x)
    if DEVICE.type == "cuda" or not training:
        expected = int8_product(x.detach().cpu(), W.cpu(), layer.bias.detach().cpu(), threshold)
        assert_close(y.detach().cpu().float(), expected, HALF[torch.float16])
    assert_close(y, F.linear(x.detach(), W, layer.bias), INT8_INPUTS if threshold else 5 * INT8_INPUTS)
    slope = torch.randn_like(y)
    y.backward(slope)
    assert_close(x.grad, slope @ W, HALF[torch.float16])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_adapted_models_have_a_dense_ones_gradients(name, kind, make_model):
    model = make_model()
    quantization.quantize(model, QuantizationSection(type=kind, compute_dtype="float32"), {"lm_head"}, DEVICE)
    model.to(DEVICE)
    twin = dense_twin(model, make_model).to(DEVICE)
    ids, found = token_ids().to(DEVICE), []
    for one in (model, twin):
        adapt(one, name, "all-linear")
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in trainable(one).values():
                parameter.add_(0.1 * torch.randn(parameter.shape).to(DEVICE))
        found.append((loss_of(one.train(), ids), {key: p.grad for key, p in trainable(one).items()}))
    (loss, gradients), (expected_loss, expected) = found
    assert_close(loss, expected_loss, EXACT[torch.float32])
    for key, gradient in expected.items():
        assert_close(gradients[key], gradient, 10 * EXACT[torch.float32])


@each_section
@each_dtype
def test_packed_here_is_packed_on_the_cpu(dtype, section):
    """A merge packs the original weights on a CPU, wherever the run has packed them.

    A weight just between two values may become either, so bytes may differ. What may not: that the two stand for
    different weights on the whole, or that one of them is further from the original.
    """
    weight = 0.02 * torch.randn(512, 768).to(dtype)
    there = pack_4_bits(weight, section, torch.device("cpu"))
    here = pack_4_bits(copy.deepcopy(weight).to(DEVICE), section, DEVICE)
    same = (here.data.cpu().flatten() == there.data.flatten()).float().mean()
    one, other = (quantization.weights._unpack_4_bits(packed).cpu().double() for packed in (here, there))
    moved = float((one - other).norm() / other.norm())
    lost = [float((found - weight.double()).norm() / weight.double().norm()) for found in (one, other)]
    assert float(same) >= 1 - PACKED_ELSEWHERE
    assert moved <= PACKED_ELSEWHERE
    assert lost[0] == pytest.approx(lost[1], rel=PACKED_ELSEWHERE)


def test_int8_packed_here_is_packed_on_the_cpu():
    from peftcli.quantization.layers import pack_8_bits

    weight = 0.02 * torch.randn(512, 768)
    here, there = (pack_8_bits(weight, device) for device in (DEVICE, torch.device("cpu")))
    assert_close(here.SCB.cpu(), there.SCB, EXACT[torch.float32])
    differ = (here.data.cpu().int() - there.data.int()).abs()
    assert int(differ.max()) <= 1
    assert float(differ.float().mean()) <= PACKED_ELSEWHERE
