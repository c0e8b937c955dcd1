"""The loss on supervised rows alone, against all logits and the plain shifted cross-entropy."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

from peftcli import inject, methods
from peftcli.data.collation import collate
from peftcli.data.dataset import Sample
from peftcli.training import loss
from tests.tolerances import LOSS

LENGTHS = (9, 3, 14, 6)


def sample(length, first_supervised, start):
    ids = (np.arange(start, start + length) * 7 % 120 + 2).astype(np.int32)
    return Sample(ids, (np.arange(length) >= first_supervised).astype(np.uint8))


SAMPLES = [sample(length, min(length - 1, 2 + index), 5 * index) for index, length in enumerate(LENGTHS)]
NUM_SUPERVISED = sum(int(one.supervised[1:].sum()) for one in SAMPLES)


def batch(layout):
    return collate(SAMPLES, 1, layout)


def tiny(kind, **changes):
    fields = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 128,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    torch.manual_seed(7)
    return AutoModelForCausalLM.from_config(kind(**fields)).eval()


def make(name, make_model):
    if name == "gemma2":  # caps its logits; a low cap, so that leaving it out shows
        return tiny(Gemma2Config, final_logit_softcapping=0.2, attn_implementation="eager")
    if name == "cohere":  # scales its logits
        return tiny(CohereConfig, logit_scale=0.3)
    return make_model(name.partition("-")[0], tie_word_embeddings=name.endswith("-tied"))


MODELS = ["llama-untied", "llama-tied", "gpt2-tied", "gpt2-untied", "gemma2", "cohere"]


def adapted(name, make_model, **fields):
    model, method = make(name, make_model), methods.load("lora")
    inject.graft(model, method, method.Config(r=4, **fields), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_equals_reference(model, given):
    theirs = loss.score_reference(model, given)
    expected = gradients(model, theirs)
    ours = loss.score(model, given).loss
    found = gradients(model, ours)
    assert ours.item() == pytest.approx(theirs.item(), rel=LOSS)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=LOSS * float(gradient.abs().max()))


@pytest.mark.parametrize("layout", ["padded", "flat"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_the_reference(make_model, name, layout):
    assert_equals_reference(adapted(name, make_model), batch(layout))


@pytest.mark.parametrize("name", ["llama-untied", "gpt2-tied"])
@pytest.mark.parametrize("layout", ["padded", "flat"])
def test_with_an_adapter_on_the_head(make_model, name, layout):
    assert_equals_reference(adapted(name, make_model, target_modules=["lm_head"]), batch(layout))


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_models_own(make_model, name):
    """Whatever a model does to its logits after the head (capping, scaling) is done to the few rows as well."""
    model, given = make(name, make_model), batch("padded")
    with torch.no_grad():
        all_logits = model(input_ids=given.input_ids, attention_mask=given.attention_mask).logits
        logits, targets = loss.supervised_logits(model, given)
    keep = given.labels[:, 1:] != -100
    assert targets.tolist() == given.labels[:, 1:][keep].tolist()
    expected = all_logits[:, :-1][keep]
    torch.testing.assert_close(logits, expected, rtol=0, atol=LOSS * float(expected.abs().max()))


@pytest.mark.parametrize("layout", ["padded", "flat"])
def test_the_layouts_agree(make_model, layout):
    model = make("llama-untied", make_model)
    alone = sum(loss.score(model, collate([one], 1, "padded")).loss.item() for one in SAMPLES)
    assert loss.score(model, batch(layout)).loss.item() == pytest.approx(alone, rel=LOSS)


@pytest.mark.parametrize("layout", ["padded", "flat"])
def test_only_supervised_rows_go_through_the_head(make_model, layout):
    model, seen = make_model(), []
    handle = model.lm_head.register_forward_hook(lambda module, given, logits: seen.append(tuple(logits.shape)))
    loss.score(model, batch(layout))
    assert seen == [(1, NUM_SUPERVISED, 128)]
    handle.remove()


def test_the_model_is_left_as_it_was(make_model):
    model = make_model()
    loss.score(model, batch("padded"))
    assert not model.lm_head._forward_pre_hooks
    with pytest.raises(IndexError):  # no such token
        loss.score(model, collate([Sample(np.array([200, 201]), np.ones(2, np.uint8))], 1, "padded"))
    assert not model.lm_head._forward_pre_hooks


def test_counts_the_tokens_that_had_the_highest_logit(make_model):
    model, given = make_model(), batch("padded")
    with torch.no_grad():
        choices = model(input_ids=given.input_ids, attention_mask=given.attention_mask).logits[:, :-1].argmax(-1)
        chosen = choices[0, given.labels[0, 1:] != -100].tolist()
    # The first sample's labels become what the model would have chosen there.
    kept = given.labels[0].clone()
    kept[1:][kept[1:] != -100] = torch.tensor(chosen)
    labels = given.labels.clone()
    labels[0] = kept
    right = loss.score(model, type(given)(**{**vars(given), "labels": labels}), count_correct=True).correct
    plain = loss.score(model, given, count_correct=True).correct
    wrong_before = sum(a != b for a, b in zip(chosen, given.labels[0, 1:][kept[1:] != -100].tolist(), strict=True))
    assert wrong_before > 0
    assert right - plain == wrong_before
    assert loss.score(model, given).correct is None


def test_half_precision_logits_are_scored_in_float32(make_model):
    model = make_model(dtype=torch.bfloat16)
    assert loss.score(model, batch("padded")).loss.dtype == torch.float32


def test_a_model_whose_head_is_no_module_of_its_own(make_model):
    model, given = make_model(), batch("padded")
    expected = loss.score(model, given).loss.item()
    model.get_output_embeddings = lambda: None
    assert loss.score(model, given).loss.item() == pytest.approx(expected, rel=LOSS)


def test_noise_depends_on_each_part_of_the_place_and_on_their_order():
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1), (12, 0, 0), (1, 2, 0), (2, 1, 0)]
    seeds = [loss.noise_seed(seed, *place) for seed in (0, 1, 42) for place in places]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    loss.seed_noise(42, 3, 1, 0)
    first = torch.rand(5)
    torch.rand(9)
    loss.seed_noise(42, 3, 1, 0)
    assert torch.equal(torch.rand(5), first)


def test_no_two_steps_of_a_long_run_share_their_noise():
    seeds = {loss.noise_seed(42, step, micro, 0) for step in range(3000) for micro in range(4)}
    assert len(seeds) == 12_000
