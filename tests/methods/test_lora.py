import math

import pytest
import torch
from pydantic import ValidationError

from peftcli import inject
from peftcli.errors import RecipeError
from peftcli.methods.lora import gaussian, kaiming
from peftcli.ops.dropout import dropout
from tests.methods.building import (
    KINDS,
    Holder,
    adapt,
    adapted_holder,
    assert_close,
    base_of,
    config_for,
    inputs,
    logits,
    randomise,
)
from tests.tolerances import EXACT, STANDARD_ERRORS

FP64 = EXACT[torch.float64]
WITH_INPUTS = ("linear", "conv1d")


def factors(holder):
    lora = holder.target.adapter
    return lora.A, lora.B, lora.scale


# ---- the closed form ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("r", "alpha", "rslora", "s"), [(4, 6.0, False, 1.5), (4, 6.0, True, 3.0), (8, None, False, 2)]
)
def test_the_output_is_that_of_the_dense_weight(kind, r, alpha, rslora, s):
    holder = adapted_holder("lora", kind, r=r, alpha=alpha, rslora=rslora)
    A, B, scale = factors(holder)
    assert scale == s
    assert (A.shape, B.shape) == ((r, holder.W.shape[1]), (holder.W.shape[0], r))
    x = inputs(kind, torch.float64)
    W = holder.W + s * (B @ A).detach()
    assert_close(holder(x), holder.plain(x, W), FP64)
    assert_close(holder.target.adapter.merged(holder.W), W, FP64)


@pytest.mark.parametrize("kind", WITH_INPUTS)
def test_the_gradients_are_those_of_the_paper(kind):
    holder = adapted_holder("lora", kind, alpha=6.0)
    A, B, s = factors(holder)
    x = inputs(kind, torch.float64).requires_grad_()
    y = holder(x)
    g = torch.randn_like(y)
    y.backward(g)
    x_TI, g_TO = x.detach().flatten(0, 1), g.flatten(0, 1)
    with torch.no_grad():
        assert_close(B.grad, s * g_TO.T @ (x_TI @ A.T), FP64)
        assert_close(A.grad, s * (g_TO @ B).T @ x_TI, FP64)
        assert_close(x.grad, g @ (holder.W + s * B @ A), FP64)


def test_an_embeddings_gradients_fall_on_the_rows_that_were_looked_up():
    holder = adapted_holder("lora", "embedding", alpha=6.0)
    A, B, s = factors(holder)
    ids = torch.tensor([[3, 5, 3]])
    y = holder(ids)
    g = torch.randn_like(y)
    y.backward(g)
    one_hot = torch.nn.functional.one_hot(ids[0], A.shape[1]).double()
    with torch.no_grad():
        assert_close(A.grad, s * (g[0] @ B).T @ one_hot, FP64)
        assert_close(B.grad, s * g[0].T @ (one_hot @ A.T), FP64)
    assert set(A.grad.abs().sum(0).nonzero().flatten().tolist()) == {3, 5}


@pytest.mark.parametrize("kind", WITH_INPUTS)
def test_at_the_first_step_only_b_has_a_gradient(kind):
    holder = adapted_holder("lora", kind, noisy=False, alpha=6.0)
    A, B, s = factors(holder)
    x = inputs(kind, torch.float64)
    y = holder(x)
    g = torch.randn_like(y)
    y.backward(g)
    assert torch.equal(A.grad, torch.zeros_like(A))
    assert_close(B.grad, s * g.flatten(0, 1).T @ (x.flatten(0, 1) @ A.detach().T), FP64)


@pytest.mark.parametrize("kind", WITH_INPUTS)
def test_dropout_acts_on_the_adapters_input_alone(kind):
    holder = adapted_holder("lora", kind, dropout=0.4).train()
    A, B, s = factors(holder)
    x = inputs(kind, torch.float64)
    torch.manual_seed(3)
    y = holder(x)
    torch.manual_seed(3)
    dropped = dropout(x, 0.4)
    assert not torch.equal(dropped, x)
    with torch.no_grad():
        assert_close(y, holder.plain(x, holder.W) + s * dropped @ A.T @ B.T, FP64)


def test_gradcheck():
    holder = adapted_holder("lora")
    A, B, _ = factors(holder)
    x = inputs("linear", torch.float64, length=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: holder(x), (x, A, B), fast_mode=True)


def test_rank_stabilised_is_lora_with_another_alpha():
    one = adapted_holder("lora", r=4, alpha=6.0, rslora=True)
    other = adapted_holder("lora", r=4, alpha=6.0 * math.sqrt(4))
    other.load_state_dict(one.state_dict())
    x = inputs("linear", torch.float64)
    assert torch.equal(one(x), other(x))


# ---- the starts ----


def test_kaiming_is_uniform_in_one_over_the_root_of_the_inputs():
    I = 4096  # noqa: E741
    A = kaiming(8, I, torch.Generator().manual_seed(0)) * math.sqrt(I)
    assert 1 - 10 / A.numel() * STANDARD_ERRORS < A.max() <= 1
    assert -1 <= A.min() < 10 / A.numel() * STANDARD_ERRORS - 1
    assert abs(A.mean()) <= STANDARD_ERRORS / math.sqrt(3 * A.numel())
    assert abs(A.square().mean() - 1 / 3) <= STANDARD_ERRORS * math.sqrt(4 / 45 / A.numel())


def test_gaussian_has_the_deviation_one_over_r():
    r = 8
    A = gaussian(r, 4096, torch.Generator().manual_seed(0)) * r
    assert abs(A.mean()) <= STANDARD_ERRORS / math.sqrt(A.numel())
    assert abs(A.square().mean() - 1) <= STANDARD_ERRORS * math.sqrt(2 / A.numel())
    assert A.abs().max() > 3, "this is not a normal distribution"


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_linear_layers_start_at_b_zero(init):
    A, B, _ = factors(adapted_holder("lora", init=init, noisy=False))
    assert not B.any()
    assert A.count_nonzero() == A.numel()


def test_an_embedding_starts_at_a_zero_with_a_gaussian_b():
    A, B, _ = factors(adapted_holder("lora", "embedding", noisy=False))
    assert not A.any()
    assert abs(B.square().mean() - 1) <= STANDARD_ERRORS * math.sqrt(2 / B.numel())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_starts_as_the_best_approximation_of_the_base_and_computes_the_base(kind, rslora):
    holder = adapted_holder("lora", kind, torch.float32, init="pissa", r=4, alpha=3.0, rslora=rslora, noisy=False)
    A, B, s = factors(holder)
    U, S, Vh = torch.linalg.svd(holder.W, full_matrices=False)
    assert_close(s * B @ A, U[:, :4] @ torch.diag(S[:4]) @ Vh[:4], EXACT[torch.float32])
    assert_close(A.norm(dim=1), B.norm(dim=0).detach(), EXACT[torch.float32])  # the root of S on either side
    x = inputs(kind)
    assert_close(holder(x), holder.plain(x, holder.W), EXACT[torch.float32])
    assert_close(holder.target.adapter.merged(holder.W), holder.W, EXACT[torch.float32])


@pytest.mark.parametrize("kind", KINDS)
def test_after_its_start_pissa_adds_what_its_factors_have_moved(kind):
    holder = adapted_holder("lora", kind, init="pissa", noisy=False)
    A0, B0, s = (tensor.detach().clone() if torch.is_tensor(tensor) else tensor for tensor in factors(holder))
    randomise(holder)
    A, B, _ = factors(holder)
    W = (holder.W + s * (B @ A - B0 @ A0)).detach()
    x = inputs(kind, torch.float64)
    assert_close(holder(x), holder.plain(x, W), FP64)
    assert set(dict(holder.target.adapter.named_parameters())) == {"A", "B"}


def test_orthogonal_starts_at_nothing_with_neither_factor_zero():
    holder = adapted_holder("lora", "linear", torch.float32, init="orthogonal", r=6, noisy=False)
    A, B, _ = factors(holder)
    assert torch.linalg.matrix_rank(A) == torch.linalg.matrix_rank(B) == 3
    assert float((B @ A).detach().abs().max()) <= EXACT[torch.float32]
    assert A.count_nonzero() == A.numel()
    assert B.count_nonzero() == B.numel()


@pytest.mark.parametrize("fields", [{"r": 5}, {"r": 4, "rank_pattern": {"target": 3}}], ids=str)
def test_orthogonal_refuses_an_odd_rank(fields):
    with pytest.raises(ValidationError, match="r must be even"):
        config_for("lora", init="orthogonal", **fields)


# ---- patterns ----


def test_patterns_choose_rank_and_alpha_by_module(make_model):
    model = make_model()
    patterns = {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 6, r".*\.mlp\..*": 3},
        "alpha_pattern": {"q_proj": 12.0, r"layers\.0\.mlp\.down_proj": 1.0},
    }
    adapt(model, "lora", ["q_proj", "v_proj", "down_proj", "o_proj"], r=4, alpha=10.0, **patterns)
    found = {name.removeprefix("model.layers."): (len(a.A), a.scale) for name, a in inject.adapters(model).items()}
    assert found == {
        "0.self_attn.q_proj": (6, 2.0),
        "0.self_attn.v_proj": (4, 2.5),
        "0.self_attn.o_proj": (4, 2.5),
        "0.mlp.down_proj": (3, 1 / 3),
        "1.self_attn.q_proj": (2, 6.0),  # the first pattern that matches counts
        "1.self_attn.v_proj": (4, 2.5),
        "1.self_attn.o_proj": (4, 2.5),
        "1.mlp.down_proj": (3, 10 / 3),
    }


def test_a_pattern_is_no_mere_substring(make_model):
    with pytest.raises(RecipeError, match="proj matches none"):
        adapt(make_model(), "lora", ["q_proj"], rank_pattern={"proj": 2})


def test_without_an_alpha_each_rank_gets_twice_itself():
    config = config_for("lora", r=4, rank_pattern={"b": 16}, rslora=False)
    assert (config.alpha_at("a"), config.alpha_at("b")) == (8, 32)
    assert (config.scale_at("a"), config.scale_at("b")) == (2, 2)


def test_patterns_that_match_nothing_are_all_named(make_model):
    with pytest.raises(RecipeError) as raised:
        adapt(make_model(), "lora", ["q_proj"], rank_pattern={"k_proj": 2, "q_proj": 3}, alpha_pattern={"w": 1.0})
    assert [problem.message for problem in raised.value.problems] == [
        "method.rank_pattern: k_proj matches none of the adapted modules",
        "method.alpha_pattern: w matches none of the adapted modules",
    ]


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_must_be_patterns_of_positive_numbers(field):
    with pytest.raises(ValidationError, match="must be greater than 0"):
        config_for("lora", **{field: {"q_proj": 0}})
    with pytest.raises(ValidationError, match="not a regular expression"):
        config_for("lora", **{field: {"(q_proj": 2}})


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan"), "8", True])
def test_alpha_must_be_a_positive_number(value):
    with pytest.raises(ValidationError):
        config_for("lora", alpha=value)
    with pytest.raises(ValidationError):
        config_for("lora", alpha_pattern={"q_proj": value})
    with pytest.raises(ValidationError):
        config_for("lora", loraplus_lr_ratio=value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_above_that_of_the_weight_is_refused(kind):
    holder = Holder(kind)
    with pytest.raises(RecipeError, match="25 is more than the 24 that target"):
        adapt(holder, "lora", r=25)
    assert isinstance(adapt(holder, "lora", r=24)[0].r, int)


# ---- LoRA+ ----


def test_lora_plus_speeds_up_b_alone():
    assert adapted_holder("lora").target.adapter.learning_rate_factors() == {}
    assert adapted_holder("lora", loraplus_lr_ratio=16.0).target.adapter.learning_rate_factors() == {"B": 16.0}
    dora = adapted_holder("dora", loraplus_lr_ratio=16.0).target.adapter
    assert dora.learning_rate_factors() == {"lora.B": 16.0}  # not the magnitude, a vector as it is


# ---- in a model ----


def test_the_forward_never_forms_the_dense_update(monkeypatch, make_model, ids):
    """Rank r costs r (I + O) products a token, never I · O: no tensor that is made has a weight's size."""
    model = make_model()
    adapt(model, "lora", "all-linear", r=2)
    randomise(model)
    sizes = set()

    class Watching(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if torch.is_tensor(result) and not function.is_view:
                sizes.add(tuple(result.shape))
            return result

    with Watching():
        logits(model, ids)
    assert sizes
    assert not sizes & {(48, 80), (80, 48), (48, 48), (24, 48), (48, 24)}


@pytest.mark.parametrize("kind", KINDS)
def test_project_is_the_weight_times_the_transposed_factor(kind):
    """What a decomposition computes its norms from, through the frozen module and without its bias."""
    holder = adapted_holder("lora", kind)
    A = factors(holder)[0].detach()
    assert_close(base_of(holder).project(A), holder.W @ A.T, FP64)
    assert torch.equal(base_of(holder).dense(), holder.W)


# ---- what siblings share ----


def dropped_inputs(model, ids):
    """Returns which inputs of each adapter a forward pass drops, by module path."""
    masks = {}
    for name, adapter in inject.adapters(model).items():
        own = adapter.input

        def noted(x, name=name, own=own):
            dropped = own(x)
            masks[name] = dropped.detach() == 0
            return dropped

        adapter.input = noted
    model(input_ids=ids)
    for adapter in inject.adapters(model).values():
        del adapter.input
    return masks


@pytest.mark.parametrize("p", [0.1, 0.4])
def test_siblings_that_read_one_input_drop_the_same_and_nobody_else_does(make_model, ids, p):
    model = make_model().train()
    adapt(model, "lora", "all-linear", dropout=p)
    masks = dropped_inputs(model, ids)
    for layer in (0, 1):
        q, k, v, o = (masks[f"model.layers.{layer}.self_attn.{name}_proj"] for name in "qkvo")
        gate, up = (masks[f"model.layers.{layer}.mlp.{name}_proj"] for name in ("gate", "up"))
        assert torch.equal(q, k)
        assert torch.equal(q, v)
        assert torch.equal(gate, up)
        assert not torch.equal(q, o)
        assert not torch.equal(q, gate)
    assert not torch.equal(masks["model.layers.0.self_attn.q_proj"], masks["model.layers.1.self_attn.q_proj"])
    again = dropped_inputs(model, ids)
    assert not any(torch.equal(masks[name], again[name]) for name in masks)


def test_siblings_keep_one_dropped_input(make_model, ids):
    """Three projections of an attention keep it once, and no step leaves anything behind."""
    model = make_model().train()
    adapt(model, "lora", r"model\.layers\.0\.self_attn\.[qkv]_proj", dropout=0.1)
    kept = {}

    def pack(tensor):
        if tensor.numel() == ids.numel() * model.config.hidden_size:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    adapter = inject.adapters(model)["model.layers.0.self_attn.q_proj"]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.randn(*ids.shape, model.config.hidden_size)
        for name in "qkv":
            model.get_submodule(f"model.layers.0.self_attn.{name}_proj")(x)
    assert len(kept) == 1
    del x
    assert adapter.shared_input._last is None


def test_two_passes_of_one_module_drop_differently():
    holder, x = adapted_holder("lora", dropout=0.3).train(), inputs("linear", torch.float64)
    assert not torch.equal(holder(x), holder(x))
