"""A base held in 4 bits: what is packed, what it computes, and what it stands for."""

import pytest
import torch
from torch import nn

from peftcli import manifest, models, quantization, sites, targets
from peftcli.errors import ModelError, RecipeError
from peftcli.recipe import QuantizationSection
from tests.families import save_family
from tests.methods.building import adapt, assert_close, logits, loss_of, packed, token_ids, trainable
from tests.tolerances import PACKED

NF4 = QuantizationSection()
SECTIONS = [NF4, QuantizationSection(type="fp4"), QuantizationSection(double_quant=False)]
each_section = pytest.mark.parametrize("section", SECTIONS, ids=["nf4", "fp4", "single"])
each_storage = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])


def quantise(model, section=NF4):
    return quantization.quantize(model, section, targets.always_dense(model))


def packed_layers(model):
    return {name: module for name, module in model.named_modules() if quantization.is_quantised(module)}


def dense_twin(model, make_model):
    """Returns a dense model that holds what the packed layers of `model` stand for."""
    twin = make_model()
    with torch.no_grad():
        for name, module in packed_layers(model).items():
            twin.get_submodule(name).weight.copy_(quantization.unpacked(module))
    return twin


@each_section
def test_a_packed_model_is_a_dense_one_of_the_dequantised_weights(section, make_model):
    model = make_model()
    ids = token_ids()
    plain = logits(model, ids)
    assert quantise(model, section) == 14
    twin = dense_twin(model, make_model)
    assert_close(logits(model, ids), logits(twin, ids), PACKED)
    assert not torch.allclose(logits(model, ids), plain, atol=1e-3), "nothing was rounded"


@pytest.mark.parametrize("name", ["lora", "dora", "vera"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_adapted_it_has_the_same_gradients_too(name, training, make_model):
    model = make_model()
    quantise(model)
    twin = dense_twin(model, make_model)
    before = {path: module.weight.detach().clone() for path, module in packed_layers(model).items()}
    ids, found = token_ids(), []
    for one in (model, twin):
        adapt(one, name, "all-linear")
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in trainable(one).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        found.append((loss_of(one.train(training), ids), {key: p.grad for key, p in trainable(one).items()}))
    assert_close(found[0][0], found[1][0], PACKED)
    for key, gradient in found[1][1].items():
        assert_close(found[0][1][key], gradient, 10 * PACKED)  # through two layers
    assert all(torch.equal(module.weight, before[path]) for path, module in packed_layers(model).items())


def test_it_packs_as_bitsandbytes_does(make_model):
    model = make_model()
    expected = packed(model.model.layers[0].mlp.up_proj)
    quantise(model)
    found = model.model.layers[0].mlp.up_proj
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.bias, expected.bias)
    assert torch.equal(quantization.unpacked(found), quantization.unpacked(expected))
    assert found.weight.numel() * 2 == found.in_features * found.out_features


def test_heads_and_what_is_kept_stay_dense(make_model):
    model = make_model()
    keep = targets.always_dense(model, ["layers.0.mlp"])
    assert quantization.quantize(model, NF4, keep) == 11
    dense = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert dense == {"lm_head", *(f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down"))}


@pytest.mark.parametrize(
    ("family", "task", "dense"),
    [
        ("t5", "seq2seq-lm", {"wo", "lm_head"}),  # T5 casts to the dtype of wo's weight
        ("bert", "sequence-classification", {"classifier"}),
        ("vit", "image-classification", {"classifier"}),
    ],
)
def test_in_other_families(family, task, dense, tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(save_family(family, tmp_path))
    model = models.skeleton(config, task)
    chosen = quantization.packable(model, targets.always_dense(model))
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert {name.rpartition(".")[2] for name in set(linear) - set(chosen)} == dense
    assert chosen


def test_a_model_without_linear_layers(make_model):
    with pytest.raises(ModelError, match="no linear layers to hold in nf4"):
        quantise(make_model("gpt2"))


def test_the_dense_weights_are_let_go(make_model):
    import gc
    import weakref

    model = make_model()
    watched = [weakref.ref(module.weight) for module in model.modules() if type(module) is nn.Linear][:-1]
    quantise(model)
    gc.collect()
    assert not any(one() is not None for one in watched)


def test_a_packed_weight_counts_as_what_it_stands_for(make_model):
    dense, model = make_model(), make_model()
    quantise(model)
    for one in (dense, model):
        adapt(one, "lora", "all-linear")
    assert manifest.parameter_counts(model) == manifest.parameter_counts(dense)


@each_section
def test_what_a_weight_becomes_is_what_the_layer_holds(section, make_model):
    model = make_model()
    weight = model.model.layers[1].self_attn.k_proj.weight.detach().clone()
    quantise(model, section)
    found = quantization.Packing(section, (), torch.float32).of(weight)
    assert torch.equal(found, sites.dense_weight(model.model.layers[1].self_attn.k_proj, "linear"))


@pytest.mark.parametrize(("wanted", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_computation_is_in_the_dtype_asked_for(wanted, expected, make_model):
    """On a CPU bitsandbytes would compute in bfloat16 in evaluation mode; `auto` is float32 there."""
    model = make_model().eval()
    quantise(model, QuantizationSection(compute_dtype=wanted))
    layer = model.model.layers[0].mlp.up_proj
    assert layer.compute_dtype == expected
    x = torch.randn(3, layer.in_features)
    plain = nn.functional.linear(x, quantization.unpacked(layer).float(), layer.bias)
    with torch.no_grad():
        exact = torch.allclose(layer(x), plain, rtol=0, atol=1e-6)
    assert exact == (expected == torch.float32)


def test_a_bias_that_trains_needs_float32(make_model):
    model = make_model()
    quantise(model, QuantizationSection(compute_dtype="bfloat16"))
    quantization.require_exact_biases(model.requires_grad_(False))
    adapt(model, "bitfit")
    with pytest.raises(ModelError, match=r"quantization\.compute_dtype: .*bias trains, and bfloat16"):
        quantization.require_exact_biases(model)


def test_what_a_layer_stands_for_has_the_precision_that_it_computes_in():
    """A base in bfloat16 that computes in float32 would else have gradients, and a merge, of rounded weights."""
    model = nn.Sequential(nn.Linear(24, 40).bfloat16())
    quantization.quantize(model, NF4)
    x = torch.randn(5, 24, requires_grad=True)
    y = model(x)
    y.square().sum().backward()
    W = quantization.unpacked(model[0])
    assert_close(y, nn.functional.linear(x, W, model[0].bias), PACKED)
    assert_close(x.grad, 2 * y.detach() @ W, PACKED)


# ---- the same bytes in another guise ----


@each_storage
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_in_whatever_dtype_the_bytes_are_held_the_numbers_are_the_same(dtype, training, name, make_model):
    ids, found = token_ids(), []
    for storage in ("uint8", dtype):
        model = make_model()
        quantise(model, QuantizationSection(storage_dtype=storage))
        adapt(model, name, "all-linear")
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in trainable(model).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
        loss = loss_of(model.train(training), ids)
        gradients = {key: parameter.grad for key, parameter in trainable(model).items()}
        weight = model.model.layers[0].mlp.up_proj.weight
        assert weight.dtype == getattr(torch, storage)
        found.append((weight.detach().view(torch.uint8).flatten(), loss, gradients))
    (first, loss, gradients), (second, other_loss, other_gradients) = found
    assert torch.equal(first, second)
    assert torch.equal(loss, other_loss)
    assert all(torch.equal(gradients[key], other_gradients[key]) for key in gradients)


@each_storage
def test_the_guise_changes_no_count_and_no_merge(dtype, make_model):
    section = QuantizationSection(storage_dtype=dtype)
    dense, model = make_model(), make_model()
    weight = dense.model.layers[1].self_attn.k_proj.weight.detach()
    quantise(model, section)
    for one in (dense, model):
        adapt(one, "lora", "all-linear")
    assert manifest.parameter_counts(model) == manifest.parameter_counts(dense)
    packing = quantization.Packing(section, (), torch.float32)
    assert torch.equal(packing.of(weight), quantization.unpacked(model.model.layers[1].self_attn.k_proj))


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
def test_nothing_lets_a_packed_weight_train(storage, make_model):
    """With floating-point storage torch itself would: `requires_grad_(True)` is accepted without a word."""
    from peftcli import inject, methods
    from tests.methods.building import config_for

    model = make_model()
    quantise(model, QuantizationSection(storage_dtype=storage))
    for name, trained in (("lora", ["layers.0.mlp.up_proj"]), ("full", [])):
        with pytest.raises(ModelError, match=r"\.weight is packed, and what is packed cannot train"):
            inject.graft(model, methods.load(name), config_for(name, "q_proj"), 0, trained)
        inject.ungraft(model)
        assert not any(module.weight.requires_grad for module in packed_layers(model).values())


# ---- what stays dense ----


def kept(model, wanted):
    from peftcli.run.packing import packed_paths

    every = set(packed_paths(model, NF4))
    return every - set(packed_paths(model, QuantizationSection(skip_modules=wanted)))


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        ("q_proj", 2),
        (["q_proj", "layers.1.mlp.down_proj"], 3),
        (["layers.0"], 7),
        ("layers.1.mlp", 3),
        (r".*\.(0|1)\.mlp\.(up|down)_proj", 4),
        (["lm_head"], 0),  # as it is anyway
    ],
)
def test_layers_to_skip_have_the_forms_of_target_modules(wanted, count, make_model):
    assert len(kept(make_model(), wanted)) == count


@pytest.mark.parametrize(
    ("wanted", "message", "hint"),
    [
        (["q_porj"], 'no linear layer matches "q_porj"', 'did you mean "q_proj"'),
        (["q_proj", "embed_tokens", "zzz"], 'no linear layer matches "embed_tokens"', "linear layers are"),
        ("layers.(0", "is not a regular expression", None),
        (["layer"], 'no linear layer matches "layer"', "down_proj"),  # a part of a name is no name
    ],
)
def test_a_name_that_skips_nothing_is_an_error(wanted, message, hint, make_model):
    with pytest.raises(RecipeError, match=r"quantization\.skip_modules: ") as caught:
        kept(make_model(), wanted)
    problem = caught.value.problems[0]
    assert message in problem.message
    assert hint is None or hint in problem.hint
    assert len(caught.value.problems) == (2 if len(wanted) == 3 else 1)


def tiny_switch():
    from transformers import SwitchTransformersConfig

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_experts": 3}
    return SwitchTransformersConfig(**sizes, vocab_size=64, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)


def tiny_experts(family):
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoConfig.for_model(
        family, **sizes, vocab_size=64, moe_intermediate_size=48, shared_expert_intermediate_size=48
    )


@pytest.mark.parametrize(
    ("make", "task", "routers"),
    [
        (tiny_switch, "seq2seq-lm", {"classifier"}),
        (lambda: tiny_experts("qwen2_moe"), "causal-lm", {"shared_expert_gate"}),
        (lambda: tiny_experts("mixtral"), "causal-lm", set()),  # its router is no linear layer
        (lambda: tiny_experts("jetmoe"), "causal-lm", {"layer"}),  # no `experts` beside it
    ],
    ids=["switch", "qwen2_moe", "mixtral", "jetmoe"],
)
def test_routers_stay_dense(make, task, routers):
    model = models.skeleton(make(), task)
    found = targets.routers(model)
    assert {name.rpartition(".")[2] for name in found} == routers
    assert not found & set(quantization.packable(model, targets.always_dense(model)))
    assert not any("_proj" in name for name in found)


def test_the_share_of_the_weights_that_is_packed(make_model):
    model = make_model()
    quantise(model)
    dense = make_model()
    sizes = {name: parameter.numel() for name, parameter in dense.named_parameters()}
    inside = sum(size for name, size in sizes.items() if name.endswith("_proj.weight"))
    assert quantization.packed_share(model) == pytest.approx(inside / sum(sizes.values()))
