import pytest
import torch
from torch import nn

from peftcli import inject, methods, models, sites, targets
from peftcli.errors import ModelError, RecipeError
from peftcli.methods._protocol import Targets
from tests.conftest import tiny_gpt2_config, tiny_llama_config
from tests.methods.building import Holder, adapt, logits, token_ids, trainable


@pytest.fixture
def ids():
    return token_ids()


LEAVES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LISTING = (
    "the model has embed_tokens (1), q_proj (2), k_proj (2), v_proj (2), o_proj (2), gate_proj (2), up_proj (2), "
    "down_proj (2), lm_head (1)"
)


def skeleton(family="llama", **changes):
    """Returns a model without weights: choosing targets needs none."""
    return models.skeleton((tiny_llama_config if family == "llama" else tiny_gpt2_config)(**changes))


def chosen(model, **fields):
    return [site.name for site in targets.find_sites(model, methods.load("lora"), Targets(**fields))]


def leaves(names):
    return {name.rpartition(".")[2] for name in names}


def problems(model, **fields):
    with pytest.raises(RecipeError) as raised:
        targets.find_sites(model, methods.load("lora"), Targets(**fields))
    return raised.value.problems


# ---- which modules are chosen ----


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_the_head_and_the_embeddings_out(tied):
    names = chosen(skeleton(tie_word_embeddings=tied))
    assert leaves(names) == LEAVES
    assert len(names) == 14


def test_all_linear_takes_gpt2s_own_linear_layers():
    names = chosen(skeleton("gpt2"))
    assert leaves(names) == {"c_attn", "c_proj", "c_fc"}
    assert len(names) == 8


def test_sites_come_in_the_models_order():
    model = skeleton()
    names = chosen(model, target_modules=["down_proj", "q_proj"])
    assert names == [name for name, _ in model.named_modules() if leaves([name]) <= {"q_proj", "down_proj"} and name]


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["0.self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"]),
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        ("model.layers.1.mlp.up_proj", ["model.layers.1.mlp.up_proj"]),
        (["embed_tokens", "lm_head"], ["model.embed_tokens", "lm_head"]),
        (r"model\.layers\.1\..*(q|v)_proj", ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]),
        (r".*\.self_attn\.o_proj", ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"]),
    ],
    ids=str,
)
def test_the_forms_of_target_modules(target_modules, expected):
    assert chosen(skeleton(), target_modules=target_modules) == expected


@pytest.mark.parametrize("target_modules", [["proj"], ["ayers.0.self_attn.q_proj"], r"q_pro(j)", r"layers\.0\..*"])
def test_a_part_of_a_name_or_path_is_no_match(target_modules):
    found = problems(skeleton(), target_modules=target_modules)
    entry = target_modules if isinstance(target_modules, str) else target_modules[0]
    assert [problem.message for problem in found] == [f'method.target_modules: no module matches "{entry}"']


@pytest.mark.parametrize(
    ("fields", "count", "left_out"),
    [
        ({"exclude_modules": ["q_proj", "mlp.up_proj"]}, 10, {"q_proj", "up_proj"}),
        ({"exclude_modules": r".*\.mlp\..*"}, 8, {"gate_proj", "up_proj", "down_proj"}),
        ({"exclude_modules": "down_proj"}, 12, {"down_proj"}),
        ({"layers": [1]}, 7, set()),
        ({"layers": [1], "exclude_modules": ["q_proj"]}, 6, {"q_proj"}),
        ({"layers": [0, 1]}, 14, set()),
        ({"target_modules": ["q_proj", "lm_head"], "layers": [0]}, 1, LEAVES - {"q_proj"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_what_is_left_out(fields, count, left_out):
    names = chosen(skeleton(), **fields)
    assert len(names) == count
    assert leaves(names) == LEAVES - left_out
    if "layers" in fields:
        assert {int(name.split(".")[2]) for name in names} == set(fields["layers"])


def test_a_layer_is_counted_by_the_first_number_of_its_path():
    """As PEFT counts: in a mixture of experts the second number is the expert's."""
    model = nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 3)])}) for _ in range(3))}
    )
    assert chosen(model, layers=[2]) == ["layers.2.experts.0"]
    assert chosen(model, layers=[0]) == ["layers.0.experts.0"]


# ---- what is said when nothing matches ----


def test_a_misspelt_name_is_met_with_the_right_one():
    (problem,) = problems(skeleton(), target_modules=["q_porj"])
    assert problem.message == 'method.target_modules: no module matches "q_porj"'
    assert problem.hint == f'did you mean "q_proj"? {LISTING}'


def test_a_name_like_no_other_is_met_with_the_list():
    (problem,) = problems(skeleton(), target_modules=["zzz"])
    assert problem.hint == LISTING


def test_everything_that_is_wrong_is_told_at_once():
    found = problems(
        skeleton(), target_modules=["q_porj", "q_proj", "c_attn"], exclude_modules=["mpl"], layers=[0, 5, 7]
    )
    assert [problem.message for problem in found] == [
        'method.target_modules: no module matches "q_porj"',
        'method.target_modules: no module matches "c_attn"',
        'method.exclude_modules: no module matches "mpl"',
        "method.layers: there is no layer 5",
        "method.layers: there is no layer 7",
    ]
    assert found[3].hint == "the adapted modules are in layers 0 to 1"


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_broken_pattern(field):
    (problem,) = problems(skeleton(), **{field: "(q_proj"})
    assert problem.message.startswith(f'method.{field}: "(q_proj" is not a regular expression: ')


@pytest.mark.parametrize(
    ("name", "kind"), [("self_attn", "LlamaAttention"), ("input_layernorm", "LlamaRMSNorm"), ("model", "LlamaModel")]
)
def test_modules_that_cannot_be_adapted(name, kind):
    (problem,) = problems(skeleton(), target_modules=[name])
    assert problem.message == f'method.target_modules: "{name}" matches only {kind}, which cannot be adapted'
    assert "name linear layers" in problem.hint


def test_leaving_nothing_to_adapt():
    (problem,) = problems(skeleton(), exclude_modules=r".*")
    assert (problem.message, problem.hint) == ("method.target_modules: nothing is left to adapt", LISTING)
    (problem,) = problems(skeleton(), layers=[])
    assert problem.message == "method.target_modules: nothing is left to adapt"
    (problem,) = problems(skeleton(), target_modules=["lm_head"], layers=[0])
    assert (problem.message, problem.hint) == ("method.layers: there is no layer 0", None)


# ---- kinds of modules ----


class Scaled(nn.Embedding):
    def forward(self, ids):
        return 3 * super().forward(ids)


class Loud(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Named(nn.Linear):
    """A subclass that computes the same."""


def test_a_module_that_computes_something_else_is_not_adapted():
    assert sites.kind_of(nn.Linear(2, 3)) == sites.kind_of(Named(2, 3)) == "linear"
    assert sites.kind_of(nn.Embedding(2, 3)) == sites.kind_of(nn.Embedding(2, 3, padding_idx=1)) == "embedding"
    assert sites.kind_of(Holder("conv1d").target) == "conv1d"
    for module in (Scaled(2, 3), Loud(2, 3), nn.Embedding(2, 3, max_norm=1.0), nn.Conv1d(2, 3, 1), nn.LayerNorm(2)):
        assert sites.kind_of(module) is None
        model = Holder()
        model.target = module
        (problem,) = problems(model, target_modules=["target"])
        assert "cannot be adapted" in problem.message


def test_a_models_own_scaled_embedding_is_not_adapted():
    from transformers import Gemma3TextConfig

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32, "head_dim": 8}
    model = models.skeleton(Gemma3TextConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    (problem,) = problems(model, target_modules=["embed_tokens"])
    assert "ScaledWordEmbedding, which cannot be adapted" in problem.message
    assert chosen(model, target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("kind", "has_bias"), [("linear", True), ("conv1d", True), ("embedding", False), ("plain", False)]
)
def test_a_site_tells_what_a_method_may_know(kind, has_bias):
    holder = Holder("linear" if kind == "plain" else kind)
    if kind == "plain":
        holder.target = nn.Linear(24, 40, bias=False)
    site = sites.make_site("target", holder.target)
    assert (site.in_features, site.out_features, site.has_bias) == (24, 40, has_bias)
    assert torch.equal(site.dense(), holder.W)
    assert site.dense().dtype == torch.float32
    assert sites.make_site("target", holder.target.bfloat16()).dense().dtype == torch.float32
    assert sites.make_site("target", holder.target.double()).dense().dtype == torch.float64


def test_a_grafted_module_is_still_of_its_kind():
    for kind in ("linear", "conv1d", "embedding"):
        holder = Holder(kind)
        adapt(holder, "lora")
        assert sites.kind_of(holder.target) == kind
        assert sites.original_class(holder.target) is type(Holder(kind).target)


# ---- grafting ----


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_meta_device_is_enough_to_count(name, family, make_model):
    empty, full = (make(family, tie_word_embeddings=False) for make in (skeleton, make_model))
    for model in (empty, full):
        adapt(model, name, ".*")
    counts = [{key: parameter.shape for key, parameter in trainable(model).items()} for model in (empty, full)]
    assert counts[0] == counts[1]
    assert {parameter.device.type for parameter in trainable(empty).values()} == {"meta"}


def test_grafting_twice_is_refused():
    model = Holder()
    adapt(model, "lora")
    with pytest.raises(ModelError, match="target has an adapter already"):
        adapt(model, "dora")
    inject.ungraft(model)
    adapt(model, "dora")


def test_a_hooked_module_is_refused_and_nothing_is_changed(make_model, ids):
    """Accelerate's device_map hooks put a forward on the instance, which would pass the adapter by."""
    model = make_model()
    hooked = model.model.layers[1].mlp.down_proj
    hooked.forward = hooked.forward
    expected = logits(model, ids)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj: its forward was replaced"):
        adapt(model, "lora", "all-linear")
    assert not inject.adapters(model), "the modules before it were grafted"
    assert len(trainable(model)) == len(list(model.parameters())), "the model was frozen"
    assert torch.equal(logits(model, ids), expected)


def test_a_methods_own_check_comes_before_any_change():
    model = Holder()
    with pytest.raises(RecipeError):
        adapt(model, "lora", r=100)
    assert not inject.adapters(model)
    assert len(trainable(model)) == 2


def test_adapters_are_listed_by_path(make_model):
    model = make_model()
    _, sites = adapt(model, "lora", ["v_proj", "q_proj"])
    assert list(inject.adapters(model)) == [site.name for site in sites]
    assert [name for name, _ in inject.grafted_modules(model)] == [site.name for site in sites]


def test_the_head_of_a_model_without_one():
    assert targets.output_head(Holder()) is None
    model = skeleton()
    assert targets.output_head(model) is model.lm_head
