"""Which module plays which role: told by name on models without weights, and shown by running them."""

from itertools import chain

import pytest
import torch
import transformers
from torch import nn

from peftcli import architectures
from peftcli.architectures import ROLES, fused_of, layers_of, modules_of, roles_of
from peftcli.errors import RecipeError
from tests.tolerances import EXACT

WIDTH = 32
SIZES = {
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 12}  # so that an attention's inside is wider than the model
T5_SIZES = {"vocab_size": 64, "d_model": WIDTH, "d_kv": 12, "d_ff": 48, "num_layers": 2, "num_heads": 4}
OPT_SIZES = {
    **{name: size for name, size in SIZES.items() if name != "intermediate_size"},
    "ffn_dim": 48,
    "word_embed_proj_dim": WIDTH,
    "max_position_embeddings": 32,
}
GPT2_SIZES = {"vocab_size": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 48}
IMAGES = {
    "image_size": 8,
    "patch_size": 4,
    **{k: v for k, v in SIZES.items() if k not in ("vocab_size", "pad_token_id")},
}

LLAMA = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "feed_forward_input": "mlp.gate_proj mlp.up_proj",
    "feed_forward_output": "mlp.down_proj",
    "feed_forward": "mlp",
    "layer_output": ".",
}
PHI = {
    **LLAMA,
    "attention_output": "self_attn.dense",
    "feed_forward_input": "mlp.fc1",
    "feed_forward_output": "mlp.fc2",
}
PHI3 = {
    **LLAMA,
    **dict.fromkeys(("query", "key", "value"), "self_attn.qkv_proj"),
    "feed_forward_input": "mlp.gate_up_proj",
}
GPT2 = {
    **dict.fromkeys(("query", "key", "value"), "attn.c_attn"),
    "attention_output": "attn.c_proj",
    "feed_forward_input": "mlp.c_fc",
    "feed_forward_output": "mlp.c_proj",
    "feed_forward": "mlp",
    "layer_output": ".",
}
NEOX = {
    **dict.fromkeys(("query", "key", "value"), "attention.query_key_value"),
    "attention_output": "attention.dense",
    "feed_forward_input": "mlp.dense_h_to_4h",
    "feed_forward_output": "mlp.dense_4h_to_h",
    "feed_forward": "mlp",
    "layer_output": ".",
}
OPT = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.out_proj",
    "feed_forward_input": "fc1",
    "feed_forward_output": "fc2",
    "layer_output": ".",
}
BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "feed_forward_input": "intermediate.dense",
    "feed_forward_output": "output.dense",
    "layer_output": "output.LayerNorm",
}
DEBERTA = {**BERT, **dict.fromkeys(("query", "key", "value"), "attention.self.in_proj")}
DEBERTA_V2 = {**BERT, **{role: f"attention.self.{role}_proj" for role in ("query", "key", "value")}}
DISTILBERT = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attention_output": "attention.out_lin",
    "feed_forward_input": "ffn.lin1",
    "feed_forward_output": "ffn.lin2",
    "feed_forward": "ffn",
    "layer_output": "output_layer_norm",
}
VIT = {
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "attention_output": "attention.o_proj",
    "feed_forward_input": "mlp.fc1",
    "feed_forward_output": "mlp.fc2",
    "feed_forward": "mlp",
    "layer_output": ".",
}


def of_layers(path, roles):
    """Returns the paths of each role in two layers; `.` is the layer itself."""
    return {
        role: [f"{path}.{i}" if name == "." else f"{path}.{i}.{name}" for i in (0, 1) for name in names.split()]
        for role, names in roles.items()
    }


def of_t5(*inputs):
    """Returns the paths of each role in a T5 of two layers on each side."""
    attentions = [
        "encoder.block.0.layer.0.SelfAttention",
        "encoder.block.1.layer.0.SelfAttention",
        "decoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.1.EncDecAttention",
        "decoder.block.1.layer.0.SelfAttention",
        "decoder.block.1.layer.1.EncDecAttention",
    ]
    lasts = ["encoder.block.0.layer.1", "encoder.block.1.layer.1", "decoder.block.0.layer.2", "decoder.block.1.layer.2"]
    return {
        "query": [f"{path}.q" for path in attentions],
        "key": [f"{path}.k" for path in attentions],
        "value": [f"{path}.v" for path in attentions],
        "attention_output": [f"{path}.o" for path in attentions],
        "feed_forward_input": [f"{last}.DenseReluDense.{name}" for last in lasts for name in inputs],
        "feed_forward_output": [f"{last}.DenseReluDense.wo" for last in lasts],
        "feed_forward": [f"{last}.DenseReluDense" for last in lasts],
        "layer_output": lasts,
    }


FAMILIES = {
    "llama": ("LlamaForCausalLM", GROUPED, of_layers("model.layers", LLAMA)),
    "llama-classifier": ("LlamaForSequenceClassification", GROUPED, of_layers("model.layers", LLAMA)),
    "llama-base": ("LlamaModel", GROUPED, of_layers("layers", LLAMA)),
    "mistral": ("MistralForCausalLM", GROUPED, of_layers("model.layers", LLAMA)),
    "qwen2": ("Qwen2ForCausalLM", {**GROUPED, "head_dim": 8}, of_layers("model.layers", LLAMA)),
    "qwen3": ("Qwen3ForCausalLM", GROUPED, of_layers("model.layers", LLAMA)),
    "gemma": ("GemmaForCausalLM", GROUPED, of_layers("model.layers", LLAMA)),
    "gemma2": ("Gemma2ForCausalLM", GROUPED, of_layers("model.layers", LLAMA)),
    "gemma3": ("Gemma3ForCausalLM", GROUPED, of_layers("model.layers", LLAMA)),
    "phi": ("PhiForCausalLM", SIZES, of_layers("model.layers", PHI)),
    "phi3": ("Phi3ForCausalLM", {**GROUPED, "head_dim": 8}, of_layers("model.layers", PHI3)),
    "gpt2": ("GPT2LMHeadModel", GPT2_SIZES, of_layers("transformer.h", GPT2)),
    "gpt2-base": ("GPT2Model", GPT2_SIZES, of_layers("h", GPT2)),
    "gpt-neox": ("GPTNeoXForCausalLM", SIZES, of_layers("gpt_neox.layers", NEOX)),
    "gpt-neox-serial": (
        "GPTNeoXForCausalLM",
        {**SIZES, "use_parallel_residual": False},
        of_layers("gpt_neox.layers", NEOX),
    ),
    "opt": ("OPTForCausalLM", OPT_SIZES, of_layers("model.decoder.layers", OPT)),
    "opt-350m": (
        "OPTForCausalLM",
        {**OPT_SIZES, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
        of_layers("model.decoder.layers", {**OPT, "layer_output": "final_layer_norm"}),
    ),
    "bert": ("BertForSequenceClassification", SIZES, of_layers("bert.encoder.layer", BERT)),
    "bert-base": ("BertModel", SIZES, of_layers("encoder.layer", BERT)),
    "bert-masked": ("BertForMaskedLM", SIZES, of_layers("bert.encoder.layer", BERT)),
    "roberta": ("RobertaForSequenceClassification", SIZES, of_layers("roberta.encoder.layer", BERT)),
    "xlm-roberta": ("XLMRobertaForTokenClassification", SIZES, of_layers("roberta.encoder.layer", BERT)),
    "camembert": ("CamembertForSequenceClassification", SIZES, of_layers("roberta.encoder.layer", BERT)),
    "electra": (
        "ElectraForSequenceClassification",
        {**SIZES, "embedding_size": 16},
        of_layers("electra.encoder.layer", BERT),
    ),
    "deberta": (
        "DebertaForSequenceClassification",
        {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        of_layers("deberta.encoder.layer", DEBERTA),
    ),
    "deberta-v3": (
        "DebertaV2ForSequenceClassification",
        {
            **SIZES,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
        },
        of_layers("deberta.encoder.layer", DEBERTA_V2),
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 64, "dim": WIDTH, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        of_layers("distilbert.transformer.layer", DISTILBERT),
    ),
    "t5": ("T5ForConditionalGeneration", T5_SIZES, of_t5("wi")),
    "t5-1.1": ("T5ForConditionalGeneration", {**T5_SIZES, "feed_forward_proj": "gated-gelu"}, of_t5("wi_0", "wi_1")),
    "mt5": ("MT5ForConditionalGeneration", T5_SIZES, of_t5("wi_0", "wi_1")),
    "umt5": ("UMT5ForConditionalGeneration", T5_SIZES, of_t5("wi_0", "wi_1")),
    "vit": ("ViTForImageClassification", IMAGES, of_layers("vit.layers", VIT)),
    "vit-base": ("ViTModel", IMAGES, of_layers("layers", VIT)),
}
POST_NORM = {
    **dict.fromkeys(("bert", "bert-base", "bert-masked", "roberta", "xlm-roberta"), "attention.output.LayerNorm"),
    **dict.fromkeys(("camembert", "electra", "deberta", "deberta-v3"), "attention.output.LayerNorm"),
    "distilbert": "sa_layer_norm",
    "opt-350m": "self_attn_layer_norm",
}
"""Families whose residual sums go through a LayerNorm: the one after the attention."""
NORMED_SUBLAYERS = {"gemma2", "gemma3"}
"""Families that add a norm of a sublayer's output to the residual stream, not the output."""


def build(class_name, sizes, device="meta"):
    model_class = getattr(transformers, class_name)
    with torch.device(device):
        return model_class(model_class.config_class(**sizes)).eval()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


# ---- by name ----


def test_each_role_is_played_by_the_modules_that_the_family_has(family):
    class_name, sizes, expected = FAMILIES[family]
    model = build(class_name, sizes)
    for role, paths in expected.items():
        assert modules_of(model, role) == paths, role
    for role in set(ROLES) - set(expected):
        with pytest.raises(RecipeError, match=f'no layers of this .* model have a known "{role}" module'):
            modules_of(model, role)


def test_no_other_module_has_a_role(family):
    class_name, sizes, expected = FAMILIES[family]
    model = build(class_name, sizes)
    roles = roles_of(model)
    assert {path: set(played) for path, played in roles.items()} == {
        path: {role for role, paths in expected.items() if path in paths} for path in chain(*expected.values())
    }
    assert list(roles) == [name for name, _ in model.named_modules() if name in roles]


def test_fused_projections_are_told(family):
    class_name, sizes, _ = FAMILIES[family]
    leaves = {path.rpartition(".")[2] for path in fused_of(build(class_name, sizes))}
    fused = {
        "phi3": {"qkv_proj", "gate_up_proj"},
        "gpt2": {"c_attn"},
        "gpt2-base": {"c_attn"},
        "gpt-neox": {"query_key_value"},
        "gpt-neox-serial": {"query_key_value"},
        "deberta": {"in_proj"},
    }
    assert leaves == fused.get(family, set())


def features(module):
    """Returns how many features a linear layer or GPT-2's Conv1D takes and gives."""
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (module.nx, module.nf)


def test_the_shapes_fit_the_roles(family):
    class_name, sizes, _ = FAMILIES[family]
    model = build(class_name, sizes)
    get = model.get_submodule
    for role in ("query", "key", "value", "feed_forward_input"):
        assert {features(get(path))[0] for path in modules_of(model, role)} == {WIDTH}, role
    for role in ("attention_output", "feed_forward_output"):
        assert {features(get(path))[1] for path in modules_of(model, role)} == {WIDTH}, role
    assert {features(get(path))[0] for path in modules_of(model, "feed_forward_output")} == {48}
    layers = 4 if "t5" in family else 2
    assert len(layers_of(model)) == layers
    assert len(modules_of(model, "feed_forward_output")) == layers
    assert len(modules_of(model, "layer_output")) == layers


def test_cross_attention_counts_as_attention():
    gpt2 = build("GPT2LMHeadModel", {**GPT2_SIZES, "add_cross_attention": True})
    first = [path for path in roles_of(gpt2) if path.startswith("transformer.h.0.crossattention")]
    assert {path.rpartition(".")[2]: roles_of(gpt2)[path] for path in first} == {
        "c_attn": ("key", "value"),
        "q_attn": ("query",),
        "c_proj": ("attention_output",),
    }
    assert "transformer.h.0.crossattention.c_attn" in fused_of(gpt2)
    assert "transformer.h.0.crossattention.q_attn" not in fused_of(gpt2)
    bert = build("BertLMHeadModel", {**SIZES, "is_decoder": True, "add_cross_attention": True})
    assert modules_of(bert, "value")[:2] == [
        "bert.encoder.layer.0.attention.self.value",
        "bert.encoder.layer.0.crossattention.self.value",
    ]
    assert modules_of(bert, "feed_forward_output") == [f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)]


def test_a_convolution_between_debertas_layers_has_no_role():
    model = build("DebertaV2ForSequenceClassification", {**SIZES, "conv_kernel_size": 3})
    assert not any(".conv." in path for path in roles_of(model))
    assert modules_of(model, "layer_output") == [f"deberta.encoder.layer.{i}.output.LayerNorm" for i in (0, 1)]


# ---- by what the modules do ----


class Recorder:
    """Keeps, by module path, each named module's first input and its output in one forward pass."""

    def __init__(self, model, paths):
        self.input, self.output = {}, {}
        for path in dict.fromkeys(paths):
            model.get_submodule(path).register_forward_hook(self._keep(path), with_kwargs=True)

    def _keep(self, path):
        def hook(_, args, kwargs, output):
            assert path not in self.output, f"{path} runs twice"
            self.input[path] = args[0] if args else kwargs["hidden_states"]
            self.output[path] = output

        return hook


def run(model):
    ids = torch.arange(3, 15).reshape(2, 6)
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    elif model.config.is_encoder_decoder:
        inputs = {"input_ids": ids, "decoder_input_ids": ids.flip(1)[:, :4]}
    else:
        inputs = {"input_ids": ids}
    with torch.no_grad():
        model(**inputs)


def alive(class_name, sizes):
    """Returns a model on the CPU whose biases and norms also have values of their own."""
    torch.manual_seed(0)
    model = build(class_name, sizes, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def within(layer, model, role):
    return [path for path in modules_of(model, role) if f"{path}.".startswith(f"{layer}.")]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=EXACT[torch.float32], atol=EXACT[torch.float32])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in NORMED_SUBLAYERS])
def test_what_the_outputs_are_added_to(family):
    """The sublayers' last projections give what the residual stream gets, and `layer_output` gives the sum."""
    class_name, sizes, _ = FAMILIES[family]
    model = alive(class_name, sizes)
    norm = POST_NORM.get(family)
    norms = [f"{layer}.{norm}" for layer in layers_of(model) if norm]
    added = modules_of(model, "attention_output") + modules_of(model, "feed_forward_output")
    seen = Recorder(model, [*layers_of(model), *added, *modules_of(model, "layer_output"), *norms])
    run(model)
    for layer in layers_of(model):
        x = seen.input[layer]
        attentions = [seen.output[path] for path in within(layer, model, "attention_output")]
        (feed_forward,) = (seen.output[path].view_as(x) for path in within(layer, model, "feed_forward_output"))
        (end,) = within(layer, model, "layer_output")
        if norm:
            (attention,) = attentions
            close(seen.input[f"{layer}.{norm}"], x + attention)
            close(seen.input[end].view_as(x), seen.output[f"{layer}.{norm}"] + feed_forward)
        else:
            close(seen.output[end], x + sum(attentions) + feed_forward)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in POST_NORM])
def test_sublayers_without_their_outputs_contribute_nothing(family):
    class_name, sizes, _ = FAMILIES[family]
    model = alive(class_name, sizes)
    for path in modules_of(model, "attention_output") + modules_of(model, "feed_forward_output"):
        model.get_submodule(path).register_forward_hook(lambda _module, _args, output: torch.zeros_like(output))
    seen = Recorder(model, [*layers_of(model), *modules_of(model, "layer_output")])
    run(model)
    for layer in layers_of(model):
        (end,) = within(layer, model, "layer_output")
        assert torch.equal(seen.output[end], seen.input[layer])


def test_a_layers_output_is_a_tensor_that_the_next_layer_gets(family):
    class_name, sizes, _ = FAMILIES[family]
    model = alive(class_name, sizes)
    seen = Recorder(model, [*layers_of(model), *modules_of(model, "layer_output")])
    run(model)
    for layer in layers_of(model):
        if layer.endswith(".0"):
            (end,) = within(layer, model, "layer_output")
            assert torch.equal(seen.output[end].view_as(seen.input[layer]), seen.input[layer[:-1] + "1"])


def test_a_feed_forwards_projections_stand_at_its_ends(family):
    class_name, sizes, expected = FAMILIES[family]
    model = alive(class_name, sizes)
    names = [role for role in expected if role.startswith("feed_forward")]
    seen = Recorder(model, [path for role in names for path in modules_of(model, role)])
    run(model)
    for layer in layers_of(model):
        readers = [seen.input[path] for path in within(layer, model, "feed_forward_input")]
        (output,) = within(layer, model, "feed_forward_output")
        assert all(torch.equal(x, readers[0]) for x in readers)
        for whole in within(layer, model, "feed_forward") if "feed_forward" in expected else ():
            assert torch.equal(seen.input[whole], readers[0])
            assert torch.equal(seen.output[whole], seen.output[output])


# ---- model types that have no facts of their own ----


def tree(*paths):
    """Returns a module that holds a linear layer, or what stands under it, at each path."""
    root = nn.Module()
    for path in paths:
        holder = root
        *parents, leaf = path.split(".")
        for name in parents:
            if name not in holder._modules:
                holder.add_module(name, nn.Module())
            holder = holder._modules[name]
        holder.add_module(leaf, nn.Identity())
    return root


ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def llama_like(*extra, layers=2):
    parts = ("input_layernorm", *ATTENTION, *GATED, *extra)
    return tree("embed", *(f"net.blocks.{i}.{part}" for i in range(layers) for part in parts), "head.0.q_proj")


def refused(model, role):
    with pytest.raises(RecipeError) as caught:
        modules_of(model, role)
    (problem,) = caught.value.problems
    return problem


def test_llamas_names_mean_the_same_in_any_model():
    assert {role: modules_of(llama_like(), role) for role in ROLES} == of_layers("net.blocks", LLAMA)
    assert list(layers_of(llama_like())) == ["net.blocks.0", "net.blocks.1"]
    assert fused_of(llama_like()) == set()


def test_a_transformers_model_of_an_unknown_type():
    assert "smollm3" not in architectures.ARCHITECTURES
    model = build("SmolLM3ForCausalLM", GROUPED)
    assert {role: modules_of(model, role) for role in ROLES} == of_layers("model.layers", LLAMA)


def test_barts_cross_attention_is_not_forgotten():
    sizes = {"vocab_size": 64, "d_model": WIDTH, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0}
    sizes |= {f"{side}_{count}": 2 for side in ("encoder", "decoder") for count in ("layers", "attention_heads")}
    model = build("BartModel", sizes)
    assert modules_of(model, "value")[2:4] == [
        "decoder.layers.0.self_attn.v_proj",
        "decoder.layers.0.encoder_attn.v_proj",
    ]
    assert refused(model, "layer_output")  # it ends with a norm, unlike OPT's, whose names are the same


@pytest.mark.parametrize(("class_name", "sizes"), [("BloomModel", {"n_head": 4, "n_layer": 2}), ("MambaModel", {})])
def test_a_type_without_known_names(class_name, sizes):
    model = build(class_name, {"vocab_size": 64, "hidden_size": WIDTH, **sizes})
    kind = model.config.model_type
    assert roles_of(model) == {}
    for role in ROLES:
        problem = refused(model, role)
        assert problem.message == (
            f'method.target_modules: no layers of this {kind} model have a known "{role}" module'
        )
        assert problem.hint == "name the modules in method.target_modules"


def test_a_module_that_is_no_transformers_model():
    message = refused(tree("0.linear", "1.linear"), "key").message
    assert message == 'method.target_modules: no layers of this Module model have a known "key" module'


def test_the_error_names_the_roles_that_are_known():
    model = build("BertModel", SIZES)
    problem = refused(model, "feed_forward")
    assert problem.message == 'method.target_modules: no layers of this bert model have a known "feed_forward" module'
    assert problem.hint == (
        "name the modules in method.target_modules; known here: query, key, value, attention_output, "
        "feed_forward_input, feed_forward_output, layer_output"
    )


def test_a_role_that_only_some_layers_have_is_refused():
    dense_then_experts = tree(
        *(f"layers.{i}.{part}" for i in range(3) for part in ("input_layernorm", *ATTENTION)),
        *(f"layers.0.{part}" for part in GATED),
    )
    assert len(modules_of(dense_then_experts, "query")) == 3
    problem = refused(dense_then_experts, "feed_forward_output")
    assert 'only 1 of the 3 layers of this Module model have a known "feed_forward_output" module' in problem.message
    assert "feed_forward_output" not in problem.hint
    hybrid = tree(*(f"layers.1.{part}" for part in ATTENTION), "layers.0.mixer.in_proj", "layers.2.mixer.in_proj")
    assert "only 1 of the 3 layers" in refused(hybrid, "key").message


def test_half_an_attention_is_none():
    assert roles_of(tree(*(f"layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "kvo"))) == {}


def test_where_a_layer_ends_is_not_guessed():
    without_its_first_norm = tree(*(f"layers.{i}.{part}" for i in (0, 1) for part in (*ATTENTION, *GATED)))
    assert refused(without_its_first_norm, "layer_output")
    assert modules_of(without_its_first_norm, "feed_forward") == ["layers.0.mlp", "layers.1.mlp"]


def test_what_an_adapter_adds_to_the_tree_has_no_role():
    model = llama_like("adapter.A", "self_attn.q_proj.adapter.A", "mlp.adapter.down")
    assert roles_of(model) == roles_of(llama_like())
