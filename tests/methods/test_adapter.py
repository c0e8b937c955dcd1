import json
import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from peftcli import inject, methods
from peftcli.checkpoint.adapter import attach, read_adapter, save_adapter
from peftcli.methods._place import Base
from peftcli.methods.adapter import Adapter, AdapterConfig
from peftcli.ops.bottleneck import ACTIVATIONS, bottleneck_reference
from peftcli.ops.dropout import dropout
from peftcli.sites import make_site
from tests.methods.building import (
    IN,
    OUT,
    Holder,
    adapt,
    adapted_holder,
    assert_close,
    inputs,
    logits,
    origin_of,
    randomise,
    trainable,
)
from tests.tolerances import EXACT, HALF, STANDARD_ERRORS

FP64 = EXACT[torch.float64]
WITH_INPUTS = ("linear", "conv1d")
VARIANTS = ("houlsby", "pfeiffer", "parallel", "series")
LINEAR = [
    pytest.param({"variant": "houlsby"}, id="houlsby"),
    pytest.param({"variant": "series"}, id="series"),
    pytest.param({"variant": "series", "input_modules": ["target"]}, id="series-input"),
    pytest.param({"variant": "parallel"}, id="parallel"),
]
"""The fields of every placement on a linear layer."""
WIDTH, HEADS, INNER = 24, 2, 40
NEAR = 1e-4
"""How far a start of deviation 1e-3 may be from the base: D and U change a state by about their product."""


def make_bert(dtype=torch.float64, **changes):
    from transformers import BertConfig, BertModel

    fields = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_hidden_layers": 2, **changes}
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": INNER, "vocab_size": 128}
    torch.manual_seed(7)
    model = BertModel(BertConfig(**sizes, **fields, attn_implementation="eager"), add_pooling_layer=False)
    randomise_norms(model)
    return model.to(dtype).eval()


@torch.no_grad()
def randomise_norms(model):
    """Moves the norms off 1 and 0, where a wrong one could pass for a right one."""
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() or "ln_" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))


def grafted(model, variant, **fields):
    """Grafts an adapter at the places of its paper, as wide as the model, with random tensors."""
    adapt(model, "adapter", "auto", variant=variant, **fields)
    for adapter in inject.adapters(model).values():
        adapter.to(next(model.parameters()).dtype)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def written(adapter, h, sigma):
    """Returns `f(h)` as the papers write it."""
    zero = torch.zeros(1, dtype=h.dtype)
    b_D, b_U = (zero if bias is None else bias.detach() for bias in (adapter.b_D, adapter.b_U))
    return bottleneck_reference(h, adapter.D.detach(), b_D, adapter.U.detach(), b_U, sigma, adapter.scale)


# ---- the closed forms ----


@pytest.mark.parametrize("kind", WITH_INPUTS)
@pytest.mark.parametrize(("variant", "sigma", "bias"), [("houlsby", F.gelu, True), ("series", torch.tanh, False)])
def test_after_a_linear_layer(kind, variant, sigma, bias):
    holder = adapted_holder("adapter", kind, variant=variant)
    adapter, x = holder.target.adapter, inputs(kind, torch.float64)
    assert (adapter.D.shape, adapter.U.shape) == ((4, OUT), (OUT, 4))
    assert (adapter.b_D is not None) == (adapter.b_U is not None) == bias
    assert adapter.scale == 1
    z = holder.plain(x, holder.W)
    assert_close(holder(x), z + written(adapter, z, sigma), FP64)


@pytest.mark.parametrize("kind", WITH_INPUTS)
def test_before_a_linear_layer(kind):
    holder = adapted_holder("adapter", kind, variant="series", input_modules=["target"], scale=1.5)
    adapter, x = holder.target.adapter, inputs(kind, torch.float64)
    assert (adapter.D.shape, adapter.U.shape) == ((4, IN), (IN, 4))
    assert_close(holder(x), holder.plain(x + written(adapter, x, torch.tanh), holder.W), FP64)


@pytest.mark.parametrize("kind", WITH_INPUTS)
@pytest.mark.parametrize("bias", [None, True])
def test_beside_a_linear_layer(kind, bias):
    holder = adapted_holder("adapter", kind, variant="parallel", bias=bias, activation="swish", scale=0.5)
    adapter, x = holder.target.adapter, inputs(kind, torch.float64)
    assert (adapter.D.shape, adapter.U.shape) == ((4, IN), (OUT, 4))
    assert (adapter.b_D is not None) == bool(bias)
    assert_close(holder(x), holder.plain(x, holder.W) + written(adapter, x, F.silu), FP64)


@pytest.mark.parametrize("kind", WITH_INPUTS)
def test_the_gradients_are_those_of_the_formula(kind):
    holder = adapted_holder("adapter", kind, activation="tanh", scale=1.5)
    adapter, s = holder.target.adapter, 1.5
    D, b_D, U, b_U = adapter.D, adapter.b_D, adapter.U, adapter.b_U
    x = inputs(kind, torch.float64).requires_grad_()
    y = holder(x)
    g = torch.randn_like(y)
    y.backward(g)
    with torch.no_grad():
        z_TO, g_TO = holder.plain(x, holder.W).flatten(0, 1), g.flatten(0, 1)
        a_TM = torch.tanh(z_TO @ D.T + b_D)
        p_TM = s * (g_TO @ U) * (1 - a_TM**2)
        assert_close(U.grad, s * g_TO.T @ a_TM, FP64)
        assert_close(b_U.grad, s * g_TO.sum(0), FP64)
        assert_close(D.grad, p_TM.T @ z_TO, FP64)
        assert_close(b_D.grad, p_TM.sum(0), FP64)
        assert_close(x.grad.flatten(0, 1), (g_TO + p_TM @ D) @ holder.W, FP64)


@pytest.mark.parametrize("fields", LINEAR)
def test_gradcheck(fields):
    holder = adapted_holder("adapter", activation="tanh", **fields)
    x = inputs("linear", torch.float64, length=2).requires_grad_()
    tensors = list(holder.target.adapter.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: holder(x), (x, *tensors), fast_mode=True)


def test_parallel_without_its_nonlinearity_is_lora():
    one, other = adapted_holder("adapter", variant="parallel", scale=1.5), adapted_holder("lora", alpha=6.0)
    adapter, lora = one.target.adapter, other.target.adapter
    other.load_state_dict({**one.state_dict(), "target.adapter.A": adapter.D, "target.adapter.B": adapter.U}, False)
    adapter.sigma = nn.Identity()
    x = inputs("linear", torch.float64)
    assert_close(one(x), other(x), FP64)
    one(x).square().sum().backward()
    other(x).square().sum().backward()
    assert_close(adapter.D.grad, lora.A.grad, FP64)
    assert_close(adapter.U.grad, lora.B.grad, FP64)


@pytest.mark.parametrize("fields", LINEAR)
def test_dropout_acts_on_the_bottlenecks_input_alone(fields):
    holder = adapted_holder("adapter", dropout=0.4, **fields).train()
    adapter, x = holder.target.adapter, inputs("linear", torch.float64)
    sigma = F.gelu if fields["variant"] == "houlsby" else torch.tanh
    after = adapter.where == "after"
    z = holder.plain(x, holder.W)
    torch.manual_seed(3)
    dropped = dropout(z if after else x, 0.4)
    assert not torch.equal(dropped, z if after else x)
    added = written(adapter, dropped, sigma)
    torch.manual_seed(3)
    assert_close(holder(x), holder.plain(x + added, holder.W) if adapter.where == "before" else z + added, FP64)


# ---- whole models ----


def bert_layer(layer, x, *, attention=lambda z: z, feed_forward=lambda z: z, end=None):
    """Returns what a BERT layer gives, written out; `attention` and `feed_forward` change what those give.

    `end(s, norm)` is what comes of the last sum `s`; the norm of it unless given.
    """
    weights = dict(layer.named_parameters())

    def linear(path, h):
        return F.linear(h, weights[f"{path}.weight"], weights[f"{path}.bias"])

    def norm(path, h):
        centred = h - h.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
        return weights[f"{path}.LayerNorm.weight"] * centred / deviation + weights[f"{path}.LayerNorm.bias"]

    def heads(h):
        return h.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    q, k, v = (heads(linear(f"attention.self.{name}", x)) for name in ("query", "key", "value"))
    scores = (q @ k.mT / math.sqrt(WIDTH / HEADS)).softmax(-1)
    context = (scores @ v).transpose(1, 2).flatten(2)
    a = norm("attention.output", attention(linear("attention.output.dense", context)) + x)
    z = feed_forward(linear("output.dense", F.gelu(linear("intermediate.dense", a))))
    return norm("output", z + a) if end is None else end(z + a, lambda h: norm("output", h))


@torch.no_grad()
def test_houlsby_in_a_bert_layer_written_out():
    """`x ← LN(x + Adp(SubLayer(x)))` for both sublayers, the adapter's own residual included."""
    model = grafted(make_bert(), "houlsby")
    paths = [f"encoder.layer.{i}.{part}.dense" for i in (0, 1) for part in ("attention.output", "output")]
    assert list(inject.adapters(model)) == paths
    for layer in model.encoder.layer:
        x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
        one, other = layer.attention.output.dense.adapter, layer.output.dense.adapter
        expected = bert_layer(
            layer,
            x,
            attention=lambda z, adapter=one: z + written(adapter, z, F.gelu),
            feed_forward=lambda z, adapter=other: z + written(adapter, z, F.gelu),
        )
        assert_close(layer(x), expected, FP64)


@torch.no_grad()
def test_pfeiffer_in_a_bert_layer_written_out():
    """`h = LN(z + x); y = LN(z + U σ(D h) + x)`: the same norm twice, and the adapter's residual before the first."""
    model = grafted(make_bert(), "pfeiffer")
    assert list(inject.adapters(model)) == [f"encoder.layer.{i}.output.LayerNorm" for i in (0, 1)]
    for layer in model.encoder.layer:
        x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
        adapter = layer.output.LayerNorm.adapter
        expected = bert_layer(layer, x, end=lambda s, norm, a=adapter: norm(s + written(a, norm(s), F.relu)))
        assert_close(layer(x), expected, FP64)
        with_zero_up = bert_layer(layer, x)
        adapter.U.zero_()
        adapter.b_U.zero_()
        assert_close(layer(x), with_zero_up, FP64)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("variant", "sigma"), [("pfeiffer", F.relu), ("parallel", F.relu), ("series", torch.tanh)])
def test_in_a_pre_norm_model_it_changes_what_the_paper_says(family, variant, sigma, make_model, ids):
    """Against the plain model, whose layers' outputs are changed by hooks."""
    model, plain = make_model(family, torch.float64), make_model(family, torch.float64)
    grafted(model, variant)
    layer = {"llama": "model.layers.{}", "gpt2": "transformer.h.{}"}[family]
    output = {"llama": "mlp.down_proj", "gpt2": "mlp.c_proj"}[family]
    path = layer + {"pfeiffer": "", "parallel": ".mlp", "series": f".{output}"}[variant]
    assert list(inject.adapters(model)) == [path.format(i) for i in (0, 1)]
    for name, adapter in inject.adapters(model).items():
        assert adapter.scale == (4 if variant == "parallel" else 1)

        def add(module, arguments, y, adapter=adapter):
            return y + written(adapter, arguments[0] if variant == "parallel" else y, sigma)

        plain.get_submodule(name).register_forward_hook(add)
    assert_close(logits(model, ids), logits(plain, ids), FP64)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_with_u_at_zero_the_model_is_its_base_bit_for_bit(variant, family, make_model, ids):
    model = make_model(family)
    expected = logits(model, ids)
    adapt(model, "adapter", "auto", variant=variant, init="zero-up")
    assert torch.equal(logits(model, ids), expected)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for adapter in inject.adapters(model).values():
        assert adapter.U.grad.any()  # and it can leave that start


def test_houlsby_starts_near_its_base_but_not_at_it(make_model, ids):
    model = make_model()
    expected = logits(model, ids)
    adapt(model, "adapter", "auto")
    found = logits(model, ids)
    assert not torch.equal(found, expected)
    assert_close(found, expected, NEAR)
    away = make_model()
    adapt(away, "adapter", "auto", init_std=0.3)
    with pytest.raises(AssertionError):
        assert_close(logits(away, ids), expected, 100 * NEAR)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_checkpointing_gives_the_same_gradients(variant, make_model, ids):
    model = grafted(make_model().train(), variant, dropout=0.3)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: parameter.grad for name, parameter in trainable(model).items()})
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_without_a_break_it_equals_eager(variant, make_model, ids):
    model = grafted(make_model("gpt2"), variant)
    layer = model.transformer.h[0]
    x = torch.randn(2, 9, 48)
    expected = layer(x)
    torch._dynamo.reset()
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected, EXACT[torch.float32])


# ---- modules of all sorts ----


class Pair(nn.Module):
    """A module that returns its states and something else, called as transformers calls attentions: by name."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, hidden_states, mask=None):
        return self.linear(hidden_states), mask


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_module_may_return_a_tuple_and_be_called_by_name(variant):
    module = Pair()
    site = make_site("block", module, width=WIDTH)
    assert (site.kind, site.in_features, site.normalises) == ("module", WIDTH, False)
    config = AdapterConfig.model_validate({"variant": variant, "bottleneck_size": 4})
    assert Adapter.check(config, [site]) == []
    adapter = Adapter(config, site, 0).double()
    adapter.U.normal_()
    base = Base("module", module.forward, None, None, None)
    x, mask = torch.randn(2, 5, WIDTH, dtype=torch.float64), object()
    y, kept = adapter(base, hidden_states=x, mask=mask)
    assert kept is mask
    z = module.linear(x)
    sigma = ACTIVATIONS[{"houlsby": "gelu", "series": "tanh"}.get(variant, "relu")]
    assert_close(y, z + written(adapter, x if variant == "parallel" else z, sigma), FP64)
    assert torch.equal(adapter(base, x, mask)[0], y)


def test_a_named_module_is_adapted(make_model, ids):
    model = make_model()
    _, sites = adapt(model, "adapter", ["self_attn", "mlp"], variant="houlsby", init_std=0.3)
    assert {site.name.rpartition(".")[2] for site in sites} == {"self_attn", "mlp"}
    assert {site.kind for site in sites} == {"module"}
    logits(model, ids)


@pytest.mark.parametrize("fields", LINEAR)
def test_a_half_precision_base_gets_its_own_dtype_from_a_float32_adapter(fields):
    holder = Holder("linear", torch.bfloat16).eval()
    adapt(holder, "adapter", **fields)
    randomise(holder)
    adapter, x = holder.target.adapter, inputs("linear", torch.bfloat16)
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    found = holder(x)
    assert found.dtype == torch.bfloat16
    wide = adapted_holder("adapter", **fields)
    wide.load_state_dict({name: tensor.double() for name, tensor in holder.state_dict().items()})
    assert_close(found.double(), wide(x.double()), HALF[torch.bfloat16])


# ---- the starts ----


def start(variant, kind="linear", **fields):
    """Returns `D` and `U` of a large site as they start, and their biases."""
    module = nn.Linear(700, 700) if kind == "linear" else nn.LayerNorm(700) if kind == "norm" else Pair()
    site = make_site("target", module, width=700)
    adapter = Adapter(AdapterConfig.model_validate({"variant": variant, **fields}), site, 0)
    for bias in (adapter.b_D, adapter.b_U):
        assert bias is None or not bias.any()
    return adapter.D.detach(), adapter.U.detach()


def assert_deviation(weight, deviation, kurtosis=3.0):
    """Holds the mean and the variance of `weight` against their sampling errors."""
    n, x = weight.numel(), weight.double() / deviation
    assert abs(x.mean()) <= STANDARD_ERRORS / math.sqrt(n)
    assert abs(x.square().mean() - 1) <= STANDARD_ERRORS * math.sqrt((kurtosis - 1) / n)


def test_houlsby_starts_from_a_truncated_normal():
    deviation = 0.8796  # of a normal of deviation 1 that is cut off at two
    for weight in start("houlsby"):
        assert weight.abs().max() <= 2e-3
        assert weight.abs().max() > 1.99e-3
        assert_deviation(weight, deviation * 1e-3, kurtosis=2.4)


@pytest.mark.parametrize(("variant", "kind"), [("pfeiffer", "norm"), ("series", "linear"), ("parallel", "linear")])
def test_the_others_start_from_a_normal(variant, kind):
    for weight in start(variant, kind):
        assert_deviation(weight, 0.02)
        assert weight.abs().max() > 0.07, "this is not a normal distribution"


@pytest.mark.parametrize(
    ("variant", "kind", "fields"),
    [("parallel", "module", {}), ("houlsby", "linear", {"init": "zero-up"}), ("series", "linear", {"init": "zero-up"})],
)
def test_zero_up_is_as_lora_starts(variant, kind, fields):
    D, U = start(variant, kind, **fields)
    assert not U.any()
    assert D.abs().max() <= 1 / math.sqrt(700)
    assert_deviation(D, 1 / math.sqrt(3 * 700), kurtosis=1.8)
    D, U = start(variant, kind, init_std=0.5, **fields)
    assert not U.any()
    assert 0.4 < D.std() < 0.6


@pytest.mark.parametrize("variant", ["houlsby", "series"])
def test_the_starts_deviation_can_be_chosen(variant):
    for weight in start(variant, init_std=0.5):
        assert 0.4 < weight.std() < 0.6


def test_nothing_is_drawn_on_the_meta_device():
    with torch.device("meta"):
        module = nn.Linear(5, 3)
    adapter = Adapter(AdapterConfig(), make_site("target", module), 0)
    assert {parameter.device.type for parameter in adapter.parameters()} == {"meta"}
    assert (adapter.D.shape, adapter.b_D.shape, adapter.U.shape, adapter.b_U.shape) == ((64, 3), (64,), (3, 64), (3,))


# ---- the LayerNorms ----


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["input_layernorm", "post_attention_layernorm", "norm"]),
        ({"layer_norms": "none"}, []),
        ({"layer_norms": []}, []),
        ({"layer_norms": ["input_layernorm"]}, ["input_layernorm"]),
        ({"layer_norms": ["layers.1.input_layernorm", "model.norm"]}, ["input_layernorm", "norm"]),
        ({"variant": "series"}, []),
        ({"variant": "pfeiffer"}, []),
        ({"variant": "parallel"}, []),
        ({"variant": "series", "layer_norms": "all"}, ["input_layernorm", "post_attention_layernorm", "norm"]),
        ({"layers": [1]}, ["input_layernorm", "post_attention_layernorm"]),
    ],
    ids=str,
)
def test_which_norms_train(fields, expected, make_model, ids):
    model = make_model()
    config, _ = adapt(model, "adapter", "auto", **fields)
    assert Adapter.check_model(config, model) == []
    trained = inject.trained_base(model)
    assert list(dict.fromkeys(name.split(".")[-2] for name in trained)) == expected
    if "layers" in fields:
        assert {name.split(".")[2] for name in trained} == {"1"}
    if fields.get("layer_norms") == ["layers.1.input_layernorm", "model.norm"]:
        assert list(trained) == ["model.layers.1.input_layernorm.weight", "model.norm.weight"]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad.any() for parameter in trained.values())


def test_a_norm_that_is_not_there_is_named(make_model):
    config = AdapterConfig.model_validate({"layer_norms": ["ln_2", "ln_3", "mlp"]})
    assert Adapter.check_model(config, make_model("gpt2")) == [
        'layer_norms: no LayerNorm is called "ln_3"; the model has ln_1, ln_2, ln_f',
        'layer_norms: no LayerNorm is called "mlp"; the model has ln_1, ln_2, ln_f',
    ]


def test_an_adapted_norm_can_train_as_well():
    model = make_bert(torch.float32)
    adapt(model, "adapter", "auto", variant="pfeiffer", layer_norms=["output.LayerNorm"])
    assert len(inject.trained_base(model)) == 2 * 2 * 2  # weight and bias of both norms of both layers


# ---- published counts ----


def counted(architecture, sizes, fields):
    import transformers

    config = getattr(transformers, f"{architecture}Config")(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, f"{architecture}Model")(config)
    config = AdapterConfig.model_validate({"type": "adapter", **fields})
    assert Adapter.check_model(config, model) == []
    inject.graft(model, methods.load("adapter"), config, 0)
    return sum(parameter.numel() for parameter in trainable(model).values())


BERT_LARGE = {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
GPT2_MEDIUM = {"n_layer": 24, "n_embd": 1024, "n_head": 16}
GPT2_LARGE = {"n_layer": 36, "n_embd": 1280, "n_head": 20}
GPT3 = {"n_layer": 96, "n_embd": 12288, "n_head": 96}
ADAPTER_L = {"target_modules": ["mlp.c_proj"], "layer_norms": ["ln_2"]}
"""Lin et al. 2020: one adapter and one trained LayerNorm a layer, after the feed-forward alone."""


@pytest.mark.parametrize(
    ("architecture", "sizes", "fields", "count"),
    [
        ("Roberta", BERT_LARGE, {"bottleneck_size": 8, "layer_norms": "none"}, 835_968),
        ("Bert", BERT_LARGE, {"bottleneck_size": 8, "layer_norms": "none"}, 835_968),
        ("Bert", BERT_LARGE, {"bottleneck_size": 64, "layer_norms": ["output.LayerNorm"]}, 6_441_984),
        ("Bert", BERT_LARGE, {"bottleneck_size": 64}, 6_441_984 + 2 * 1024),  # with that of the embeddings
        ("GPT2", GPT2_MEDIUM, {"bottleneck_size": 6, **ADAPTER_L}, 368_784),
        ("GPT2", GPT2_MEDIUM, {"bottleneck_size": 224, **ADAPTER_L}, 11_089_152),
        ("GPT2", GPT2_LARGE, {"bottleneck_size": 8, **ADAPTER_L}, 875_808),
        ("GPT2", GPT3, {"bottleneck_size": 1, "layer_norms": "none"}, 7_078_080),
        ("GPT2", GPT3, {"bottleneck_size": 8, "layer_norms": "none"}, 40_109_568),
        ("Llama", {}, {"variant": "series", "bottleneck_size": 256}, 67_108_864),
        (
            "Llama",
            {},
            {"variant": "parallel", "bottleneck_size": 256, "target_modules": ["up_proj", "down_proj"]},
            247_463_936,
        ),
    ],
)
def test_published_counts(architecture, sizes, fields, count):
    assert counted(architecture, sizes, fields) == count


# ---- what is refused, and files ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bottleneck_size": 0}, "bottleneck_size"),
        ({"scale": 0.0}, "scale"),
        ({"scale": -1.0}, "scale"),
        ({"dropout": 1.0}, "dropout"),
        ({"init_std": 0.0}, "init_std"),
        ({"init": "zeros"}, "init"),
        ({"activation": "mish"}, "activation"),
        ({"variant": "compacter"}, "variant"),
        ({"input_modules": ["up_proj"]}, "input_modules: a houlsby adapter never goes before a module"),
        ({"variant": "parallel", "input_modules": ["up_proj"]}, "input_modules: a parallel adapter never goes"),
    ],
    ids=str,
)
def test_impossible_fields(fields, message):
    with pytest.raises(ValidationError, match=message):
        AdapterConfig.model_validate({"type": "adapter", **fields})


@pytest.mark.parametrize(
    ("variant", "fields", "module", "message"),
    [
        ("houlsby", {}, nn.Embedding(9, 4), "target_modules: x.place is an embedding, which has no hidden state"),
        ("pfeiffer", {}, nn.Linear(4, 4), "target_modules: x.place is one linear layer; pfeiffer adapts"),
        ("parallel", {}, nn.LayerNorm(4), "target_modules: x.place is a LayerNorm; parallel goes beside"),
        ("parallel", {}, nn.RMSNorm(4), "target_modules: x.place is a LayerNorm; parallel goes beside"),
        ("series", {"input_modules": ["place"]}, Pair(), "target_modules: x.place is no linear layer; only those"),
        ("series", {"input_modules": ["plac"]}, nn.Linear(4, 4), 'input_modules: "plac" is none of the target'),
        ("houlsby", {}, nn.Dropout(), "target_modules: x.place has a width that is not known"),
    ],
)
def test_impossible_places(variant, fields, module, message):
    config = AdapterConfig.model_validate({"variant": variant, **fields})
    width = WIDTH if isinstance(module, Pair) else 0
    found = Adapter.check(config, [make_site("x.place", module, width=width), make_site("y", module, width=width)])
    assert len([problem for problem in found if "target_modules" in problem]) <= 1, "one example says it"
    assert any(problem.startswith(message) for problem in found), found


def test_nonlinear_adapters_do_not_merge():
    assert "nonlinearity" in Adapter.unmergeable(AdapterConfig())
    assert Adapter.not_low_rank(AdapterConfig())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"variant": "pfeiffer", "layer_norms": "all", "layers": [0, 3]},
        {"variant": "series", "input_modules": ["up_proj"], "bias": True, "activation": "swish", "scale": 2.0},
        {"variant": "parallel", "init": "zero-up", "init_std": 0.1, "dropout": 0.2, "bottleneck_size": 7},
        {"layer_norms": ["ln_2"], "bias": False},
    ],
    ids=str,
)
def test_the_file_says_every_field(fields):
    config = AdapterConfig.model_validate({"type": "adapter", **fields})
    on_file = json.loads(json.dumps({"bias": "none", "target_modules": ["x"], **Adapter.peft_config(config)}))
    again = Adapter.config_from_peft(on_file).model_copy(update={"layers": on_file["layers_to_transform"]})
    assert again == config
    with pytest.raises(KeyError):
        Adapter.config_from_peft({"bottleneck_size": 256, "non_linearity": "tanh"})  # LLM-Adapters' own file


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_and_loaded_gives_the_same_logits_bit_for_bit(variant, make_model, ids, tmp_path):
    model = make_model()
    config, _ = adapt(model, "adapter", "auto", variant=variant, layers=[1], layer_norms="all")
    randomise(model)
    save_adapter(tmp_path, model, origin_of("adapter", config))
    again = make_model()
    attach(again, read_adapter(tmp_path))
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert set(trainable(again)) == set(trainable(model))
