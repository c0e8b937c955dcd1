"""Adapter folders in both directions: PEFT loads what we write, and we load what PEFT writes."""

import pytest
import torch

from peftcli import inject, methods
from peftcli.checkpoint.adapter import attach, read_adapter, save_adapter
from peftcli.errors import ModelError
from tests.families import tiny_model
from tests.methods.building import adapt, assert_close, config_for, logits, origin_of, randomise, token_ids
from tests.tolerances import EXACT

TOLERANCE = EXACT[torch.float32]
PATTERNS = {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 6}, "alpha_pattern": {"down_proj": 3.0}}
ONE_LAYER = r"model\.layers\.1\.(self_attn\.[qv]_proj|mlp\.down_proj)"

pytestmark = pytest.mark.filterwarnings(
    "ignore:::peft",
    "ignore::FutureWarning:transformers",
    "ignore:.*(embedding layers|target_modules. with tied).*:UserWarning",
)

OURS = {
    "lora": ("lora", "llama", {}),
    "dora": ("dora", "llama", {"alpha": 6.0}),
    "rslora": ("lora", "llama", {"rslora": True, "alpha": 6.0}),
    "patterns": ("lora", "llama", {**PATTERNS, "alpha": 6.0}),
    "patterns without alpha": ("lora", "llama", PATTERNS),
    "rslora with patterns": ("dora", "llama", {**PATTERNS, "rslora": True}),
    "regular expression": ("lora", "llama", {"target_modules": ONE_LAYER}),
    "names": ("dora", "llama", {"target_modules": ["q_proj", "0.mlp.up_proj"]}),
    "excluded": ("lora", "llama", {"exclude_modules": ["q_proj", "1.mlp.up_proj"]}),
    "layers": ("lora", "llama", {"layers": [1]}),
    "pissa": ("lora", "llama", {"init": "pissa", "alpha": 6.0}),
    "pissa with rslora and patterns": ("lora", "llama", {"init": "pissa", "rslora": True, **PATTERNS}),
    "dora from pissa": ("dora", "llama", {"init": "pissa"}),
    "orthogonal": ("lora", "llama", {"init": "orthogonal"}),
    "head and embedding": ("lora", "llama", {"target_modules": ["lm_head", "embed_tokens", "q_proj"]}),
    "embedding with dora": ("dora", "llama", {"target_modules": ["embed_tokens", "o_proj"]}),
    "gpt2": ("lora", "gpt2", {}),
    "gpt2 with dora": ("dora", "gpt2", {"alpha": 6.0}),
    "gpt2's embeddings": ("lora", "gpt2", {"target_modules": ["wte", "wpe", "attn.c_proj"]}),
    "gpt2 from pissa": ("lora", "gpt2", {"init": "pissa"}),
}


@pytest.mark.parametrize(("method", "family", "fields"), OURS.values(), ids=OURS)
def test_peft_loads_what_we_write(method, family, fields, make_model, tmp_path):
    from peft import PeftModel

    model, ids = make_model(family), token_ids()
    base = logits(model, ids)
    fields = {"target_modules": "all-linear", "r": 4, **fields}
    config, sites = adapt(model, method, **fields)
    randomise(model, 0.1)
    save_adapter(tmp_path, model, origin_of(method, config, base_model=""))
    theirs = PeftModel.from_pretrained(make_model(family), tmp_path).eval()
    adapted = {name.removeprefix("base_model.model.") for name, module in theirs.named_modules() if is_adapted(module)}
    assert adapted == {site.name for site in sites}
    assert_close(logits(theirs, ids), logits(model, ids), TOLERANCE)
    assert not torch.allclose(logits(model, ids), base)


def is_adapted(module):
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


THEIRS = {
    "lora": ("llama", {}),
    "dora": ("llama", {"use_dora": True, "lora_dropout": 0.1}),
    "rslora": ("llama", {"use_rslora": True}),
    "patterns": ("llama", PATTERNS),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "regular expression": ("llama", {"target_modules": r".*layers\.1\..*(q_proj|down_proj)"}),
    "excluded by name": ("llama", {"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "excluded by pattern": ("llama", {"exclude_modules": r".*mlp.*"}),
    "a layer": ("llama", {"layers_to_transform": 1}),
    "layers": ("llama", {"layers_to_transform": [0]}),
    "no layers": ("llama", {"layers_to_transform": []}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding with dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "head": ("llama", {"target_modules": ["lm_head"]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2 with dora": ("gpt2", {"target_modules": ["c_fc", "wte"], "use_dora": True, "fan_in_fan_out": True}),
}


def theirs_of(model, **fields):
    """Returns `model` as PEFT adapts it, at its start."""
    from peft import LoraConfig, get_peft_model

    settings = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **fields}
    return get_peft_model(model, LoraConfig(**settings)).eval()


@torch.no_grad()
def stirred(theirs):
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return theirs


@pytest.mark.parametrize(("family", "fields"), THEIRS.values(), ids=THEIRS)
def test_we_load_what_peft_writes(family, fields, make_model, tmp_path):
    ids = token_ids()
    theirs = stirred(theirs_of(make_model(family), **fields))
    theirs.save_pretrained(tmp_path)
    model = make_model(family)
    attach(model, read_adapter(tmp_path))
    assert_close(logits(model, ids), logits(theirs, ids), TOLERANCE)
    assert not torch.allclose(logits(model, ids), logits(make_model(family), ids))


@pytest.mark.parametrize("trained", [["lm_head"], ["embed_tokens", "lm_head"], ["input_layernorm"]], ids=str)
def test_modules_that_peft_has_trained_in_full(trained, make_model, tmp_path):
    ids = token_ids()
    theirs = theirs_of(make_model(), modules_to_save=trained)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "modules_to_save" in name or "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    model = make_model()
    attach(model, read_adapter(tmp_path))
    own = {name.rpartition(".")[0].rpartition(".")[2] for name in inject.trained_base(model)}
    assert own == set(trained)
    assert_close(logits(model, ids), logits(theirs, ids), TOLERANCE)


def test_modules_that_we_have_trained_in_full(make_model, tmp_path):
    from peft import PeftModel

    ids, model = token_ids(), make_model()
    config = config_for("lora", ["q_proj"])
    inject.graft(model, methods.load("lora"), config, 0, trained=["lm_head"])
    randomise(model, 0.1)
    save_adapter(tmp_path, model, origin_of("lora", config, base_model=""))
    theirs = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    assert_close(logits(theirs, ids), logits(model, ids), TOLERANCE)


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "vblora", "adalora", "ia3", "waveft"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("bert", "BertForSequenceClassification"),
        ("roberta", "RobertaForSequenceClassification"),
        ("llama", "LlamaForSequenceClassification"),
        ("bert", "BertForTokenClassification"),
    ],
)
def test_peft_loads_our_task_heads(method, family, kind, tmp_path):
    """Into a model of transformers' own whose head started elsewhere."""
    import transformers
    from peft import PeftModel

    pad = {"pad_token_id": 0} if family == "llama" else {}
    model = tiny_model(family, kind, **pad)
    config = config_for(method, ["v_proj"] if family == "llama" else ["query", "value"])
    inject.graft(model, methods.load(method), config, 0)
    randomise(model)
    task = "token-classification" if "Token" in kind else "sequence-classification"
    (tmp_path / "ours").mkdir()
    save_adapter(tmp_path / "ours", model, origin_of(method, config, base_model="", task=task))
    plain = tiny_model(family, kind, **pad)
    with torch.no_grad():
        for parameter in inject.head_parameters(plain).values():
            parameter.normal_()
    plain.save_pretrained(tmp_path / "base")
    auto = getattr(transformers, f"AutoModelFor{'Token' if 'Token' in kind else 'Sequence'}Classification")
    theirs = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "ours")
    ids = torch.randint(3, 40, (2, 7))
    expected = model(input_ids=ids).logits
    assert_close(theirs.eval()(input_ids=ids).logits, expected, TOLERANCE)
    assert not torch.allclose(plain(input_ids=ids).logits, expected)


def test_a_pissa_whose_rank_on_file_is_more_than_a_side(make_model, tmp_path):
    """Twice r: it loads here and in PEFT all the same."""
    from peft import PeftModel

    ids, model = token_ids(), make_model()
    config, _ = adapt(model, "lora", ["k_proj", "o_proj"], init="pissa", r=20)
    randomise(model, 0.1)
    save_adapter(tmp_path, model, origin_of("lora", config, base_model=""))
    again = make_model()
    attach(again, read_adapter(tmp_path))
    assert_close(logits(again, ids), logits(model, ids), TOLERANCE)
    theirs = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    assert_close(logits(theirs, ids), logits(model, ids), TOLERANCE)


def test_a_pissa_that_peft_has_converted(make_model, tmp_path):
    """PEFT's own PiSSA belongs to a base it has altered and is refused; converted, it is a LoRA on the base named."""
    ids = token_ids()
    theirs = theirs_of(make_model(), init_lora_weights="pissa")
    theirs.save_pretrained(tmp_path / "moved")
    with pytest.raises(ModelError, match="init_lora_weights = pissa"):
        read_adapter(tmp_path / "moved")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    stirred(theirs)
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start")
    model = make_model()
    attach(model, read_adapter(tmp_path / "converted"))
    assert {len(adapter.A) for adapter in inject.adapters(model).values()} == {8}
    assert_close(logits(model, ids), logits(theirs, ids), TOLERANCE)


@pytest.mark.parametrize("fields", [{"bias": "all"}, {"lora_bias": True}], ids=str)
def test_what_peft_can_do_beyond_this_version_is_refused(fields, make_model, tmp_path):
    theirs_of(make_model(), **fields).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=next(iter(fields))):
        read_adapter(tmp_path)


def test_base_weights_beside_an_embeddings_adapter_must_be_the_bases(make_model, tmp_path):
    theirs = theirs_of(make_model(), target_modules=["embed_tokens"])
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.base_layer.weight[5] += 1
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds base weights other than this base model's"):
        attach(make_model(), read_adapter(tmp_path))
