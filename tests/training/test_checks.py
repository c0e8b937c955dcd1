"""The layouts' self-check: true for attention that keeps samples apart, false for whatever mixes neighbours."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, MambaConfig
from transformers.modeling_outputs import CausalLMOutput

from peftcli.data.collation import collate
from peftcli.data.dataset import Sample
from peftcli.errors import ModelError
from peftcli.training import loss
from peftcli.training.checks import joins_exactly
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
