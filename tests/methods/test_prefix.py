"""Prefix tuning against real text in the prefix's place, against its layout, and against PEFT."""

import copy
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from peftcli import inject, sites
from peftcli.checkpoint import state
from peftcli.checkpoint.adapter import attach, read_adapter, save_adapter
from peftcli.errors import ModelError, RecipeError
from peftcli.methods.prefix import PrefixTuning, PrefixTuningConfig
from tests.methods.building import adapt, assert_close, config_for, origin_of, trainable
from tests.methods.prompting import FACTS, TASKS, generated, peft_twin, task_inputs, task_model
from tests.tolerances import EXACT, HALF

FP32, FP64 = EXACT[torch.float32], EXACT[torch.float64]

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore::FutureWarning:transformers")


def prefixed(kind, make_model, dtype=torch.float64, scale=1.0, **fields):
    """Returns a model with a random prefix of 3, the same at each call, and its adapter."""
    model = task_model(kind, make_model, dtype)
    adapt(model, "prefix", **{"init": "random", **fields})
    adapter = inject.adapters(model)[""].to(torch.promote_types(dtype, torch.float32))
    if adapter.P is not None:
        adapter.P.data.mul_(scale)
    return model, adapter


def called(model, ids, **named):
    return model(input_ids=ids, use_cache=False, **named).logits


# ---- the formula ----


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prefix_of_real_tokens_is_those_tokens(family, make_model, ids):
    """Keys and values of a text, at the positions they had: what follows cannot tell them from the text."""
    model = task_model(family, make_model, torch.float32)
    tokens = torch.tensor([[5, 90, 17, 5]])
    expected = called(model, torch.cat([tokens.expand(2, -1), ids], 1))[:, 4:]
    adapt(model, "prefix", num_virtual_tokens=4, init_tokens=[[5], [90], [17], [5]])
    assert_close(called(model, ids), expected, FP32)


def test_in_t5s_decoder_a_prefix_of_real_tokens_is_those_tokens(make_model):
    model = task_model("t5", make_model, torch.float32)
    tokens, rest = torch.tensor([[5, 40, 17]]), torch.randint(3, 70, (2, 6))
    read = {"input_ids": tokens.expand(2, -1), "use_cache": False}  # the encoder reads what it read for the start
    whole = torch.cat([tokens.expand(2, -1), rest], 1)
    expected = model(decoder_input_ids=whole, **read).logits[:, 3:]
    adapt(model, "prefix", init_tokens=[[5], [40], [17]])
    assert_close(model(decoder_input_ids=rest, **read).logits, expected, FP32)
    mask = torch.ones_like(rest)
    assert_close(model(decoder_input_ids=rest, decoder_attention_mask=mask, **read).logits, expected, FP32)


def test_each_layer_has_its_keys_and_values_at_their_place(make_model):
    """P is [p, layers·2·H·S], and H counts the heads of keys and values, fewer than the queries'."""
    _, adapter = prefixed("llama", make_model)
    assert adapter.P.shape == (3, 2 * 2 * 2 * 12)
    cache = adapter.make_cache()
    adapter.fill(cache, 2, torch.float64)
    P = adapter.P.detach()
    for layer, block in enumerate(cache.layers):
        for part, tensor in enumerate((block.keys, block.values)):
            assert tensor.shape == (2, 2, 3, 12)
            for head in range(2):
                at = ((2 * layer + part) * 2 + head) * 12
                assert torch.equal(tensor[0, head], P[:, at : at + 12])
                assert torch.equal(tensor[1, head], P[:, at : at + 12])


@pytest.mark.parametrize("init", ["random", "zeros"])
def test_each_token_attends_to_the_whole_prefix_and_to_nothing_after_itself(init, make_model, ids):
    model = task_model("llama", make_model, attn_implementation="eager")
    base = called(model, ids)
    adapt(model, "prefix", init=init)
    model.double()
    shares = model(input_ids=ids, output_attentions=True).attentions
    for share in shares:  # [B, heads, T, p + T]
        assert share.shape == (2, 4, 9, 12)
        assert torch.allclose(share.sum(-1), torch.ones(2, 4, 9, dtype=torch.float64))
        assert (share[..., :3] > 0).all()
        assert torch.equal(share[..., 3:], share[..., 3:].tril())
    if init == "zeros":  # a key of zeros has logit 0
        ratio = shares[0][..., 0, :3].sum(-1) / shares[0][..., 0, 0]
        assert torch.allclose(ratio, torch.full_like(ratio, 3.0))
    assert not torch.allclose(called(model, ids), base), "no start is the base"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-labels"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_however_the_tokens_are_given(kind, attention, make_model):
    model = task_model(kind, make_model, attn_implementation=attention)
    adapt(model, "prefix", init="random")
    model.double()
    ids = torch.randint(3, 60, (2, 9))
    expected = model(input_ids=ids).logits
    assert torch.equal(model(ids).logits, expected)
    assert_close(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, expected, FP64)
    assert_close(model(input_ids=ids, position_ids=torch.arange(9).expand(2, -1)).logits, expected, FP64)
    assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, expected, FP64)
    if kind != "bert-labels":
        assert_close(called(model, ids), expected, FP64)


def test_padding_changes_nothing(make_model):
    model, _ = prefixed("llama", make_model)
    ids = torch.randint(3, 60, (1, 6))
    expected = called(model, ids)
    padded, mask = torch.ones(1, 9, dtype=torch.long), torch.zeros(1, 9, dtype=torch.long)
    padded[:, :6], mask[:, :6] = ids, 1
    assert_close(called(model, padded, attention_mask=mask)[:, :6], expected, FP64)


def test_who_asks_for_no_cache_is_given_none(make_model, ids):
    model, _ = prefixed("llama", make_model)
    assert model(input_ids=ids, use_cache=False).past_key_values is None
    cache = model(input_ids=ids, use_cache=True).past_key_values
    assert cache.get_seq_length() == 3 + 9
    step = model(input_ids=ids[:, :1], past_key_values=cache).logits
    assert_close(step[:, 0], called(model, torch.cat([ids, ids[:, :1]], 1))[:, -1], FP64)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_text_is_generated_with_a_cache_as_without(kind, options, make_model):
    model = task_model(kind, make_model)
    ids = torch.randint(3, 60, (2, 5))
    base = generated(model, ids, **options)
    model, _ = prefixed(kind, make_model, scale=3.0)
    cached, plain = generated(model, ids, **options), generated(model, ids, use_cache=False, **options)
    assert torch.equal(cached.ids, plain.ids)
    assert_close(cached.logits, plain.logits, FP64)
    assert not torch.allclose(cached.logits, base.logits)


def test_a_half_precision_model_answers_in_its_own_dtype(make_model, ids):
    wide, _ = prefixed("llama", make_model, torch.float32)
    model, adapter = prefixed("llama", make_model, torch.bfloat16)
    assert adapter.P.dtype == torch.float32
    found = called(model, ids)
    assert found.dtype == torch.bfloat16
    assert_close(found.float(), called(wide, ids), HALF[torch.bfloat16])
    found.float().sum().backward()
    assert adapter.P.grad.any()


def test_under_autocast(make_model, ids):
    model, adapter = prefixed("llama", make_model, torch.float32)
    expected = called(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = called(model, ids)
    assert_close(found.float(), expected, HALF[torch.bfloat16])
    found.float().sum().backward()
    assert torch.isfinite(adapter.P.grad).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-labels"])
def test_compiled_without_a_break_it_equals_eager(kind, make_model):
    model, adapter = prefixed(kind, make_model, torch.float32)
    ids = torch.randint(3, 60, (2, 7))
    named = {} if kind == "bert-labels" else {"use_cache": False}
    expected = model(input_ids=ids, **named).logits
    expected.square().sum().backward()
    gradient, adapter.P.grad = adapter.P.grad, None
    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=ids, **named).logits
    found.square().sum().backward()
    assert_close(found, expected, FP32)
    assert_close(adapter.P.grad, gradient, FP32)


def test_only_the_prefix_learns(make_model, ids):
    model = make_model()
    before, expected = copy.deepcopy(model.state_dict()), called(model, ids)
    adapt(model, "prefix")
    assert set(trainable(model)) == {"adapter.P"}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1)
    start = inject.adapters(model)[""].P.detach().clone()
    for _ in range(3):
        called(model, ids).square().sum().backward()
        optimizer.step()
    assert not torch.equal(inject.adapters(model)[""].P, start)
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    inject.ungraft(model)
    assert list(model.state_dict()) == list(before)
    assert torch.equal(called(model, ids), expected)


# ---- where it starts ----


def start(make_model, *, seed=0, family="llama", **fields):
    config = PrefixTuning.prepare(config_for("prefix", **fields), FACTS)
    return PrefixTuning(config, sites.model_site(make_model(family)), seed).P.detach()


def test_a_random_start_is_standard_normal(make_model):
    P = start(make_model, init="random", num_virtual_tokens=40)
    assert abs(P.mean()) < 0.1
    assert 0.9 < P.std() < 1.1
    assert not start(make_model, init="zeros").any()


def test_the_seed_alone_decides_the_start(make_model):
    for init in ("random", "sampled-vocab"):
        torch.manual_seed(1)
        first = start(make_model, init=init)
        torch.manual_seed(2)
        assert torch.equal(start(make_model, init=init), first)
        assert not torch.equal(start(make_model, init=init, seed=1), first)


def test_a_text_is_repeated_to_fit(make_model):
    expected = start(make_model, num_virtual_tokens=5, init_tokens=[[10], [11], [12], [10], [11]])
    assert torch.equal(start(make_model, num_virtual_tokens=5, init="text", init_text="abc"), expected)


def test_the_start_is_what_the_model_says_in_evaluation_mode(make_model):
    model = make_model("gpt2").train()
    model.transformer.drop.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    config = PrefixTuning.prepare(config_for("prefix"), FACTS)
    first = PrefixTuning(config, sites.model_site(model), 0).P
    assert torch.equal(first, start(make_model, family="gpt2"))
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_on_the_meta_device_only_the_shape_is_made():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        site = sites.model_site(LlamaForCausalLM(LlamaConfig(vocab_size=32000)))
    P = PrefixTuning(config_for("prefix", num_virtual_tokens=30), site, 0).P
    assert P.is_meta
    assert P.numel() == 7_864_320  # LLaMA-7B, as the published baseline has it


# ---- the network ----


def test_the_network_makes_the_prefix(make_model, ids):
    model, adapter = prefixed("llama", make_model, reparametrize=True, prefix_hidden_size=10)
    assert set(trainable(model)) == {f"adapter.{name}" for name in ("E", "W1", "b1", "W2", "b2")}
    E, W1, b1, W2, b2 = (getattr(adapter, name).detach() for name in ("E", "W1", "b1", "W2", "b2"))
    assert adapter.learning_rate_factors() == dict.fromkeys(("E", "W1", "b1", "W2", "b2"), 0.1)
    assert (E.shape, W1.shape, W2.shape) == ((3, 48), (10, 48), (96, 10))
    assert sum(p.numel() for p in trainable(model).values()) == 3 * 48 + (48 * 10 + 10) + (10 * 96 + 96)
    expected = torch.stack([W2 @ torch.tanh(W1 @ row + b1) + b2 for row in E])
    assert_close(adapter.prefix(), expected, FP64)
    plain, other = prefixed("llama", make_model)
    assert other.learning_rate_factors() == {}
    other.P.data = expected
    assert_close(called(model, ids), called(plain, ids), FP64)
    called(model, ids).square().sum().backward()
    assert all(parameter.grad.any() for parameter in trainable(model).values())


def test_the_network_can_start_at_zeros(make_model):
    _, adapter = prefixed("llama", make_model, reparametrize=True, init="zeros")
    assert len(adapter.W1) == 512
    assert not adapter.prefix().any()
    assert adapter.E.any()
    assert adapter.W1.any()


def test_of_the_network_the_prefix_alone_is_saved(make_model, ids, tmp_path):
    model = make_model()
    config, _ = adapt(model, "prefix", init="random", reparametrize=True, prefix_hidden_size=10)
    save_adapter(tmp_path, model, origin_of("prefix", config))
    found = read_adapter(tmp_path)
    assert list(found.tensors) == ["prompt_embeddings"]
    again = make_model()
    attach(again, found)
    assert set(trainable(again)) == {"adapter.P"}
    assert torch.equal(called(again, ids), called(model, ids))


def test_a_run_with_the_network_resumes_exactly(make_model, ids, tmp_path):
    fields = {"init": "random", "reparametrize": True, "prefix_hidden_size": 10}

    def fresh(seed):
        model = make_model()
        config, _ = adapt(model, "prefix", seed=seed, **fields)
        return model, config, torch.optim.AdamW(trainable(model).values(), lr=0.01)

    def step(model, optimizer):
        optimizer.zero_grad()
        called(model, ids).square().mean().backward()
        optimizer.step()

    model, config, optimizer = fresh(0)
    step(model, optimizer)
    folder = state.save_checkpoint(tmp_path, state.Progress(step=1), model, optimizer, origin_of("prefix", config))
    step(model, optimizer)
    again, _, other = fresh(1)
    state.load_checkpoint(folder, again, other)
    step(again, other)
    for name, parameter in trainable(model).items():
        assert torch.equal(trainable(again)[name], parameter), name


# ---- PEFT ----


def settings(**fields):
    from peft import PrefixTuningConfig as PeftConfig

    return PeftConfig(num_virtual_tokens=3, **fields)


@pytest.mark.parametrize("kind", [kind for kind in TASKS if kind != "t5"])
def test_logits_and_gradients_are_pefts(kind, make_model):
    plain = task_model(kind, make_model)
    inputs = task_inputs(kind, plain)
    model, adapter = prefixed(kind, make_model)
    twin, weight = peft_twin(plain, kind, settings, adapter.P)
    named = {} if "bert" in kind else {"use_cache": False}
    ours, theirs = model(**inputs, **named), twin(**inputs)
    assert_close(ours.logits, theirs.logits, FP64)
    ours.loss.backward()
    theirs.loss.backward()
    assert weight.grad.any()
    assert_close(adapter.P.grad, weight.grad, FP64)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generated_text_is_pefts(kind, make_model):
    model, adapter = prefixed(kind, make_model, scale=3.0)
    twin, _ = peft_twin(task_model(kind, make_model), kind, settings, adapter.P)
    ids, mask = torch.randint(3, 60, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[0, :2] = 0  # on the left, as batches of prompts are
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ours = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(ours, twin.generate(input_ids=ids, attention_mask=mask, **options))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert-labels"])
@pytest.mark.parametrize("told", [True, False], ids=["with the shape", "without"])
def test_peft_loads_what_we_write(kind, told, make_model, tmp_path):
    from peft import PeftConfig, PeftModel

    task = "sequence-classification" if kind == "bert-labels" else "causal-lm"
    base = task_model(kind, make_model, torch.float32)
    model = copy.deepcopy(base)
    config, found = adapt(model, "prefix", init="random")
    save_adapter(tmp_path, model, origin_of("prefix", config, base_model="", task=task))
    fields = PeftConfig.from_pretrained(tmp_path)
    for name, value in PrefixTuning.peft_config(config, found if told else []).items():
        setattr(fields, name, value)
    inputs = task_inputs(kind, model)
    theirs = PeftModel.from_pretrained(base, tmp_path, config=fields).eval()
    assert_close(model(**inputs).logits, theirs(**inputs).logits, FP32)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_we_load_what_peft_writes(kind, make_model, tmp_path):
    """For T5 PEFT hands the layers' pairs out in an order of its own; read in that order, all logits are the same."""
    from peft import PrefixTuningConfig as PeftConfig
    from peft import get_peft_model

    changes = {"num_layers": 5} if kind == "t5" else {}
    model = task_model(kind, make_model, torch.float32, **changes)
    inputs = task_inputs(kind, model)
    peft_settings = PeftConfig(
        task_type=TASKS[kind][2], num_virtual_tokens=3, prefix_projection=kind == "llama", encoder_hidden_size=6
    )
    twin = get_peft_model(copy.deepcopy(model), peft_settings).eval()
    expected = twin(**inputs).logits
    twin.save_pretrained(tmp_path)
    attach(model, read_adapter(tmp_path))
    assert_close(model(**inputs).logits, expected, FP32)


def test_peft_is_told_the_shape_of_the_keys(make_model):
    config, found = adapt(make_model(), "prefix")
    fields = PrefixTuning.peft_config(config, found)
    assert (fields["token_dim"], fields["num_attention_heads"], fields["num_layers"]) == (24, 2, 2)
    assert PrefixTuning.config_from_peft(fields).num_virtual_tokens == 3
    with pytest.raises(ValueError, match="num_transformer_submodules is 2"):
        PrefixTuning.config_from_peft({**fields, "num_transformer_submodules": 2})


# ---- bad input ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": 0}, "greater than or equal to 1"),
        ({"init": "kaiming"}, "sampled-vocab"),
        ({"prefix_hidden_size": 8}, "prefix_hidden_size: it does nothing without reparametrize"),
        ({"reparametrize": True}, "init: the network of reparametrize starts at random or zeros"),
        ({"reparametrize": True, "init": "random", "prefix_hidden_size": 0}, "greater than or equal to 1"),
        ({"init": "text"}, "init_text: it says the words of init: text"),
        ({"init_tokens": [[1, 2]]}, "init_tokens: keys and values start from one token each"),
        ({"init": "zeros", "init_vocabulary": [3]}, "init_vocabulary: init zeros samples no tokens"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        PrefixTuningConfig.model_validate({"type": "prefix", **fields})


def test_what_does_not_fit_the_model_is_refused(make_model):
    site = sites.model_site(make_model())
    assert PrefixTuning.check(config_for("prefix"), [site]) == []
    (problem,) = PrefixTuning.check(config_for("prefix", init_tokens=[[128]]), [site])
    assert problem == "init_tokens: 128 is not an id of this model, which has 0 to 127"
    (problem,) = PrefixTuning.check(config_for("prefix"), [replace(site, attention=None)])
    assert problem.startswith("type: prefix needs a model whose layers all attend alike")


def test_layers_of_several_kinds_are_refused():
    from transformers import JambaConfig, JambaForCausalLM

    with torch.device("meta"):
        model = JambaForCausalLM(JambaConfig(num_hidden_layers=2, attn_layer_period=2, attn_layer_offset=1))
    with pytest.raises(RecipeError, match="layers all attend alike"):
        adapt(model, "prefix")


def test_a_mask_of_four_dimensions_is_refused(make_model, ids):
    model, _ = prefixed("llama", make_model)
    with pytest.raises(ModelError, match="attention masks of shape"):
        model(input_ids=ids, attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.bool))


def test_a_model_that_passes_the_cache_by_is_not_trained_in_vain(make_model, ids):
    model, adapter = prefixed("llama", make_model)
    base = sites.as_base(model, lambda past_key_values=None, **named: None)
    with pytest.raises(ModelError, match="the prefix has no effect"):
        adapter(base, ids)


def test_what_it_cannot_do_is_said():
    config = config_for("prefix")
    assert "cache" in PrefixTuning.obstacle(config, "checkpointing")
    assert "one prefix" in PrefixTuning.obstacle(config, "flat")
    assert PrefixTuning.obstacle(config, "something else") is None
    assert "not of a weight" in PrefixTuning.unmergeable(config)
    assert "not of a weight" in PrefixTuning.not_low_rank(config)
    assert PrefixTuning.num_positions(config) == 3
    assert PrefixTuning.num_virtual_tokens(config) == 0
    assert PrefixTuning.virtual_ids(config, 128) == []
