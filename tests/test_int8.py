"""A base held in int8: what is packed, what it computes with rounded inputs, and what it stands for."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peftcli import inject, manifest, methods, quantization, sites, targets
from peftcli.errors import ModelError
from peftcli.recipe import QuantizationSection
from tests.methods.building import (
    IN,
    OUT,
    adapt,
    assert_close,
    int8_product,
    logits,
    loss_of,
    rounded_rows,
    token_ids,
    trainable,
)
from tests.tolerances import INT8_CONSTANT, INT8_INPUTS, PACKED

INT8 = QuantizationSection(type="int8")
LARGE = 20.0


def layer_of(linear, threshold=6.0):
    model = nn.Sequential(linear)
    quantization.quantize(model, QuantizationSection(type="int8", outlier_threshold=threshold))
    return model[0]


@pytest.fixture
def linear():
    return nn.Linear(IN, OUT)


def test_a_weight_is_rounded_row_by_row(linear):
    layer = layer_of(linear)
    packed, scales = rounded_rows(linear.weight.detach())
    assert layer.weight.dtype == torch.int8
    assert torch.equal(layer.weight.float(), packed)
    assert_close(quantization.unpacked(layer), packed * scales / 127, PACKED)
    assert_close(quantization.unpacked(layer), linear.weight, 0.5 / 127 + 1e-3)  # half a step, and float16's rounding


@pytest.mark.parametrize("threshold", [0.0, 1.5, 6.0])
@pytest.mark.parametrize("outlier", [False, True])
def test_in_evaluation_it_is_the_papers_product(threshold, outlier, linear):
    layer = layer_of(linear, threshold).eval()
    x = torch.randn(7, IN)
    if outlier:
        x[2, 5] = LARGE
    expected = int8_product(x, linear.weight.detach(), linear.bias.detach(), threshold)
    found = layer(x)
    assert_close(found, expected, INT8_CONSTANT)
    plain = F.linear(x, quantization.unpacked(layer), linear.bias)
    assert not torch.allclose(found, plain, rtol=0, atol=1e-4), "no input was rounded"
    if not outlier:  # a row with one has no digits left for the rest where it is rounded too
        assert_close(found, plain, INT8_INPUTS)
    assert torch.equal(layer(x[None]), found[None])


def test_an_outlier_is_why_there_is_a_threshold(linear):
    x = torch.randn(7, IN)
    x[:, 5] = LARGE
    errors = []
    for threshold in (0.0, 6.0):
        layer = layer_of(linear, threshold).eval()
        errors.append(float((layer(x) - F.linear(x, quantization.unpacked(layer), linear.bias)).detach().abs().max()))
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_gradients_are_those_of_the_dequantised_weight_in_both_modes(training, linear):
    layer = layer_of(linear).train(training)
    x, g = torch.randn(3, 7, IN, requires_grad=True), torch.randn(3, 7, OUT)
    layer(x).backward(g)
    assert_close(x.grad, g @ quantization.unpacked(layer), PACKED)
    assert layer.weight.grad is None


def test_in_training_on_a_cpu_inputs_are_not_rounded(linear):
    layer, x = layer_of(linear).train(), torch.randn(7, IN)
    plain = F.linear(x, quantization.unpacked(layer), linear.bias)
    assert_close(layer(x), plain, PACKED)
    layer.eval()
    with quantization.unrounded_inputs(layer):
        assert_close(layer(x), plain, PACKED)
    assert not layer.training


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["lora", "dora", "vera"])
def test_adapted_it_has_the_gradients_of_a_dense_model_and_no_byte_changes(name, training, make_model):
    model, twin = make_model(), make_model()
    assert quantization.quantize(model, INT8, targets.always_dense(model)) == 14
    packed = {path: module for path, module in model.named_modules() if quantization.is_int8(module)}
    with torch.no_grad():
        for path, module in packed.items():
            twin.get_submodule(path).weight.copy_(quantization.unpacked(module))
    before = {path: (module.weight.clone(), module.state.SCB.clone()) for path, module in packed.items()}
    ids, found = token_ids(), []
    for one in (model, twin):
        adapt(one, name, "all-linear")
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in trainable(one).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        one.train(training)
        with quantization.unrounded_inputs(one):
            found.append((loss_of(one, ids), {key: p.grad for key, p in trainable(one).items()}))
    assert_close(found[0][0], found[1][0], PACKED)
    for key, gradient in found[1][1].items():
        assert_close(found[0][1][key], gradient, 10 * PACKED)  # through two layers
    for path, module in packed.items():
        assert torch.equal(module.weight, before[path][0])
        assert torch.equal(module.state.SCB, before[path][1])
        assert module.state.CB.data_ptr() == module.weight.data_ptr(), "the weight is held twice"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_what_a_method_projects_is_no_activation_to_round(training, linear):
    layer = layer_of(linear).train(training)
    A = torch.randn(4, IN, requires_grad=True)
    projected = sites.as_base(layer, layer.forward).project(A)
    assert_close(projected, quantization.unpacked(layer) @ A.T, PACKED)
    assert torch.autograd.grad(projected.sum(), A)[0].any()


def test_what_a_weight_becomes_is_what_the_layer_holds(linear):
    weight = linear.weight.detach().clone()
    found = quantization.Packing(INT8, (), torch.float32).of(weight)
    assert torch.equal(found, sites.dense_weight(layer_of(linear), "linear"))


def test_it_counts_as_what_it_stands_for(make_model):
    dense, model = make_model(), make_model()
    quantization.quantize(model, INT8, targets.always_dense(model))
    assert quantization.packed_share(model) > 0.5
    for one in (dense, model):
        adapt(one, "lora", "all-linear")
    assert manifest.parameter_counts(model) == manifest.parameter_counts(dense)


def test_it_is_copied_and_moved_whole(make_model):
    model = make_model()
    quantization.quantize(model, INT8, targets.always_dense(model))
    ids = token_ids()
    expected = logits(model, ids)
    twin = copy.deepcopy(model).to("cpu")
    assert torch.equal(logits(twin, ids), expected)
    with torch.no_grad():
        twin.model.layers[0].mlp.up_proj.state.SCB.mul_(2)
    assert torch.equal(logits(model, ids), expected)


def test_no_product_warns_of_what_is_meant_so(linear, caplog):
    with caplog.at_level(logging.WARNING):
        layer_of(linear).eval()(torch.randn(2, IN))
    assert not caplog.records


def test_nothing_lets_its_weight_train(make_model):
    model = make_model()
    quantization.quantize(model, INT8, targets.always_dense(model))
    with pytest.raises(ModelError, match="what is packed cannot train"):
        inject.graft(model, methods.load("full"), methods.load("full").Config(), 0)


@pytest.mark.parametrize(
    ("dtype", "precision", "exact"),
    [(torch.float32, "no", True), (torch.float32, "bf16", False), (torch.bfloat16, "no", False)],
)
def test_a_bias_that_trains_needs_inputs_in_float32(dtype, precision, exact, make_model):
    """An int8 layer casts its bias for good to what its inputs come in."""
    model = make_model(dtype=dtype)
    quantization.quantize(model, INT8, targets.always_dense(model))
    adapt(model, "bitfit")
    inject.widen_trained(model)
    if exact:
        quantization.require_exact_biases(model, precision)
    else:
        with pytest.raises(ModelError, match=r"quantization\.type: .*bias trains, and int8 would round"):
            quantization.require_exact_biases(model, precision)
