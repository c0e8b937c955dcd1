"""The loss on supervised rows alone, whole or in chunks, against all logits and the plain shifted cross-entropy."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig

from peftcli import inject, methods, quantization
from peftcli.data.collation import collate
from peftcli.data.dataset import Sample
from peftcli.recipe import QuantizationSection
from peftcli.training import checks, head, loss
from peftcli.training.head import Finish
from tests.families import tiny_model
from tests.methods.building import SMALL
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
    if name == "granite":  # divides them
        return tiny(GraniteConfig, logits_scaling=3.0)
    model = make_model(name.partition("-")[0], tie_word_embeddings=name.endswith("-tied"))
    if name == "llama-biased":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(128))
    return model


FINISHES = {"gemma2": Finish(cap=0.2), "cohere": Finish(0.3), "granite": Finish(1 / 3)}
MODELS = ["llama-untied", "llama-tied", "llama-biased", "gpt2-tied", "gpt2-untied", *FINISHES]
ON_THE_HEAD = ["bitfit", "full"] + [
    name for name in methods.names() if "target_modules" in methods.load(name).Config.model_fields
]
CHUNKS = ["whole", "one chunk", "many chunks"]


@pytest.fixture(params=CHUNKS)
def chunks(request, monkeypatch):
    """How the supervised rows go through the head; in chunks of three where in many."""
    if request.param == "many chunks":
        monkeypatch.setattr(head, "rows_for", lambda vocabulary, budget: 3)
    return request.param


def adapted(name, make_model, method="lora", dtype=torch.float64, **fields):
    model, kind = make(name, make_model).to(dtype), methods.load(method)
    own = {key: value for key, value in SMALL.items() if key in kind.Config.model_fields}
    inject.graft(model, kind, kind.Config.model_validate({**own, **fields}), seed=0)
    model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    return model


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_equals_reference(model, given, finish=None):
    theirs = loss.score_reference(model, given)
    expected = gradients(model, theirs)
    ours = loss.score(model, given, finish=finish).loss
    assert ours.dtype == theirs.dtype
    found = gradients(model, ours)
    assert ours.item() == pytest.approx(theirs.item(), rel=LOSS)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=LOSS * float(gradient.abs().max()))


@pytest.mark.parametrize("layout", ["padded", "flat"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_the_reference(make_model, name, layout, chunks):
    finish = None if chunks == "whole" else FINISHES.get(name, Finish())
    assert_equals_reference(adapted(name, make_model), batch(layout), finish)


@pytest.mark.parametrize("method", ON_THE_HEAD)
@pytest.mark.parametrize("name", ["llama-biased", "gpt2-tied"])
def test_with_an_adapter_on_the_head(make_model, name, method, chunks):
    kind = methods.load(method)
    fields = {"target_modules": ["lm_head"]} if "target_modules" in kind.Config.model_fields else {}
    model = adapted(name, make_model, method, **fields)
    assert_equals_reference(model, batch("flat"), None if chunks == "whole" else Finish())


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


def test_chunks_of_few_rows_go_through_the_head_and_no_row_through_the_model(make_model, monkeypatch):
    """The model's own logits are those of no row; the head is called once, so that its weights are gathered once."""
    monkeypatch.setattr(head, "rows_for", lambda vocabulary, budget: 3)
    model, sizes, calls = make_model(), [], []
    model.lm_head.register_forward_hook(lambda module, given, logits: calls.append(tuple(logits.shape)))
    forward = type(model.lm_head).forward
    model.lm_head.forward = lambda x: sizes.append(len(x[0])) or forward(model.lm_head, x)
    loss.score(model, batch("padded"), finish=Finish())
    assert calls == [(1, 0, 128)]
    assert sum(sizes) == NUM_SUPERVISED
    assert max(sizes) <= 3
    assert len(sizes) > 3


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


def test_counts_the_tokens_that_had_the_highest_logit(make_model, chunks):
    finish = None if chunks == "whole" else Finish()
    model, given = make_model(), batch("padded")
    with torch.no_grad():
        choices = model(input_ids=given.input_ids, attention_mask=given.attention_mask).logits[:, :-1].argmax(-1)
        chosen = choices[0, given.labels[0, 1:] != -100].tolist()
    # The first sample's labels become what the model would have chosen there.
    kept = given.labels[0].clone()
    kept[1:][kept[1:] != -100] = torch.tensor(chosen)
    labels = given.labels.clone()
    labels[0] = kept
    altered = type(given)(**{**vars(given), "labels": labels})
    right = loss.score(model, altered, finish=finish, count_correct=True).correct
    plain = loss.score(model, given, finish=finish, count_correct=True).correct
    wrong_before = sum(a != b for a, b in zip(chosen, given.labels[0, 1:][kept[1:] != -100].tolist(), strict=True))
    assert wrong_before > 0
    assert right - plain == wrong_before
    assert loss.score(model, given, finish=finish).correct is None


def test_answers_in_chunks(chunks):
    """T5 scales the hidden states of a tied head by itself, before it."""
    model = tiny_model("t5", "T5ForConditionalGeneration", tie_word_embeddings=True)
    finish = None if chunks == "whole" else checks.finish_of(model)
    goals = [np.array(ids, np.int32) for ids in ([9, 8, 2], [7, 2], [5, 6, 7, 8, 2])]
    asked = np.arange(4, 10, dtype=np.int32)
    given = collate([Sample(asked, np.zeros(6, np.uint8), goal) for goal in goals], 0, "padded", "answer")
    theirs = model(input_ids=given.input_ids, attention_mask=given.attention_mask, labels=given.labels).loss * 10
    ours = loss.score_answers(model, given, finish=finish).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=LOSS)
    expected, found = gradients(model, theirs), gradients(model, ours)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=LOSS * float(gradient.abs().max()))


def test_what_is_not_supervised_does_not_count(make_model, chunks):
    """Neither a lone supervised token nor none at all: that costs nothing and has a gradient, which is 0."""
    model = adapted("llama-untied", make_model)
    finish = None if chunks == "whole" else Finish()
    for supervised in (0, 1):
        given = collate([sample(6, 6 - supervised, 3), sample(4, 4, 9)], 1, "padded")
        assert given.num_supervised == supervised
        expected = loss.score_reference(model, given)
        found = loss.score(model, given, finish=finish).loss
        assert found.item() == pytest.approx(expected.item(), rel=LOSS)
        assert all(bool(one.any()) == bool(supervised) for one in gradients(model, found).values())


DYNAMO_LOOKS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.mark.parametrize("way", ["checkpointed", "nf4", pytest.param("compiled layers", marks=DYNAMO_LOOKS)])
def test_whatever_the_layers_below_do(make_model, way, monkeypatch):
    monkeypatch.setattr(head, "rows_for", lambda vocabulary, budget: 3)
    model = make_model()
    if way == "nf4":
        quantization.quantize(model, QuantizationSection(type="nf4", compute_dtype="float32"), {"lm_head"})
    method = methods.load("lora")
    inject.graft(model, method, method.Config(r=4), seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.2)
    if way == "checkpointed":
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": False})
    if way == "compiled layers":
        for layer in model.model.layers:
            layer.compile(backend="eager", fullgraph=True)
    assert_equals_reference(model, batch("padded"), Finish())


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
