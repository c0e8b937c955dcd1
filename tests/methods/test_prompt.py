"""Prompt tuning against its formula, against real text in a prompt's place, and against PEFT."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from peftcli import inject, sites
from peftcli.checkpoint.adapter import attach, read_adapter, save_adapter
from peftcli.errors import RecipeError
from peftcli.methods.prompt import PromptTuning, PromptTuningConfig
from peftcli.ops.nearest import nearest_tokens
from tests.methods.building import adapt, assert_close, config_for, logits, origin_of, randomise, trainable
from tests.methods.prompting import FACTS, TASKS, generated, peft_twin, task_inputs, task_model, with_virtual_ids
from tests.tolerances import EXACT

FP64 = EXACT[torch.float64]
V, D = 50, 12

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore::FutureWarning:transformers")


def prompt_on(embedding, seed=0, **fields):
    """Returns an adapter for `embedding`, and what it does to ids."""
    adapter = PromptTuning(config_for("prompt", **fields), sites.embedding_site("embed", embedding), seed)
    adapter.to(embedding.weight.dtype)
    base = sites.as_base(embedding, lambda ids: type(embedding).forward(embedding, ids))
    return adapter, lambda ids: adapter(base, ids)


def start(**fields):
    """Returns the start of a prompt on a random table, and the table."""
    torch.manual_seed(0)
    embedding = nn.Embedding(V, D).requires_grad_(False)
    config = PromptTuning.prepare(config_for("prompt", **fields), FACTS)
    return PromptTuning(config, sites.embedding_site("embed", embedding), 0).P.detach(), embedding.weight


def adapter_of(model):
    (adapter,) = inject.adapters(model).values()
    return adapter


def put_tokens(model, ids):
    """Puts the embeddings of the real tokens `ids` [p] into the model's prompt."""
    adapter, (module,) = adapter_of(model), [m for m in model.modules() if isinstance(m, inject.Graft)]
    with torch.no_grad():
        adapter.P.copy_(module(ids))


# ---- the formula ----


def test_ordinary_ids_get_the_tables_rows_and_virtual_ones_the_prompts():
    embedding = nn.Embedding(V, D, dtype=torch.float64).requires_grad_(False)
    adapter, run = prompt_on(embedding)
    ids = torch.tensor([[50, 51, 52, 7, 0, 49], [52, 3, 50, 51, 8, 52]])
    X = torch.cat([embedding.weight, adapter.P])[ids]
    found = run(ids)
    assert torch.equal(found, X)
    g = torch.randn_like(X)
    found.backward(g)
    expected = torch.stack([g[ids == V + row].sum(0) for row in range(3)])
    assert_close(adapter.P.grad, expected, FP64)
    assert torch.equal(run(ids[:, :0]), X[:, :0])
    assert torch.equal(run(torch.tensor([1, 2])), embedding.weight[1:3])


def test_gradcheck():
    embedding = nn.Embedding(V, D, dtype=torch.float64).requires_grad_(False)
    adapter, run = prompt_on(embedding)
    ids = torch.tensor([[51, 4, 50, 51]])
    assert torch.autograd.gradcheck(lambda _: run(ids).sin(), (adapter.P,))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompt_of_real_tokens_is_those_tokens(family, dtype, make_model, ids):
    model = make_model(family, dtype)
    tokens = torch.tensor([5, 90, 17])
    text = torch.cat([tokens.expand(2, -1), ids], 1)
    expected = model(input_ids=text, use_cache=False).logits
    adapt(model, "prompt", init_tokens=[[5], [90], [17]])
    assert adapter_of(model).P.dtype == torch.float32
    virtual = torch.arange(128, 131).expand(2, -1)
    found = model(input_ids=torch.cat([virtual, ids], 1), use_cache=False).logits
    assert found.dtype == dtype
    assert torch.equal(found, expected)
    assert torch.equal(model(input_ids=text, use_cache=False).logits, expected), "ordinary ids are not touched"


def test_an_embedding_that_scales_is_met_with_scaled_rows():
    """Gemma's multiplies by √D: what a prompt starts from and what it stands beside must be the same."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma3TextConfig(**sizes, head_dim=8, vocab_size=64, num_key_value_heads=2, pad_token_id=0)
    model = Gemma3ForCausalLM(config).eval()
    ids = torch.randint(3, 64, (2, 6))
    expected = model(input_ids=torch.cat([torch.tensor([[9, 4]]).expand(2, -1), ids], 1), use_cache=False).logits
    adapt(model, "prompt", num_virtual_tokens=2, init_tokens=[[9], [4]])
    assert not torch.equal(adapter_of(model).P[0], model.get_input_embeddings().weight[9])
    virtual = torch.tensor([[64, 65]]).expand(2, -1)
    assert torch.equal(model(input_ids=torch.cat([virtual, ids], 1), use_cache=False).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_text_is_generated_with_a_cache_as_without_and_as_from_real_tokens(family, make_model, ids):
    model = make_model(family, torch.float64)
    tokens = torch.tensor([5, 90, 17])
    real = generated(model, torch.cat([tokens.expand(2, -1), ids], 1))
    adapt(model, "prompt")
    model.double()
    put_tokens(model, tokens)
    given = torch.cat([torch.arange(128, 131).expand(2, -1), ids], 1)
    assert torch.equal(generated(model, given).ids, real.ids)
    randomise(model, 1.0)
    cached, plain = generated(model, given), generated(model, given, use_cache=False)
    assert torch.equal(cached.ids, plain.ids)
    assert_close(cached.logits, plain.logits, FP64)
    assert not torch.allclose(cached.logits, real.logits)


def test_samples_laid_end_to_end_each_have_their_prompt(make_model):
    model = make_model("llama", torch.float64)
    adapt(model, "prompt")
    model.double()
    samples = [torch.cat([torch.arange(128, 131), torch.randint(2, 128, (n,))])[None] for n in (4, 6)]
    positions = torch.cat([torch.arange(sample.shape[1]) for sample in samples])[None]
    joined = model(input_ids=torch.cat(samples, 1), position_ids=positions, use_cache=False).logits
    apart = torch.cat([model(input_ids=sample, use_cache=False).logits for sample in samples], 1)
    assert_close(joined, apart, FP64)


def test_only_the_prompt_learns(make_model, ids):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    adapt(model, "prompt")
    assert set(trainable(model)) == {"model.embed_tokens.adapter.P"}
    P = adapter_of(model).P.detach().clone()
    optimizer = torch.optim.AdamW([adapter_of(model).P], lr=0.1)
    for _ in range(3):
        logits(model, ids).square().sum().backward()
        optimizer.step()
    assert not torch.equal(adapter_of(model).P, P)
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    inject.ungraft(model)
    assert list(model.state_dict()) == list(before)


def test_recomputed_activations_give_the_same_gradients(make_model, ids):
    model = make_model().train()
    adapt(model, "prompt")
    gradients = []
    for _ in range(2):
        model.zero_grad()
        logits(model, ids).square().sum().backward()
        gradients.append(adapter_of(model).P.grad.clone())
        model.activation_checkpointing_enable({"use_reentrant": False})
    assert torch.equal(*gradients)


def test_compiled_without_a_break_it_equals_eager():
    embedding = nn.Embedding(V, D).requires_grad_(False)
    adapter, run = prompt_on(embedding)
    ids = torch.tensor([[50, 51, 52, 7, 0, 49]])
    expected = run(ids)
    expected.square().sum().backward()
    gradient, adapter.P.grad = adapter.P.grad, None
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(ids)
    found.square().sum().backward()
    assert torch.equal(found, expected)
    assert_close(adapter.P.grad, gradient, EXACT[torch.float32])


# ---- where it starts ----


def test_a_sampled_start_is_of_different_frequent_tokens():
    P, E = start(num_virtual_tokens=12)
    distances, rows = nearest_tokens(P, E, 2)
    found = rows[:, 0].tolist()
    assert torch.equal(P, E[rows[:, 0]])
    assert len(set(found)) == 12
    assert set(found) <= set(FACTS.frequent_ids)
    assert distances[:, 0].max() <= EXACT[torch.float64] < distances[:, 1].min()
    again, _ = start(num_virtual_tokens=12)
    assert torch.equal(P, again)
    assert sorted(found) != found, "drawn, not the first ones in order"


def test_the_seed_decides_which():
    embedding = nn.Embedding(V, D)
    torch.manual_seed(1)
    first = prompt_on(embedding)[0].P
    torch.manual_seed(2)
    assert torch.equal(prompt_on(embedding)[0].P, first)
    assert not torch.equal(prompt_on(embedding, seed=1)[0].P, first)


def test_labels_are_averaged_and_the_rest_is_sampled():
    P, E = start(num_virtual_tokens=5, init="class-label")
    assert_close(P[0], (E[10] + E[11]) / 2, EXACT[torch.float32])  # ab
    assert torch.equal(P[1], E[12])  # c
    assert_close(P[2], (2 * E[13] + E[10]) / 3, EXACT[torch.float32])  # dad
    sampled = nearest_tokens(P[3:], E, 1)[1].flatten().tolist()
    assert torch.equal(P[3:], E[sampled])
    assert set(sampled) <= set(FACTS.frequent_ids)


def test_labels_beyond_the_last_virtual_token_are_left_out():
    P, E = start(num_virtual_tokens=2, init="class-label", init_labels=["e", "f", "g"])
    assert torch.equal(P, E[[14, 15]])


def test_a_text_is_repeated_or_cut_to_fit():
    P, E = start(num_virtual_tokens=5, init="text", init_text="ab c")
    assert torch.equal(P, E[[10, 11, 12, 10, 11]])
    P, E = start(num_virtual_tokens=2, init="text", init_text="abc")
    assert torch.equal(P, E[[10, 11]])


@pytest.mark.parametrize(("init", "low", "high"), [("random", -0.5, 0.5), ("legacy-uniform", 0.0, 0.5)])
def test_a_random_start_is_uniform(init, low, high):
    P, _ = start(num_virtual_tokens=400, init=init)
    assert low <= P.min() < low + 0.01
    assert high - 0.01 < P.max() <= high
    assert abs(P.mean() - (low + high) / 2) < 0.02


def test_more_tokens_than_there_are_to_sample_repeat():
    P, E = start(num_virtual_tokens=7, init_vocabulary=[4, 9])
    assert {int(row) for row in nearest_tokens(P, E, 1)[1]} == {4, 9}


def test_on_the_meta_device_only_the_shape_is_made():
    with torch.device("meta"):
        site = sites.embedding_site("shared", nn.Embedding(32128, 4096))
    P = PromptTuning(config_for("prompt", num_virtual_tokens=5), site, 0).P
    assert P.is_meta
    assert P.numel() == 20_480  # T5-XXL with 5 tokens, in the paper's table


# ---- several prompts ----


def test_several_prompts_in_one_batch_are_as_many_runs(make_model, ids):
    """Row j·B + b is sample b with prompt j; each prompt's output and gradient are those of a model with it alone."""
    model = make_model("llama", torch.float64)
    config, _ = adapt(model, "prompt", num_prompts=3)
    model.double()
    randomise(model)
    P = adapter_of(model).P
    prompts = PromptTuning.virtual_ids(config, 128)
    assert prompts == [(128, 129, 130), (131, 132, 133), (134, 135, 136)]
    rows = torch.cat([torch.cat([torch.tensor([prompt]).expand(2, -1), ids], 1) for prompt in prompts])
    together = model(input_ids=rows, use_cache=False).logits
    together.square().sum().backward()
    for j in range(3):
        alone = make_model("llama", torch.float64)
        adapt(alone, "prompt")
        alone.double()
        with torch.no_grad():
            adapter_of(alone).P.copy_(P[3 * j : 3 * j + 3])
        found = alone(input_ids=torch.cat([torch.arange(128, 131).expand(2, -1), ids], 1), use_cache=False).logits
        found.square().sum().backward()
        assert_close(found, together.reshape(3, 2, *together.shape[1:])[j], FP64)
        assert_close(adapter_of(alone).P.grad, P.grad[3 * j : 3 * j + 3], FP64)


def test_several_prompts_start_apart():
    P, _ = start(num_virtual_tokens=4, num_prompts=3, init="class-label")
    first, second, third = P.split(4)
    assert torch.equal(first[:3], second[:3])  # the labels
    assert not torch.equal(first[3], second[3])
    assert not torch.equal(second[3], third[3])


def test_one_prompt_has_the_ids_after_the_vocabularys():
    config = config_for("prompt", num_virtual_tokens=4)
    assert PromptTuning.virtual_ids(config, 100) == [(100, 101, 102, 103)]
    assert PromptTuning.num_virtual_tokens(config) == PromptTuning.num_positions(config) == 4


# ---- PEFT ----


def settings(**fields):
    from peft import PromptTuningConfig as PeftConfig

    return PeftConfig(num_virtual_tokens=3, **fields)


@pytest.mark.parametrize("kind", [kind for kind in TASKS if kind != "roberta-labels"])
def test_logits_and_gradients_are_pefts(kind, make_model):
    model = task_model(kind, make_model)
    # PEFT hands embeddings over instead of ids, in which Llama's classifier sees no padding and reads its last token.
    inputs = task_inputs(kind, model, padded=kind != "llama-labels")
    P = torch.randn(3, model.config.hidden_size, dtype=torch.float64)
    twin, weight = peft_twin(model, kind, settings, P)
    adapt(model, "prompt")
    model.double()
    adapter_of(model).P.data = P.clone()
    each = TASKS[kind][2] in ("CAUSAL_LM", "TOKEN_CLS")
    ours = model(
        **with_virtual_ids(model, inputs, range(model.config.vocab_size, model.config.vocab_size + 3), label_each=each)
    )
    if kind == "bert-tags":  # to PEFT, the labels' first ones are the virtual tokens'
        inputs["labels"] = torch.cat([torch.full((3, 3), -100), inputs["labels"]], 1)
    theirs = twin(**inputs)
    assert_close(ours.logits, theirs.logits, FP64)
    ours.loss.backward()
    theirs.loss.backward()
    assert weight.grad.any()
    assert_close(adapter_of(model).P.grad, weight.grad, FP64)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_peft_loads_what_we_write(kind, make_model, tmp_path):
    from peft import PeftModel

    model = task_model(kind, make_model, torch.float32)
    base, inputs = copy.deepcopy(model), task_inputs(kind, model)
    config, _ = adapt(model, "prompt")
    randomise(model)
    task = "seq2seq-lm" if kind == "t5" else "causal-lm"
    save_adapter(tmp_path, model, origin_of("prompt", config, base_model="", task=task))
    theirs = PeftModel.from_pretrained(base, tmp_path).eval()(**inputs).logits
    virtual = range(model.config.vocab_size, model.config.vocab_size + 3)
    ours = model(**with_virtual_ids(model, inputs, virtual, label_each=kind != "t5")).logits
    assert_close(ours, theirs, EXACT[torch.float32])


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_we_load_what_peft_writes(kind, make_model, tmp_path):
    """For T5 PEFT's own default is two prompts, of which it uses the first."""
    from peft import PromptTuningConfig as PeftConfig
    from peft import get_peft_model

    model = task_model(kind, make_model, torch.float32)
    inputs = task_inputs(kind, model)
    twin = get_peft_model(copy.deepcopy(model), PeftConfig(task_type=TASKS[kind][2], num_virtual_tokens=3)).eval()
    twin.save_pretrained(tmp_path)
    attach(model, read_adapter(tmp_path))
    virtual = range(model.config.vocab_size, model.config.vocab_size + 3)
    ours = model(**with_virtual_ids(model, inputs, virtual, label_each=kind != "t5")).logits
    assert_close(ours, twin(**inputs).logits, EXACT[torch.float32])


def test_with_t5_the_encoder_alone_has_a_prompt(make_model):
    model = task_model("t5", make_model)
    adapt(model, "prompt")
    assert list(inject.adapters(model)) == ["encoder.embed_tokens"]


def test_a_config_survives_pefts_form():
    config = config_for("prompt", num_prompts=4, num_virtual_tokens=7)
    again = PromptTuning.config_from_peft(PromptTuning.peft_config(config))
    assert (again.num_prompts, again.num_virtual_tokens) == (4, 7)
    assert "num_prompts" not in PromptTuning.peft_config(config_for("prompt")), "PEFT would warn of it"
    site = sites.embedding_site("embed", nn.Embedding(V, D))
    assert PromptTuning.peft_config(config, [site])["token_dim"] == D


def test_two_prompts_for_one_module_are_refused():
    fields = {"num_virtual_tokens": 3, "num_transformer_submodules": 2, "task_type": "CAUSAL_LM"}
    with pytest.raises(ValueError, match="num_transformer_submodules is 2"):
        PromptTuning.config_from_peft(fields)


# ---- bad input ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 0}, "greater than or equal to 1"),
        ({"num_prompts": 0}, "greater than or equal to 1"),
        ({"init": "glove"}, "sampled-vocab"),
        ({"init": "text"}, "init_text: it says the words of init: text"),
        ({"init_text": "a"}, "init_text: it says the words of init: text"),
        ({"init_labels": ["a"]}, "init_labels: it names the labels of init: class-label"),
        ({"init": "random", "init_tokens": [[1]]}, "init_tokens: init random starts from no tokens"),
        ({"init": "text", "init_text": "a", "init_vocabulary": [1]}, "init_vocabulary: init text samples no tokens"),
        ({"init": "random", "init_vocabulary": [1]}, "init_vocabulary: init random samples no tokens"),
        ({"num_virtual_tokens": 1, "init_tokens": [[1], [2]]}, "init_tokens: there are more than num_virtual_tokens"),
        ({"init_tokens": [[1], []]}, "needs at least one token"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        PromptTuningConfig.model_validate({"type": "prompt", **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_tokens": [[1], [4, V]]}, f"init_tokens: {V} is not an id of this model, which has 0 to {V - 1}"),
        ({"init_vocabulary": [-1]}, "init_vocabulary: -1 is not an id"),
        ({"num_prompts": 2, "init": "text", "init_text": "a"}, "num_prompts: prompts that start alike stay alike"),
        ({"num_prompts": 2, "init_tokens": [[1], [2], [3]]}, "num_prompts: prompts that start alike stay alike"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(fields, message):
    site = sites.embedding_site("embed", nn.Embedding(V, D))
    (problem,) = PromptTuning.check(config_for("prompt", **fields), [site])
    assert problem.startswith(message)


def test_words_that_the_tokenizer_does_not_have_are_refused():
    with pytest.raises(RecipeError, match="init_text: the model's tokenizer has no tokens for it"):
        PromptTuning.prepare(config_for("prompt", init="text", init_text="!"), FACTS)
    with pytest.raises(RecipeError, match='class-label: the model\'s tokenizer has no tokens for "!"'):
        PromptTuning.prepare(config_for("prompt", init="class-label", init_labels=["a", "!"]), FACTS)


def test_labels_are_needed_where_they_are_asked_for():
    class Unlabelled(type(FACTS)):
        labels = ()

    with pytest.raises(RecipeError, match="class-label needs labels"):
        PromptTuning.prepare(config_for("prompt", init="class-label"), Unlabelled())


def test_it_cannot_be_merged():
    config = config_for("prompt")
    assert "not of a weight" in PromptTuning.unmergeable(config)
    assert "not of a weight" in PromptTuning.not_low_rank(config)
    assert PromptTuning.obstacle(config, "flat") is PromptTuning.obstacle(config, "checkpointing") is None
