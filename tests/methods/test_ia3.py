import copy
import json

import pytest
import torch
from pydantic import ValidationError

from peftcli import inject
from peftcli.checkpoint.adapter import CONFIG_FILE, adapter_tensors, attach, read_adapter, save_adapter
from peftcli.errors import RecipeError
from peftcli.methods.ia3 import IA3
from tests.methods.building import (
    Holder,
    adapt,
    adapted_holder,
    assert_close,
    config_for,
    inputs,
    logits,
    origin_of,
    randomise,
    trainable,
)
from tests.methods.side_by_side import assert_same_outputs_and_input_gradients
from tests.tolerances import EXACT

FP64 = EXACT[torch.float64]
FP32 = EXACT[torch.float32]
KINDS = ("linear", "conv1d")
SCALED = {"outputs": {}, "inputs": {"feedforward_modules": ["target"]}}
PAPER = ["k_proj", "v_proj", "down_proj"]

pytestmark = pytest.mark.filterwarnings(
    "ignore:::peft", "ignore::FutureWarning:transformers", "ignore:.*target_modules. with tied.*:UserWarning"
)

of_each_kind = pytest.mark.parametrize("kind", KINDS)
scaling_each_side = pytest.mark.parametrize("scaled", SCALED)


def made(kind, scaled, dtype=torch.float64, **changes):
    holder = adapted_holder("ia3", kind, dtype, **SCALED[scaled], **changes)
    return holder, holder.target.adapter.l


# ---- the closed form ----


@of_each_kind
@scaling_each_side
def test_the_output_is_that_of_the_dense_weight(kind, scaled):
    holder, vector = made(kind, scaled)
    x, diagonal = inputs(kind, torch.float64), torch.diag(vector.detach())
    if scaled == "outputs":
        assert vector.shape == (40,)
        W, b = diagonal @ holder.W, diagonal @ holder.b
    else:
        assert vector.shape == (24,)
        W, b = holder.W @ diagonal, holder.b
    assert_close(holder(x), holder.plain(x, W, b), FP64)
    assert_close(holder.target.adapter.merged(holder.W), W, FP64)
    assert_close(holder.target.adapter.merged_bias(holder.b), b, FP64)


@of_each_kind
@scaling_each_side
def test_the_gradients_are_those_of_the_formula(kind, scaled):
    holder, vector = made(kind, scaled)
    x = inputs(kind, torch.float64).requires_grad_()
    y = holder(x)
    g = torch.randn_like(y)
    y.backward(g)
    with torch.no_grad():
        if scaled == "outputs":
            assert_close(vector.grad, (g * holder.plain(x, holder.W)).sum((0, 1)), FP64)
            assert_close(x.grad, (g * vector) @ holder.W, FP64)
        else:
            assert_close(vector.grad, (x * (g @ holder.W)).sum((0, 1)), FP64)
            assert_close(x.grad, (g @ holder.W) * vector, FP64)


@scaling_each_side
def test_gradcheck(scaled):
    holder, vector = made("linear", scaled)
    x = inputs("linear", torch.float64, length=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, _: holder(x), (x, vector), fast_mode=True)


@scaling_each_side
def test_a_vector_of_zeros_leaves_what_the_paper_says(scaled):
    """Where the output is scaled the bias goes too; no merge may divide by l."""
    holder, vector = made("linear", scaled)
    with torch.no_grad():
        vector.zero_()
    x = inputs("linear", torch.float64)
    expected = torch.zeros(40, dtype=torch.float64) if scaled == "outputs" else holder.b
    assert_close(holder(x), expected.expand(3, 7, 40), FP64)
    assert not holder.target.adapter.merged(holder.W).any()
    assert_close(holder.target.adapter.merged_bias(holder.b), expected, FP64)


@scaling_each_side
def test_in_half_precision_a_product_is_rounded_once(scaled):
    holder = Holder("linear", torch.bfloat16)
    adapt(holder, "ia3", **SCALED[scaled])
    randomise(holder)
    vector, x = holder.target.adapter.l, inputs("linear", torch.bfloat16)
    W, b = holder.target.weight, holder.target.bias
    if scaled == "outputs":
        expected = (torch.nn.functional.linear(x, W, b).float() * vector).bfloat16()
    else:
        expected = torch.nn.functional.linear((x.float() * vector).bfloat16(), W, b)
    assert torch.equal(holder(x), expected)
    assert torch.equal(
        holder.target.adapter.merged_bias(b), (b.float() * vector).bfloat16() if scaled == "outputs" else b
    )


# ---- where it goes ----


def test_auto_is_the_papers_placement(make_model):
    model = make_model()
    adapt(model, "ia3", "auto")
    found = {path.removeprefix("model.layers."): a.scales_inputs for path, a in inject.adapters(model).items()}
    assert found == {
        f"{layer}.{name}": name == "mlp.down_proj"
        for layer in (0, 1)
        for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    assert sum(parameter.numel() for parameter in trainable(model).values()) == 2 * (24 + 24 + 80)


def test_auto_is_what_a_recipe_has_that_says_nothing():
    assert IA3.Config.model_validate({"type": "ia3"}).target_modules == "auto"


def test_berts_attention_output_is_no_feed_forward():
    from transformers import AutoModelForSequenceClassification, BertConfig

    tiny = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForSequenceClassification.from_config(BertConfig(**tiny, vocab_size=64))
    adapt(model, "ia3", "auto")
    found = {path.removeprefix("bert.encoder.layer."): a.scales_inputs for path, a in inject.adapters(model).items()}
    assert found == {
        f"{layer}.{name}": name == "output.dense"
        for layer in (0, 1)
        for name in ("attention.self.key", "attention.self.value", "output.dense")
    }


FUSED = {"gpt2": "attn.c_attn", "gpt_neox": "query_key_value", "phi3": "qkv_proj"}


@pytest.mark.parametrize(("family", "name"), FUSED.items())
def test_auto_refuses_projections_in_one_and_says_why(family, name, make_model):
    from transformers import AutoConfig, AutoModelForCausalLM

    if family == "gpt2":
        model = make_model(family)
    else:
        tiny = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **tiny, vocab_size=64, pad_token_id=0))
    before = list(model.state_dict())
    with pytest.raises(RecipeError) as raised:
        adapt(model, "ia3", "auto")
    message = raised.value.problems[0].message
    assert message.startswith("method.target_modules: auto scales keys and values alone, but ")
    assert f"{name} (48 × 144) is key, query, value in one" in message
    assert list(model.state_dict()) == before
    _, sites = adapt(model, "ia3", [name])  # named, it is scaled whole
    adapter = inject.adapters(model)[sites[0].name]
    assert (adapter.scales_inputs, adapter.l.shape) == (False, (144,))


def test_feedforward_modules_decide_instead_of_the_roles(make_model):
    def inputs_scaled(**fields):
        model = make_model()
        adapt(model, "ia3", ["down_proj", "v_proj"], **fields)
        return {path.removeprefix("model.layers.") for path, a in inject.adapters(model).items() if a.scales_inputs}

    assert inputs_scaled() == {"0.mlp.down_proj", "1.mlp.down_proj"}
    assert inputs_scaled(feedforward_modules=[]) == set()
    assert inputs_scaled(feedforward_modules=["v_proj"]) == {"0.self_attn.v_proj", "1.self_attn.v_proj"}
    assert inputs_scaled(feedforward_modules=["1.mlp.down_proj"]) == {"1.mlp.down_proj"}
    assert inputs_scaled(feedforward_modules=r".*\.0\.(mlp|self_attn)\..*") == {"0.mlp.down_proj", "0.self_attn.v_proj"}


def test_what_feedforward_modules_name_must_be_there(make_model):
    with pytest.raises(RecipeError) as raised:
        adapt(make_model(), "ia3", PAPER, feedforward_modules=["down_proj", "wn_proj", "q_proj"])
    assert [problem.message for problem in raised.value.problems] == [
        "method.feedforward_modules: wn_proj matches none of the adapted modules",  # a name is no mere substring
        "method.feedforward_modules: q_proj matches none of the adapted modules",
    ]
    with pytest.raises(RecipeError, match="v_proj matches none of the adapted modules"):
        adapt(make_model(), "ia3", PAPER, feedforward_modules="v_proj")  # one string is a pattern for the whole path
    with pytest.raises(ValidationError, match="not a regular expression"):
        config_for("ia3", feedforward_modules="(down_proj")


def test_embeddings_are_refused(make_model):
    with pytest.raises(RecipeError, match="matches only Embedding, which cannot be adapted"):
        adapt(make_model(), "ia3", ["embed_tokens"])


# ---- PEFT ----


def peft_twin(model, targets, feedforward):
    """Returns a copy of `model` that PEFT adapts, at its start."""
    from peft import IA3Config, get_peft_model

    settings = IA3Config(target_modules=targets, feedforward_modules=feedforward, task_type="CAUSAL_LM")
    return get_peft_model(copy.deepcopy(model), settings).eval()


def peft_vectors(twin):
    return {
        name.removesuffix(".default"): parameter for name, parameter in twin.named_parameters() if ".ia3_l." in name
    }


PLACES = {
    "llama": ("llama", PAPER, ["down_proj"]),
    "llama, all outputs": ("llama", [*PAPER, "q_proj", "lm_head"], []),
    "llama, all inputs": ("llama", [*PAPER, "q_proj"], [*PAPER, "q_proj"]),
    "gpt2": ("gpt2", ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
}
at_each_place = pytest.mark.parametrize(("family", "targets", "feedforward"), PLACES.values(), ids=PLACES)


@at_each_place
def test_outputs_gradients_and_merged_weights_are_pefts(family, targets, feedforward, make_model, ids):
    model = make_model(family, torch.float64)
    twin = peft_twin(model, targets, feedforward)
    _, sites = adapt(model, "ia3", targets, feedforward_modules=feedforward)
    model.double()
    randomise(model)
    tensors, theirs = adapter_tensors(model), peft_vectors(twin)
    assert {key: t.shape for key, t in tensors.items()} == {key: t.shape for key, t in theirs.items()}
    with torch.no_grad():
        for key, tensor in tensors.items():
            theirs[key].copy_(tensor)
    assert_close(logits(model, ids), logits(twin, ids), FP64)
    for site in sites:
        ours, its_twin = model.get_submodule(site.name), twin.get_submodule(f"base_model.model.{site.name}")
        assert_same_outputs_and_input_gradients(ours, its_twin, site.in_features)
        gradient = theirs[f"base_model.model.{site.name}.ia3_l"].grad
        assert gradient.any()
        assert_close(ours.adapter.l.grad, gradient.flatten(), FP64)
    plain = twin.merge_and_unload()
    for site in sites:
        module, adapter = plain.get_submodule(site.name), inject.adapters(model)[site.name]
        stored = module.weight if site.kind == "linear" else module.weight.t()
        assert_close(adapter.merged(site.dense()), stored.detach(), FP64)
        if module.bias is not None:
            assert_close(adapter.merged_bias(model.get_submodule(site.name).bias), module.bias.detach(), FP64)


OURS = {
    "auto": ("llama", "auto", {}),
    "a feed-forward by its whole path": (
        "llama",
        ["down_proj", "v_proj"],
        {"feedforward_modules": ["1.mlp.down_proj"]},
    ),
    "none": ("llama", ["q_proj", "down_proj"], {"feedforward_modules": []}),
    "gpt2, one of two of the same name": ("gpt2", ["c_attn", "c_proj"], {}),
    "all-linear": ("gpt2", "all-linear", {}),
}


@pytest.mark.parametrize(("family", "targets", "fields"), OURS.values(), ids=OURS)
def test_peft_loads_what_we_write(family, targets, fields, make_model, ids, tmp_path):
    from peft import PeftModel

    model = make_model(family)
    base = logits(model, ids)
    config, sites = adapt(model, "ia3", targets, **fields)
    randomise(model)
    save_adapter(tmp_path, model, origin_of("ia3", config, base_model=""))
    theirs = PeftModel.from_pretrained(make_model(family), tmp_path).eval()
    adapted = {key.removesuffix(".ia3_l").removeprefix("base_model.model.") for key in peft_vectors(theirs)}
    assert adapted == {site.name for site in sites}
    assert_close(logits(theirs, ids), logits(model, ids), FP32)
    assert not torch.allclose(logits(model, ids), base)


@at_each_place
def test_we_load_what_peft_writes(family, targets, feedforward, make_model, ids, tmp_path):
    theirs = peft_twin(make_model(family), targets, feedforward)
    with torch.no_grad():
        for vector in peft_vectors(theirs).values():
            vector.add_(0.3 * torch.randn_like(vector))
    theirs.save_pretrained(tmp_path)
    model = make_model(family)
    attach(model, read_adapter(tmp_path))
    assert_close(logits(model, ids), logits(theirs, ids), FP32)
    assert not torch.allclose(logits(model, ids), logits(make_model(family), ids))


def test_a_file_that_leaves_the_placement_open_is_refused():
    with pytest.raises(ValueError, match="feedforward_modules: null leaves open"):
        IA3.config_from_peft({"feedforward_modules": None})
    with pytest.raises(KeyError):
        IA3.config_from_peft({})


def test_the_file_says_where_inputs_are_scaled(make_model, tmp_path):
    def written(family, targets, **fields):
        model = make_model(family)
        config, _ = adapt(model, "ia3", targets, **fields)
        save_adapter(tmp_path, model, origin_of("ia3", config))
        return json.loads((tmp_path / CONFIG_FILE).read_text())["feedforward_modules"]

    assert written("llama", "auto") == r"(.*\.)?(down_proj)"
    assert written("llama", ["v_proj"]) == []
    whole = r"(transformer\.h\.0\.mlp\.c_proj|transformer\.h\.1\.mlp\.c_proj)"
    assert written("gpt2", ["c_proj"]) == whole  # attn.c_proj ends alike
