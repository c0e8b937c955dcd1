"""What every method keeps, whatever it computes. A new file in `methods/` is held to all of it without a line here."""

import copy
import re
import shutil
import sys

import pytest
import torch
from torch import nn

from peftcli import inject, methods, quantization, sites
from peftcli.checkpoint.adapter import attach, read_adapter, save_adapter
from peftcli.methods._place import Site
from tests.methods.building import (
    IN,
    KINDS,
    OUT,
    PACKED_KINDS,
    Holder,
    adapt,
    adapted_holder,
    assert_close,
    config_for,
    inputs,
    int8_product,
    logits,
    loss_of,
    origin_of,
    packed,
    randomise,
    trainable,
)
from tests.tolerances import EXACT, HALF, INT8_CONSTANT, PACKED

NAMES = methods.names()
ADDING = [name for name in NAMES if methods.load(name).place != "nowhere"]
"""The methods that add something to a model; the others train what is there."""
EVERYTHING = ".*"  # every linear layer, GPT-2's Conv1D, embeddings and the head
FAMILIES = ["llama", "gpt2"]


def _sites(*, mergeable=False):
    """Yields each method with each kind of module that it accepts."""
    for name in NAMES:
        method, config = methods.load(name), config_for(name)
        for kind in KINDS:
            site = sites.make_site("target", Holder(kind).target)
            fits = method.place == "targets" and kind in method.kinds and not method.check(config, [site])
            if fits and not (mergeable and method.unmergeable(config)):
                yield pytest.param(name, kind, id=f"{name}-{kind}")


at_each_site = pytest.mark.parametrize(("name", "kind"), list(_sites()))
at_each_mergeable_site = pytest.mark.parametrize(("name", "kind"), list(_sites(mergeable=True)))
each_method = pytest.mark.parametrize("name", NAMES)
each_adding = pytest.mark.parametrize("name", ADDING)
each_model = pytest.mark.parametrize("family", FAMILIES)


def having(names, fact):
    """Returns the mark for those of `names` whose method has `fact`."""
    return pytest.mark.parametrize("name", [name for name in names if fact(methods.load(name))])


@pytest.fixture
def made_for(make_model):
    """Makes a tiny model for a method: untied where it trains the base's own parameters, one of which it could be."""

    def make(name, family="llama", *arguments, **changes):
        untied = {"tie_word_embeddings": False} if methods.load(name).place == "nowhere" else {}
        return make_model(family, *arguments, **untied, **changes)

    return make


def snapshot(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def gradients(model):
    return {name: parameter.grad for name, parameter in trainable(model).items()}


# ---- at the start ----


starting_as_base = having(NAMES, lambda method: method.starts_as_base)


@starting_as_base
@each_model
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_an_adapted_model_starts_as_its_base_bit_for_bit(name, family, training, made_for, ids):
    dropped = {f"{part}_{kind}": 0.0 for part in ("attn", "resid", "embd") for kind in ("pdrop", "dropout")}
    model = made_for(name, family, **(dropped if family == "gpt2" else {})).train(training)
    expected = logits(model, ids)
    adapt(model, name, EVERYTHING)
    assert torch.equal(logits(model, ids), expected)


@having(ADDING, lambda method: method.starts_as_base)
def test_on_a_half_precision_base_the_adapter_is_float32_and_starts_as_the_base(name, make_model, ids):
    model = make_model("llama", torch.bfloat16)
    expected = logits(model, ids)
    adapt(model, name, EVERYTHING)
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.float32}
    found = logits(model, ids)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@having(NAMES, lambda method: method.place == "targets")
def test_a_start_depends_on_the_seed_and_the_site_alone(name, make_model, monkeypatch):
    def start(targets, seed=0, **fields):
        model = make_model()
        adapt(model, name, targets, seed, **fields)
        return {path: snapshot(adapter) for path, adapter in inject.adapters(model).items()}

    torch.manual_seed(1)  # a start that drew from the process's own generator would differ below
    alone = start(["q_proj"])
    torch.manual_seed(2)
    together = start(["v_proj", "down_proj", "q_proj"])
    last = start(["q_proj"], layers=[1])
    for path, tensors in alone.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, together[path][key])
            assert path not in last or torch.equal(tensor, last[path][key])
    first, second = alone.values()
    if all(tensor.unique().numel() <= 1 for tensor in (*first.values(), *second.values())):
        return  # nothing is drawn
    assert any(not torch.equal(first[key], second[key]) for key in first), "two layers start alike"
    drawn = []
    draw = Site.generator
    monkeypatch.setattr(Site, "generator", lambda site, seed: drawn.append(site) or draw(site, seed))
    other_seed = start(["q_proj"], seed=1)
    assert not drawn or any(not torch.equal(first[key], next(iter(other_seed.values()))[key]) for key in first)


@at_each_site
def test_as_many_parameters_train_as_the_docstring_says(name, kind):
    method = methods.load(name)
    stated = re.search(r"^Trainable per site: (.+)\.$", sys.modules[method.__module__].__doc__, re.MULTILINE)
    assert stated, "the method's file must say `Trainable per site: FORMULA.`"
    config = config_for(name)
    formula = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", stated[1])
    expected = eval(formula, {"__builtins__": {}}, {**config.model_dump(), "I": IN, "O": OUT})
    adapter = adapted_holder(name, kind).target.adapter
    assert sum(parameter.numel() for parameter in adapter.parameters() if parameter.requires_grad) == expected


# ---- computing ----


@at_each_mergeable_site
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_plain_module_that_holds_the_merged_weight_equals_the_adapted_one(name, kind, dtype):
    holder = adapted_holder(name, kind, dtype).eval()
    x = inputs(kind, dtype)
    kept = holder.W.clone()
    merged = holder.target.adapter.merged(holder.W)
    bias = None if kind == "embedding" else holder.target.adapter.merged_bias(holder.b).detach()
    assert merged.shape == (OUT, IN)
    assert merged.dtype == dtype
    assert torch.equal(holder.W, kept), "merging wrote into the base weight"
    assert_close(holder(x), holder.plain(x, merged.detach(), bias), EXACT[dtype])
    assert not torch.allclose(holder(x), holder.plain(x, holder.W)), "this adapter changes nothing"


@having(NAMES, lambda method: method.place == "targets" and "conv1d" in method.kinds)
def test_a_conv1d_is_a_linear_layer_stored_the_other_way_round(name):
    linear, conv1d = Holder("linear", torch.float64), Holder("conv1d", torch.float64)
    with torch.no_grad():
        conv1d.target.weight.copy_(linear.W.t())
        conv1d.target.bias.copy_(linear.b)
    tensors = []
    for holder in (linear, conv1d):
        adapt(holder, name)
        for part in inject.parts(holder).values():
            part.double()
        tensors.append(holder.target.adapter.peft_tensors())
        torch.manual_seed(3)
        randomise(holder)
    x = inputs("linear", torch.float64)
    assert_close(conv1d(x), linear(x), EXACT[torch.float64])
    assert tensors[0].keys() == tensors[1].keys()
    for key, tensor in tensors[0].items():
        assert_close(tensors[1][key], tensor, EXACT[torch.float64])


@at_each_mergeable_site
def test_merging_a_half_precision_weight_rounds_once(name, kind):
    holder = adapted_holder(name, kind, torch.float32)
    W = holder.W.bfloat16()
    merged = holder.target.adapter.merged(W)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, holder.target.adapter.merged(W.float()).bfloat16())


@at_each_mergeable_site
def test_a_half_precision_base_with_an_adapter_answers_in_its_own_dtype(name, kind):
    holder = Holder(kind, torch.bfloat16).eval()
    adapt(holder, name)
    randomise(holder)
    x = inputs(kind, torch.bfloat16)
    found = holder(x)
    assert found.dtype == torch.bfloat16
    merged = holder.target.adapter.merged(holder.W.float())
    bias = None if kind == "embedding" else holder.target.adapter.merged_bias(holder.b.float()).detach()
    wide = holder.float().plain(x if kind == "embedding" else x.float(), merged, bias)
    assert_close(found.float(), wide.detach(), HALF[torch.bfloat16])


@at_each_site
def test_under_autocast(name, kind):
    holder = adapted_holder(name, kind, torch.float32).train()
    x = inputs(kind)
    expected = holder(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        found = holder(x)
    found.sum().backward()
    assert_close(found.float(), expected, HALF[torch.bfloat16])
    assert all(torch.isfinite(gradient).all() for gradient in gradients(holder).values())


@each_adding
@each_model
def test_only_the_methods_parameters_train_and_each_gets_a_finite_gradient(name, family, made_for, ids):
    model = made_for(name, family).train()
    base = set(dict(model.named_parameters()))
    _, places = adapt(model, name, EVERYTHING)
    parts = inject.parts(model).items()
    own = {f"{path}.{key}" for path, part in parts for key, one in part.named_parameters() if one.requires_grad}
    assert set(trainable(model)) - set(inject.trained_base(model)) == own
    assert len(inject.adapters(model)) == len(places)
    assert not own & base
    loss_of(model, ids)
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients(model).values())
    randomise(model)
    loss_of(model, ids)
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in gradients(model).values())
    trained = inject.trained_base(model)
    assert all(parameter.grad is None for key, parameter in model.named_parameters() if key in base - set(trained))


@each_method
@each_model
def test_three_optimizer_steps_leave_every_bit_of_the_base(name, family, made_for, ids):
    model = made_for(name, family).train()
    before = snapshot(model)
    adapt(model, name, EVERYTHING)
    started = snapshot(model)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1)
    for _ in range(3):
        loss_of(model, ids)
        optimizer.step()
    after = model.state_dict()
    trained = inject.trained_base(model)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items() if key not in trained)
    assert all(not torch.equal(after[key], started[key]) for key in trainable(model))


@each_method
@each_model
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_gives_the_same_gradients(name, family, dropout, made_for, ids):
    if dropout and "dropout" not in methods.load(name).Config.model_fields:
        pytest.skip("the method has no dropout")
    if obstacle := methods.load(name).obstacle(config_for(name), "checkpointing"):
        pytest.skip(obstacle)
    model = made_for(name, family).train()
    adapt(model, name, EVERYTHING, **({"dropout": dropout} if dropout else {}))
    randomise(model)
    torch.manual_seed(5)
    loss_of(model, ids)
    expected = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(5)
    loss_of(model, ids)
    for key, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[key]), key


@at_each_site
def test_dropout_acts_in_training_only(name, kind):
    if "dropout" not in methods.load(name).Config.model_fields:
        pytest.skip("the method has no dropout")

    def same_but_for(dropout):
        torch.manual_seed(11)
        return adapted_holder(name, kind, dropout=dropout)

    holder, without = same_but_for(0.5), same_but_for(0.0)
    x = inputs(kind, torch.float64)
    assert torch.equal(holder.eval()(x), without.eval()(x))
    assert torch.equal(holder(x), holder(x))
    holder.train()
    if kind == "embedding":  # there is no input to drop: ids are looked up
        assert torch.equal(holder(x), without(x))
    else:
        assert not torch.equal(holder(x), without(x))
        assert not torch.equal(holder(x), holder(x))


@at_each_site
def test_compiled_without_a_break_it_equals_eager(name, kind):
    """Traced and differentiated by the compiler's front end, which needs no C++ compiler and takes a second."""
    _compiled_equals_eager(name, kind, "aot_eager")


@having(NAMES, lambda method: method.place == "targets")
def test_compiled_to_machine_code_it_equals_eager(name):
    """The one slow test of this suite: about ten seconds for each method where nothing is cached."""
    if not any(shutil.which(compiler) for compiler in ("c++", "g++", "clang++")):
        pytest.skip("there is no C++ compiler on this machine")
    _compiled_equals_eager(name, "linear", "inductor")


def _compiled_equals_eager(name, kind, backend):
    holder = adapted_holder(name, kind, torch.float32).train()
    x = inputs(kind)
    expected = holder(x)
    expected.square().sum().backward()
    eager = gradients(holder)
    holder.zero_grad()
    torch._dynamo.reset()
    found = torch.compile(holder, fullgraph=True, backend=backend)(x)
    found.square().sum().backward()
    assert_close(found, expected.detach(), EXACT[torch.float32])
    for key, gradient in gradients(holder).items():
        assert_close(gradient, eager[key], EXACT[torch.float32])


@having(NAMES, lambda method: method.place == "targets" and "linear" in method.kinds)
@pytest.mark.parametrize("kind", PACKED_KINDS)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_on_a_packed_base_it_equals_one_on_the_dequantised_weight(name, training, kind):
    """Of int8, where in evaluation inputs are rounded too, with inputs that are not; see the next test for those."""
    holders = [Holder(kind), Holder("linear")]
    with torch.no_grad():
        holders[1].target.weight.copy_(holders[0].W)
        holders[1].target.bias.copy_(holders[0].target.bias)
    stored = holders[0].target.weight.detach().clone()
    x, outputs = [inputs("linear").requires_grad_()], []
    x.append(x[0].detach().clone().requires_grad_())
    for holder, given in zip(holders, x, strict=True):
        adapt(holder, name)
        torch.manual_seed(3)
        randomise(holder)
        holder.train(training)
        with quantization.unrounded_inputs(holder):
            outputs.append(holder(given))
        outputs[-1].square().sum().backward()
    assert_close(outputs[0], outputs[1], PACKED)
    assert_close(x[0].grad, x[1].grad, PACKED)
    expected = gradients(holders[1])
    for key, gradient in gradients(holders[0]).items():
        assert_close(gradient, expected[key], PACKED)
    assert torch.equal(holders[0].target.weight, stored)


@having(NAMES, lambda method: method.place == "targets" and "linear" in method.kinds)
def test_on_an_int8_base_it_adds_to_the_frozen_product_as_that_is(name):
    linear = nn.Linear(IN, OUT)
    holder = Holder("int8")
    holder.target = packed(linear, "int8")
    adapt(holder, name)
    randomise(holder)
    holder.eval()

    def closed_form(x):
        rows = x.reshape(-1, IN)
        return int8_product(rows, linear.weight.detach(), linear.bias.detach()).view(*x.shape[:-1], OUT)

    x = inputs("linear")
    adapter = holder.target.adapter
    expected = adapter(sites.as_base(holder.target, closed_form), x)
    assert_close(holder(x), expected, INT8_CONSTANT)
    with quantization.unrounded_inputs(holder):
        assert not torch.allclose(holder(x), expected, rtol=0, atol=1e-4), "no input was rounded"


# ---- coming and going ----


@each_adding
@each_model
def test_a_graft_is_invisible_and_can_be_undone(name, family, make_model, ids):
    model = make_model(family)
    before, expected = snapshot(model), logits(model, ids)
    classes = {path: type(module) for path, module in model.named_modules()}
    objects = {path: id(module) for path, module in model.named_modules()}
    adapt(model, name, EVERYTHING)
    randomise(model)
    grafted = model.state_dict()
    trained = inject.trained_base(model)
    assert all(torch.equal(grafted[key], tensor) for key, tensor in before.items() if key not in trained)
    marks = (".adapter.", f".{inject.SHARED}.")
    assert all(any(mark in f".{key}" for mark in marks) for key in grafted.keys() - before.keys())
    for path, original in classes.items():
        assert isinstance(model.get_submodule(path), original)
        assert id(model.get_submodule(path)) == objects[path]
    assert not torch.equal(logits(model, ids), expected)
    inject.ungraft(model)
    assert list(model.state_dict()) == list(before)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert trained or torch.equal(logits(model, ids), expected)


@each_method
@each_model
def test_what_is_saved_and_loaded_gives_the_same_logits_bit_for_bit(name, family, made_for, ids, tmp_path):
    model = made_for(name, family)
    config, _ = adapt(model, name, EVERYTHING)
    randomise(model)
    save_adapter(tmp_path, model, origin_of(name, config))
    again = made_for(name, family)
    attach(again, read_adapter(tmp_path))
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert set(trainable(again)) == set(trainable(model))


@each_adding
def test_a_deep_copy_is_a_model_of_its_own(name, make_model, ids):
    model = make_model()
    adapt(model, name, EVERYTHING)
    randomise(model)
    expected = logits(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, ids), expected)
    randomise(twin)
    assert not torch.equal(logits(twin, ids), expected)
    assert torch.equal(logits(model, ids), expected)
    inject.ungraft(twin)
    assert torch.equal(logits(model, ids), expected)


@each_adding
def test_train_and_eval_reach_the_adapter(name, make_model):
    model = make_model()
    for training in (True, False):
        model.train(training)
        adapt(model, name, EVERYTHING)
        adapters = inject.adapters(model).values()
        assert {module.training for adapter in adapters for module in adapter.modules()} == {training}
        model.train(not training)
        assert {module.training for adapter in adapters for module in adapter.modules()} == {not training}
        inject.ungraft(model)


@at_each_site
def test_an_adapter_keeps_nothing_of_the_bases_size(name, kind):
    """Neither does it save such a thing: files and memory follow the rank, not the model."""
    adapter = adapted_holder(name, kind).target.adapter
    tensors = [*adapter.parameters(), *adapter.buffers(), *adapter.peft_tensors().values()]
    assert all(tensor.numel() < IN * OUT for tensor in tensors)


@having(NAMES, lambda method: method.place == "targets")
def test_every_learning_rate_factor_is_of_a_parameter(name):
    fields = methods.load(name).Config.model_fields
    for changes in ({}, {"loraplus_lr_ratio": 16.0} if "loraplus_lr_ratio" in fields else {}):
        adapter = adapted_holder(name, **changes).target.adapter
        assert set(adapter.learning_rate_factors()) <= set(dict(adapter.named_parameters()))


def test_the_names_are_those_of_the_files():
    assert {"lora", "dora"} <= set(NAMES)
    assert list(NAMES) == sorted(NAMES)
    for name in NAMES:
        method = methods.load(name)
        assert method.Config.model_fields["type"].default == name
        assert issubclass(method, nn.Module)
    for name in ("_protocol", "no_such_method", ""):
        with pytest.raises(KeyError):
            methods.load(name)
