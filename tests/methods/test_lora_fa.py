"""LoRA-FA, an option of LoRA: what does not train, what is not kept, and the projected gradient."""

import pytest
import torch
from pydantic import ValidationError

from peftcli import inject
from peftcli.checkpoint.adapter import adapter_tensors
from peftcli.errors import RecipeError
from peftcli.methods.lora import LoRA
from peftcli.training.optimizers import trainable_parameters
from tests.methods.building import (
    IN,
    OUT,
    Holder,
    adapt,
    adapted_holder,
    assert_close,
    config_for,
    inputs,
    logits,
    randomise,
    trainable,
)
from tests.methods.test_peft_parity import give, peft_twin, step
from tests.tolerances import EXACT, SAME_STEPS

FP64 = EXACT[torch.float64]
with_inputs = pytest.mark.parametrize("kind", ["linear", "conv1d"])
each_form = pytest.mark.parametrize("form", [True, "projected"])


def before_step(holder, form):
    LoRA.before_step(config_for("lora", lora_fa=form), inject.adapters(holder))


# ---- A is frozen ----


@each_form
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_b_alone_trains_and_every_bit_of_a_stays(form, family, make_model, ids):
    model = make_model(family).train()
    config, sites = adapt(model, "lora", "all-linear", lora_fa=form)
    started = {path: adapter.A.clone() for path, adapter in inject.adapters(model).items()}
    assert set(trainable_parameters(model)) == {f"{site.name}.adapter.B" for site in sites}
    assert sum(p.numel() for p in trainable(model).values()) == sum(config.r * site.out_features for site in sites)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        step(model, ids)
        LoRA.before_step(config, inject.adapters(model))
        optimizer.step()
    for path, adapter in inject.adapters(model).items():
        assert torch.equal(adapter.A, started[path])
        assert adapter.A.grad is None
        assert adapter.B.any()


@with_inputs
def test_output_and_gradient_are_those_of_lora(kind):
    lora, twin = (adapted_holder("lora", kind, alpha=6.0, lora_fa=frozen) for frozen in (False, True))
    twin.load_state_dict(lora.state_dict())
    x = inputs(kind, torch.float64)
    for holder in (lora, twin):
        holder(x).square().sum().backward()
    assert torch.equal(twin(x), lora(x))
    assert torch.equal(twin.target.adapter.B.grad, lora.target.adapter.B.grad)
    assert_close(twin.target.adapter.merged(twin.W), lora.target.adapter.merged(lora.W), FP64)


def test_a_is_in_the_files_all_the_same(make_model):
    frozen, plain = make_model(), make_model()
    config, _ = adapt(frozen, "lora", ["q_proj"], lora_fa=True)
    other, _ = adapt(plain, "lora", ["q_proj"])
    for key, tensor in adapter_tensors(plain).items():
        assert torch.equal(adapter_tensors(frozen)[key], tensor)
    assert LoRA.peft_config(config) == LoRA.peft_config(other)


# ---- what the backward pass keeps ----


def kept(holder, x):
    """Returns the dtypes of what autograd keeps of the input's size, and whether it is the input itself."""
    found = []

    def pack(tensor):
        if tensor.numel() == x.numel():
            found.append((tensor.dtype, tensor.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = holder(x)
    assert y.numel() != x.numel()
    y.sum().backward()
    assert all(parameter.grad.any() for parameter in trainable(holder).values())
    return found


def holder_of(kind, dtype, **fields):
    holder = Holder(kind, dtype).train()
    adapt(holder, "lora", r=2, **fields)
    randomise(holder)
    return holder


@with_inputs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inner", [True, False], ids=["inside a model", "at its start"])
def test_nothing_of_the_inputs_size_is_kept(kind, dtype, inner):
    x = inputs(kind, dtype).requires_grad_(inner)
    plain = kept(holder_of(kind, dtype), x)
    assert [one for one, _ in plain] == [torch.float32], "plain LoRA needs the input for A"
    assert plain[0][1] == (dtype == torch.float32), "the input itself, or its float32 copy"
    assert kept(holder_of(kind, dtype, lora_fa=True), x) == []
    assert kept(holder_of(kind, dtype, lora_fa=True, init="gaussian"), x) == []


@with_inputs
def test_dropout_keeps_its_mask_and_only_where_the_input_gets_a_gradient(kind):
    x = inputs(kind)
    assert kept(holder_of(kind, torch.float32, lora_fa=True, dropout=0.5), x) == []
    x.requires_grad_()
    assert kept(holder_of(kind, torch.float32, lora_fa=True, dropout=0.5), x) == [(torch.bool, False)]
    assert kept(holder_of(kind, torch.float32, lora_fa=True, dropout=0.1), x) == []  # a few places


def test_with_pissa_too():
    x = inputs("linear").requires_grad_()
    assert kept(holder_of("linear", torch.float32, lora_fa=True, init="pissa"), x) == []


def test_under_gradient_checkpointing_nothing_changes(make_model, ids):
    model = make_model().train()
    adapt(model, "lora", "all-linear", lora_fa=True, dropout=0.2)
    randomise(model)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        step(model, ids)
        found.append([parameter.grad for parameter in trainable(model).values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_compiled_without_a_break_it_equals_eager():
    holder, x = adapted_holder("lora", lora_fa=True), inputs("linear", torch.float64)
    expected = holder(x)
    expected.square().sum().backward()
    gradient = holder.target.adapter.B.grad
    holder.zero_grad()
    torch._dynamo.reset()
    found = torch.compile(holder, fullgraph=True, backend="aot_eager")(x)
    found.square().sum().backward()
    assert_close(found, expected, FP64)
    assert_close(holder.target.adapter.B.grad, gradient, FP64)


# ---- the projected gradient ----


@pytest.mark.parametrize("rslora", [False, True])
@with_inputs
def test_the_update_moves_by_the_full_gradients_projection_on_the_rows_of_a(kind, rslora):
    holder, rate = adapted_holder("lora", kind, alpha=6.0, rslora=rslora, lora_fa="projected"), 0.01
    adapter, x = holder.target.adapter, inputs(kind, torch.float64)
    before, upstream = adapter.merged(holder.W).detach(), torch.randn(3, 7, OUT, dtype=torch.float64)
    holder(x).backward(upstream)
    before_step(holder, "projected")
    torch.optim.SGD([adapter.B], lr=rate).step()
    full = upstream.flatten(0, 1).T @ x.flatten(0, 1)  # ∂L/∂W, as full training would have it
    A = adapter.A.detach()
    projector = torch.linalg.pinv(A) @ A
    moved = adapter.merged(holder.W).detach() - before
    assert_close(moved, -rate * full @ projector, EXACT[torch.float32])  # but for the 1e-8 on the diagonal
    exact = A.T @ torch.linalg.inv(A @ A.T + 1e-8 * torch.eye(len(A), dtype=A.dtype)) @ A
    assert_close(moved, -rate * full @ exact, 10 * FP64)  # the difference of two weights


def test_a_square_a_makes_it_full_training():
    holder, x = adapted_holder("lora", r=IN, lora_fa="projected"), inputs("linear", torch.float64)
    adapter = holder.target.adapter
    with torch.no_grad():
        adapter.A.copy_(torch.linalg.qr(torch.randn(IN, IN)).Q)
    before = adapter.merged(holder.W).detach()
    holder(x).sum().backward()
    before_step(holder, "projected")
    torch.optim.SGD([adapter.B], lr=0.1).step()
    full = torch.ones(21, OUT, dtype=torch.float64).T @ x.flatten(0, 1)
    assert_close(adapter.merged(holder.W) - before, -0.1 * full, EXACT[torch.float32])


@pytest.mark.parametrize("form", [False, True])
def test_only_projected_changes_the_gradient(form):
    holder = adapted_holder("lora", lora_fa=form)
    holder(inputs("linear", torch.float64)).sum().backward()
    gradient = holder.target.adapter.B.grad.clone()
    before_step(holder, form)
    assert torch.equal(holder.target.adapter.B.grad, gradient)
    before_step(holder, "projected")
    assert not torch.allclose(holder.target.adapter.B.grad, gradient)


def test_an_adapter_that_no_token_reached_is_left_alone():
    holder = adapted_holder("lora", lora_fa="projected")
    before_step(holder, "projected")
    assert holder.target.adapter.B.grad is None


@pytest.mark.filterwarnings("ignore:::peft", "ignore::FutureWarning:transformers")
def test_it_learns_as_pefts_optimizer_does(make_model, ids, monkeypatch):
    from peft.optimizers import create_lorafa_optimizer, lorafa

    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)  # with it, PEFT multiplies in bfloat16
    model, targets = make_model("llama", torch.float64), ["q_proj", "v_proj", "down_proj"]
    twin = peft_twin(model, "lora", targets, r=4, lora_alpha=6)
    config, _ = adapt(model, "lora", targets, r=4, alpha=6.0, lora_fa="projected")
    model.double()
    randomise(model)
    give(twin, adapter_tensors(model))
    ours = torch.optim.AdamW(trainable(model).values(), lr=0.01, eps=0, weight_decay=0)
    theirs = create_lorafa_optimizer(twin, r=4, lora_alpha=6, lr=0.01)
    for group in theirs.param_groups:
        group["eps"] = 0  # which Adam's authors and PEFT add at different places
    for _ in range(4):
        step(model, ids)
        step(twin, ids)
        LoRA.before_step(config, inject.adapters(model))
        ours.step()
        theirs.step()
        ours.zero_grad()
        twin.zero_grad()
        assert_close(logits(model, ids), logits(twin, ids), SAME_STEPS)
    for path, adapter in inject.adapters(model).items():
        layer = twin.get_submodule(f"base_model.model.{path}")
        assert torch.equal(adapter.A, layer.lora_A["default"].weight)
        assert_close(adapter.B, layer.lora_B["default"].weight, SAME_STEPS)


# ---- what it cannot be joined with ----


@each_form
def test_an_embedding_whose_a_would_stay_zero_is_refused(form):
    with pytest.raises(RecipeError, match="lora_fa: target is an embedding, whose A starts at 0"):
        adapt(Holder("embedding"), "lora", lora_fa=form)
    holder = Holder("embedding")
    adapt(holder, "lora", lora_fa=form, init="pissa")
    assert holder.target.adapter.A.any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_fa": True, "loraplus_lr_ratio": 16.0}, "loraplus_lr_ratio"),
        ({"lora_fa": "projected", "loraplus_lr_ratio": 16.0}, "loraplus_lr_ratio"),
        ({"lora_fa": "projected", "init": "orthogonal"}, "full rank"),
        ({"lora_fa": "frozen"}, "lora_fa"),
        ({"lora_fa": 1}, "lora_fa"),
        ({"lora_fa": None}, "lora_fa"),
    ],
    ids=str,
)
def test_what_does_not_go_together(fields, message):
    with pytest.raises(ValidationError, match=message):
        config_for("lora", **fields)


def test_dora_has_no_frozen_a():
    with pytest.raises(ValidationError, match="lora_fa: an option of lora alone; dora trains A too"):
        config_for("dora", lora_fa=True)
