"""Text from a model: prompted as in training, stopped where it ends, repeatable."""

import copy

import pytest
import torch

from peftcli.data import format_prompt
from peftcli.evaluation.generation import end_tokens, generate
from peftcli.recipe import GenerateSection

PROMPT = "the cat ? "


@pytest.fixture
def model(make_model):
    return make_model()


def by_hand(model, ids, count, ends=(1,)):
    """Returns the tokens that are likeliest one after the other."""
    found = []
    with torch.no_grad():
        for _ in range(count):
            choice = int(model(input_ids=torch.tensor([[*ids, *found]])).logits[0, -1].argmax())
            found.append(choice)
            if choice in ends:
                break
    return found


def say(model, tokenizer, form="prompt-completion", seed=0, **settings):
    return generate(model, tokenizer, PROMPT, form, GenerateSection(**settings), seed)


@pytest.mark.parametrize("form", ["text", "prompt-completion", "messages", "instruction"])
def test_greedy_continues_the_prompt_as_it_was_trained(model, word_tokenizer, form):
    ids = format_prompt(PROMPT, form, word_tokenizer)
    expected = word_tokenizer.decode(by_hand(model, ids, 6), skip_special_tokens=True).strip()
    assert expected
    assert say(model.train(), word_tokenizer, form, max_new_tokens=6) == expected
    assert not model.training


def test_forms_prompt_differently(word_tokenizer):
    prompts = {form: format_prompt(PROMPT, form, word_tokenizer) for form in ("text", "messages", "instruction")}
    assert word_tokenizer.decode(prompts["text"]) == "the cat ?"
    # The roles are words that this tokenizer does not know.
    assert word_tokenizer.decode(prompts["messages"]) == "<unk> : the cat ? </s> <unk> :"
    assert len({tuple(ids) for ids in prompts.values()}) == 3


def force(model, token):
    """Makes `token` the likeliest after anything."""
    model.lm_head.weight.data.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(128))
    model.lm_head.bias.data[token] = 9.0


def test_it_stops_at_the_end_of_the_text(model, word_tokenizer):
    force(model, word_tokenizer.eos_token_id)
    assert say(model, word_tokenizer, max_new_tokens=50) == ""
    force(model, word_tokenizer.convert_tokens_to_ids("cat"))
    assert say(model, word_tokenizer, max_new_tokens=3) == "cat cat cat"


def test_any_of_several_ends_will_do(model, word_tokenizer):
    dog = word_tokenizer.convert_tokens_to_ids("dog")
    model.generation_config.eos_token_id = [dog, 77]
    assert end_tokens(model, word_tokenizer) == sorted([1, dog, 77])
    force(model, dog)
    assert say(model, word_tokenizer, max_new_tokens=50) == "dog"
    # The tokenizer's own end counts too, where the model's configuration does not know it.
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.eos_token = "cat"
    model.generation_config.eos_token_id = 77
    steps = []
    model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    say(model, tokenizer, max_new_tokens=9)
    assert len(steps) == 9
    force(model, tokenizer.eos_token_id)
    steps.clear()
    say(model, tokenizer, max_new_tokens=9)
    assert len(steps) == 1
    model.generation_config.eos_token_id = None
    assert end_tokens(model, word_tokenizer) == [1]
    model.generation_config = None
    assert end_tokens(model, word_tokenizer) == [1]


def test_sampling_follows_the_seed(model, word_tokenizer):
    def drawn(seed, **settings):
        return say(model, word_tokenizer, seed=seed, max_new_tokens=12, do_sample=True, **settings)

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(4)}) == 4
    assert drawn(1) != drawn(1, temperature=5.0)


def test_temperature_and_top_p_are_used(model, word_tokenizer):
    greedy = say(model, word_tokenizer, max_new_tokens=12)
    for settings in ({"temperature": 1e-4}, {"top_p": 1e-6}):
        assert say(model, word_tokenizer, max_new_tokens=12, do_sample=True, seed=5, **settings) == greedy


def test_the_models_own_sampling_settings_do_not_leak_in(model, word_tokenizer):
    """A model's generation config may say do_sample and top_k; a recipe's settings are all there is."""
    greedy = say(model, word_tokenizer, max_new_tokens=8)
    drawn = say(model, word_tokenizer, max_new_tokens=8, do_sample=True)
    model.generation_config.update(do_sample=True, top_k=1, temperature=3.0, top_p=0.1, max_length=3)
    assert say(model, word_tokenizer, max_new_tokens=8) == greedy
    assert say(model, word_tokenizer, max_new_tokens=8, do_sample=True) == drawn


def test_a_tokenizer_without_padding(model, word_tokenizer):
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None
    assert say(model, tokenizer, max_new_tokens=4) == say(model, word_tokenizer, max_new_tokens=4)
