"""What is tried on the base: that attention keeps samples apart, and what becomes of the head's logits."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig
from transformers.modeling_outputs import CausalLMOutput

from peftcli import inject
from peftcli.data.collation import collate
from peftcli.data.dataset import Sample
from peftcli.errors import ModelError
from peftcli.training import checks, loss
from peftcli.training.checks import finish_of, joins_exactly
from peftcli.training.head import Finish
from tests.conftest import Recorder
from tests.tolerances import LOSS


def mamba():
    torch.manual_seed(7)
    config = MambaConfig(
        hidden_size=48,
        num_hidden_layers=2,
        vocab_size=128,
        state_size=4,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config).eval()


class Mixing(nn.Module):
    """A model that takes positions, and ignores them: each token is the mean of all before it."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(32, 8), nn.Linear(8, 32)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, position_ids=None, use_cache=False):
        hidden = self.embedding(input_ids)
        counts = torch.arange(1, hidden.shape[1] + 1)[None, :, None]
        return CausalLMOutput(logits=self.head(hidden.cumsum(1) / counts))


class WithoutPositions(Mixing):
    """A model that could not be told where a sample starts."""

    def forward(self, input_ids, use_cache=False):
        return super().forward(input_ids)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attention_keeps_samples_apart(make_model, family, attention):
    model = make_model(family, attn_implementation=attention)
    assert joins_exactly(model)
    # And the check is not too lenient: what it promises is true of the loss of other samples.
    samples = [
        Sample(np.arange(n, n + length, dtype=np.int32), np.ones(length, np.uint8)) for n, length in ((9, 7), (50, 4))
    ]
    flat = loss.score(model, collate(samples, 1, "flat")).loss.item()
    assert flat == pytest.approx(loss.score(model, collate(samples, 1, "padded")).loss.item(), rel=LOSS)


@pytest.mark.parametrize("make", [mamba, Mixing, WithoutPositions])
def test_models_that_mix_neighbours(make):
    assert not joins_exactly(make())


@pytest.mark.parametrize("training", [True, False])
def test_the_check_leaves_no_trace(make_model, training):
    model = make_model("gpt2").train(training)  # which has dropout: the check must not depend on it
    before = torch.get_rng_state()
    assert joins_exactly(model)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_half_precision_is_given_its_rounding(make_model):
    assert joins_exactly(make_model(dtype=torch.bfloat16))


@pytest.fixture
def mamba_recipe(recipe_file, tmp_path, word_tokenizer):
    def write(**data):
        mamba().save_pretrained(tmp_path / "mamba")
        word_tokenizer.save_pretrained(tmp_path / "mamba")
        return recipe_file(
            model={"name": "mamba"},
            data=data,
            method={"type": "lora", "r": 2, "target_modules": ["x_proj", "in_proj"]},
            training={"max_steps": 2},
        )

    return write


def test_such_a_model_is_trained_on_padded_batches(mamba_recipe, train, monkeypatch):
    layouts = []
    original = loss.score

    def seen(model, batch, **options):
        if inject.adapters(model):  # else it is a trial of the base
            layouts.append("padded" if batch.position_ids is None else "flat")
        return original(model, batch, **options)

    monkeypatch.setattr(loss, "score", seen)
    recorder = Recorder()
    train(mamba_recipe(), reporter=recorder)
    assert set(layouts) == {"padded"}
    assert any(note.startswith("batches are padded: mamba") for note in recorder.notes)


def test_insisting_on_joined_batches_is_refused(mamba_recipe, train, tmp_path):
    with pytest.raises(ModelError, match=r"data\.padding_free: mamba .* cannot keep joined samples apart") as caught:
        train(mamba_recipe(padding_free=True))
    assert "auto or false" in caught.value.problems[0].hint


@pytest.mark.parametrize(("padding_free", "layouts"), [(True, {"flat"}), (False, {"padded"})])
def test_an_attention_model_does_as_it_is_told(recipe_file, train, monkeypatch, padding_free, layouts):
    seen, original = set(), loss.score

    def score(model, batch, **options):
        if inject.adapters(model):
            seen.add("padded" if batch.position_ids is None else "flat")
        return original(model, batch, **options)

    monkeypatch.setattr(loss, "score", score)
    recorder = Recorder()
    train(recipe_file(data={"padding_free": padding_free}, training={"max_steps": 1}), reporter=recorder)
    assert seen == layouts
    assert not any("batches are padded" in note for note in recorder.notes)


# ---- what a model does to its head's logits ----


class Bending(Mixing):
    """A model that does to its logits what no field of its configuration says."""

    def __init__(self, change):
        super().__init__()
        self.change, self.config = change, LlamaConfig()
        self.config._attn_implementation = "eager"

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=False):
        return CausalLMOutput(logits=self.change(super().forward(input_ids).logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [
        ("Llama", {}, Finish()),
        ("Gemma2", {"final_logit_softcapping": 30.0}, Finish(cap=30.0)),
        ("Gemma3", {"final_logit_softcapping": None}, Finish()),
        ("Cohere", {"logit_scale": 0.0625}, Finish(0.0625)),
        ("Granite", {"logits_scaling": 8.0}, Finish(0.125)),  # divides
        ("HyperCLOVAX", {"logits_scaling": 8.0}, Finish(8.0)),  # multiplies with a field of the same name
        ("FalconH1", {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4}, Finish(0.5)),
    ],
)
def test_what_becomes_of_logits_is_found(kind, changes, expected, dtype):
    import transformers

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 128,
        "pad_token_id": 1,
    }
    config = getattr(transformers, f"{kind}{'Text' if kind == 'Gemma3' else ''}Config")(**{**sizes, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    assert finish_of(model) == expected
    assert model.training  # as it was


@pytest.mark.parametrize(
    "change", [lambda z: 20 * torch.tanh(z / 20), lambda z: z * 1.01, lambda z: z[..., :-1], lambda z: z[:, -1:]]
)
def test_what_no_configuration_says_is_not_guessed(change):
    assert finish_of(Bending(lambda z: z)) == Finish()
    assert finish_of(Bending(change)) is None


def test_a_head_that_is_used_twice_is_left_alone():
    model = Bending(lambda z: z)
    first = model.head.forward
    model.forward = lambda input_ids, **given: CausalLMOutput(
        logits=model.head(model.embedding(input_ids)) + model.head(model.embedding(input_ids + 1))
    )
    assert first is not None
    assert finish_of(model) is None


def test_a_model_without_a_head_of_its_own(make_model):
    model = make_model()
    model.get_output_embeddings = lambda: None
    assert finish_of(model) is None


def test_finding_out_leaves_no_trace(make_model):
    model = make_model("gpt2").train()
    before = torch.get_rng_state()
    assert finish_of(model) == Finish()
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks


def test_a_run_says_that_it_takes_all_logits_at_once(recipe_file, train, monkeypatch):
    """And learns the same."""
    losses = []
    for found in (Finish(), None):
        monkeypatch.setattr(checks, "finish_of", lambda model, found=found: found)
        recorder = Recorder()
        train(recipe_file(training={"max_steps": 2}), f"output_dir={found is None}", reporter=recorder)
        assert any("all supervised tokens at once" in note for note in recorder.notes) == (found is None)
        losses.append(list(recorder.losses.values()))
    assert losses[0] == pytest.approx(losses[1], rel=LOSS)
