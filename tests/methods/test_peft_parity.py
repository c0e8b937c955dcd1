"""Outputs, gradients and merged weights against PEFT's own implementation, in float64 with the same tensors."""

import copy

import pytest
import torch

from peftcli import inject
from peftcli.checkpoint.adapter import BASE_PREFIX, adapter_tensors
from peftcli.methods.lora import LoRA
from peftcli.ops.dropout import dropout
from peftcli.sites import dense_weight
from tests.methods.building import adapt, assert_close, config_for, logits, randomise, trainable
from tests.tolerances import EXACT

FP64 = EXACT[torch.float64]
LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}
EMBEDDINGS = {"llama": ["embed_tokens"], "gpt2": ["wte", "wpe"]}
PLACES = [(family, part) for family in LINEAR for part in ("linear", "embedding", "both")]

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore::FutureWarning:transformers")


def targets_of(family, part):
    return (LINEAR[family] if part != "embedding" else []) + (EMBEDDINGS[family] if part != "linear" else [])


def peft_twin(model, method, targets, **fields):
    """Returns a copy of `model` that PEFT adapts as our method would, with its own start."""
    from peft import LoraConfig, get_peft_model

    fields.setdefault("fan_in_fan_out", model.config.model_type == "gpt2")
    settings = LoraConfig(target_modules=targets, use_dora=method == "dora", task_type="CAUSAL_LM", **fields)
    return get_peft_model(copy.deepcopy(model), settings)


def give(twin, tensors):
    """Puts `tensors`, by their keys on file, into PEFT's model; every one must find its place."""
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(twin, dict(tensors))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]


def gradients_by_key(model):
    """Returns our adapters' gradients by their keys on file."""
    found = {}
    for path, adapter in inject.adapters(model).items():
        for suffix, tensor in adapter.peft_tensors().items():
            own = next(p for p in adapter.parameters() if p.data_ptr() == tensor.data_ptr())
            found[f"{BASE_PREFIX}{path}.{suffix}"] = own.grad
    return found


def peft_gradients_by_key(twin):
    return {
        name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): parameter.grad
        for name, parameter in twin.named_parameters()
        if parameter.requires_grad
    }


def step(model, ids):
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(("family", "part"), PLACES)
def test_outputs_and_gradients(method, family, part, make_model, ids):
    model = make_model(family, torch.float64)
    targets = targets_of(family, part)
    twin = peft_twin(model, method, targets, r=4, lora_alpha=6)
    adapt(model, method, targets, r=4, alpha=6.0)
    model.double()
    randomise(model)
    give(twin, adapter_tensors(model))
    assert_close(logits(model, ids), logits(twin, ids).detach(), FP64)
    assert_close(step(model, ids), step(twin, ids), FP64)
    found, expected = gradients_by_key(model), peft_gradients_by_key(twin)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.any()
        assert_close(found[key], gradient, FP64)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize(("family", "part"), [("llama", "both"), ("gpt2", "both")])
def test_merged_weights(method, family, part, make_model):
    model = make_model(family, torch.float64, tie_word_embeddings=False)
    targets = targets_of(family, part)
    twin = peft_twin(model, method, targets, r=4, lora_alpha=6)
    _, sites = adapt(model, method, targets, r=4, alpha=6.0)
    model.double()
    randomise(model)
    give(twin, adapter_tensors(model))
    plain = twin.merge_and_unload()
    for site in sites:
        stored = plain.get_submodule(site.name).weight.detach()
        expected = stored if site.kind == "linear" else stored.t()
        adapter = inject.adapters(model)[site.name]
        assert_close(adapter.merged(dense_weight(model.get_submodule(site.name), site.kind)), expected, FP64)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [None, 10.0])
def test_ranks_and_scales_by_pattern(rslora, alpha, make_model):
    model = make_model()
    patterns = {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 6, r".*\.mlp\..*": 3},
        "alpha_pattern": {"q_proj": 12.0, r"layers\.0\.mlp\.down_proj": 1.0},
    }
    targets = ["q_proj", "v_proj", "down_proj"]
    config, _ = adapt(model, "lora", targets, r=4, alpha=alpha, rslora=rslora, **patterns)
    exported = LoRA.peft_config(config)
    written = {key: exported[key] for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")}
    twin = peft_twin(make_model(), "lora", targets, **written)
    for path, adapter in inject.adapters(model).items():
        theirs = twin.get_submodule(f"base_model.model.{path}")
        assert (len(adapter.A), adapter.scale) == (theirs.r["default"], pytest.approx(theirs.scaling["default"]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_pissa_learns_as_pefts_does(family, make_model, ids):
    """PEFT takes the start off the base weight, we take it off the update: the same function, step by step."""
    model = make_model(family)
    targets = LINEAR[family]
    twin = peft_twin(model, "lora", targets, r=4, lora_alpha=6, init_lora_weights="pissa")
    adapt(model, "lora", targets, r=4, alpha=6.0, init="pissa")
    base = make_model(family)
    assert_close(logits(twin, ids), logits(base, ids), EXACT[torch.float32])
    with torch.no_grad():  # the sign of a singular vector is the library's to choose: start from the same
        for path, adapter in inject.adapters(model).items():
            theirs = twin.get_submodule(f"base_model.model.{path}")
            A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
            assert_close(adapter.B @ adapter.A, B @ A, EXACT[torch.float32])
            for tensor, value in ((adapter.A, A), (adapter.A0, A), (adapter.B, B), (adapter.B0, B)):
                tensor.copy_(value)
    optimizers = [torch.optim.SGD(trainable(one).values(), lr=0.05) for one in (model, twin)]
    for _ in range(4):
        for one, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            step(one, ids)
            if one is twin:
                for key, gradient in peft_gradients_by_key(twin).items():
                    path, _, factor = key.removeprefix(BASE_PREFIX).removesuffix(".weight").rpartition(".lora_")
                    assert_close(getattr(inject.adapters(model)[path], factor).grad, gradient, EXACT[torch.float32])
            optimizer.step()
        assert_close(logits(model, ids), logits(twin, ids).detach(), EXACT[torch.float32])
    assert not torch.allclose(logits(model, ids), logits(base, ids))


def test_dropout_of_dora_in_the_papers_mode(make_model):
    """With a dropout that is set to drop the same, PEFT's DoRA is the paper's."""
    model = make_model("llama", torch.float64)
    twin = peft_twin(model, "dora", ["down_proj"], r=4, lora_alpha=6, lora_dropout=0.4)
    adapt(model, "dora", ["down_proj"], r=4, alpha=6.0, dropout=0.4, dropout_mode="paper")
    model.double()
    randomise(model)
    give(twin, adapter_tensors(model))
    ours = model.model.layers[0].mlp.down_proj.train()
    theirs = twin.base_model.model.model.layers[0].mlp.down_proj.train()

    class Same(torch.nn.Module):
        def forward(self, x):
            return dropout(x, 0.4)

    theirs.lora_dropout["default"] = Same()
    x = torch.randn(3, 80, dtype=torch.float64)
    torch.manual_seed(3)
    found = ours(x)
    torch.manual_seed(3)
    assert_close(found, theirs(x).detach(), FP64)


def test_the_default_scale_is_told_to_peft():
    assert config_for("lora", r=4).scale_at("x") == 2
    assert LoRA.peft_config(config_for("lora", r=4))["lora_alpha"] == 8
