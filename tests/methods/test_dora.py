import warnings

import pytest
import torch

from peftcli import inject
from peftcli.checkpoint.adapter import attach, read_adapter, save_adapter
from peftcli.errors import RecipeError
from peftcli.methods import _decomposed
from peftcli.ops import decomposition
from peftcli.ops.dropout import dropout
from tests.methods.building import (
    KINDS,
    Holder,
    adapt,
    adapted_holder,
    assert_close,
    base_of,
    inputs,
    logits,
    origin_of,
    randomise,
    trainable,
)
from tests.methods.skeletons import count, llama_7b
from tests.tolerances import EXACT

FP64 = EXACT[torch.float64]
WITH_INPUTS = ("linear", "conv1d")


def parts(holder):
    """Returns A, B, s and m of the holder's adapter, and its V, n and W' by the paper's formula; all detached."""
    dora = holder.target.adapter
    A, B, s, m = dora.lora.A.detach(), dora.lora.B.detach(), dora.lora.scale, dora.decomposition.m.detach()
    V = holder.W + s * B @ A
    n = torch.stack([row.dot(row).sqrt() for row in V])  # a row for each output, over the inputs
    return A, B, s, m, V, n, torch.diag(m / n) @ V


def norms_of(holder):
    """Returns `n` [O] as the adapter computes it."""
    dora = holder.target.adapter
    return dora.decomposition.norms(base_of(holder), dora.lora)


def gradient_of_weight(holder, x, g):
    """Returns `∂L/∂W'` [O, I] for the gradient `g` of the output."""
    W = torch.zeros_like(holder.W, requires_grad=True)
    holder.plain(x, W).backward(g)
    return W.grad


# ---- the closed form ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("detach_norm", [True, False])
def test_the_output_is_that_of_the_dense_weight(kind, detach_norm):
    holder = adapted_holder("dora", kind, alpha=6.0, detach_norm=detach_norm)
    A, B, s, m, _, _, merged = parts(holder)
    assert (s, A.shape[0], B.shape[1], m.shape) == (1.5, 4, 4, (40,))
    x = inputs(kind, torch.float64)
    assert_close(holder(x), holder.plain(x, merged), FP64)
    assert_close(holder.target.adapter.merged(holder.W), merged, FP64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_magnitudes_start_as_the_rows_lengths(kind):
    holder = adapted_holder("dora", kind, noisy=False)
    assert_close(holder.target.adapter.decomposition.m, (holder.W**2).sum(1).sqrt(), FP64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("detach_norm", [True, False])
def test_the_gradients_are_those_of_the_paper(kind, detach_norm):
    holder = adapted_holder("dora", kind, alpha=6.0, detach_norm=detach_norm)
    A, B, s, m, V, n, merged = parts(holder)
    x = inputs(kind, torch.float64)
    if kind != "embedding":
        x.requires_grad_()
    y = holder(x)
    g = torch.randn_like(y)
    y.backward(g)
    G = gradient_of_weight(holder, x.detach(), g)
    along = (G * V).sum(1) / n
    dV = (m / n)[:, None] * (G if detach_norm else G - (along / n)[:, None] * V)
    dora = holder.target.adapter
    assert_close(dora.decomposition.m.grad, along, FP64)
    assert_close(dora.lora.B.grad, s * dV @ A.T, FP64)
    assert_close(dora.lora.A.grad, s * B.T @ dV, FP64)
    if kind != "embedding":
        assert_close(x.grad, g @ merged, FP64)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_norm_that_is_not_detached(kind):
    holder = adapted_holder("dora", kind, detach_norm=False)
    x = inputs(kind, torch.float64, length=2)
    tensors = tuple(trainable(holder).values())
    assert len(tensors) == 3
    assert torch.autograd.gradcheck(lambda *_: holder(x), tensors, fast_mode=True)


def test_the_two_gradients_are_not_the_same():
    one, other = (adapted_holder("dora", detach_norm=detached) for detached in (True, False))
    other.load_state_dict(one.state_dict())
    other.target.adapter.decomposition.c = one.target.adapter.decomposition.c
    x = inputs("linear", torch.float64)
    for holder in (one, other):
        holder(x).square().sum().backward()
    assert torch.allclose(one.target.adapter.decomposition.m.grad, other.target.adapter.decomposition.m.grad)
    assert not torch.allclose(one.target.adapter.lora.B.grad, other.target.adapter.lora.B.grad)


def test_the_bias_is_never_scaled():
    holder = adapted_holder("dora")
    x = torch.zeros(2, 24, dtype=torch.float64)
    assert_close(holder(x), holder.b.expand(2, 40), FP64)


# ---- properties ----


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_of_the_merged_weight_has_its_magnitude(kind):
    holder = adapted_holder("dora", kind)
    with torch.no_grad():
        holder.target.adapter.decomposition.m.copy_(torch.randn(40))
    merged = holder.target.adapter.merged(holder.W)
    assert_close(merged.norm(dim=1), holder.target.adapter.decomposition.m.detach().abs(), FP64)


def test_only_the_direction_of_v_counts():
    holder = adapted_holder("dora")
    dora = holder.target.adapter
    expected = dora.merged(holder.W).detach()
    with torch.no_grad():
        dora.lora.B *= 3.7
    assert_close(dora.merged(3.7 * holder.W), expected, FP64)


@pytest.mark.parametrize("kind", KINDS)
def test_with_magnitudes_equal_to_the_norms_it_is_lora(kind):
    holder, lora = adapted_holder("dora", kind, noisy=False), Holder(kind, torch.float64)
    lora.load_state_dict({key: value for key, value in holder.state_dict().items() if "adapter" not in key})
    adapt(lora, "lora")
    lora.target.adapter.double()
    randomise(lora)
    dora, x = holder.target.adapter, inputs(kind, torch.float64)
    with torch.no_grad():
        dora.lora.A.copy_(lora.target.adapter.A)
        dora.lora.B.copy_(lora.target.adapter.B)
        assert not torch.allclose(holder(x), lora(x))
        dora.decomposition.m.copy_(parts(holder)[5])
        assert_close(holder(x), lora(x), FP64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_factored_norms_are_the_direct_ones(kind, dtype):
    holder = adapted_holder("dora", kind, dtype)
    A, B, s = holder.target.adapter.lora.factors()
    n = norms_of(holder)
    assert n.dtype == dtype
    assert not n.requires_grad
    assert_close(n, decomposition.direct_row_norms(holder.W, A, B, s).detach(), EXACT[dtype])


def test_autocast_does_not_lower_the_norms_precision():
    holder = adapted_holder("dora", "linear", torch.float32)
    expected = norms_of(holder)
    with torch.autocast("cpu", torch.bfloat16):
        found = norms_of(holder)
    assert torch.equal(found, expected)


# ---- what cancels, and what is zero ----


def cancelling(eps, kind="linear", dtype=torch.float32, **fields):
    """Returns an adapted holder whose even rows' update is −(1 − eps) W, and what those rows are."""
    holder = adapted_holder("dora", kind, dtype, r=4, **fields)
    dora, even = holder.target.adapter, torch.arange(40) % 2 == 0
    with torch.no_grad():
        W = torch.where(even[:, None], -dora.lora.scale * dora.lora.B @ dora.lora.A, holder.W)
        holder.target.weight.copy_(W if kind == "linear" else W.t())
        dora.lora.B[even] *= 1 - eps
        dora.decomposition.c.copy_(decomposition.squared_row_norms(W))
    return holder, even


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [1e-2, 1e-3, 1e-4, 1e-6])
def test_rows_that_nearly_cancel_get_the_direct_norm(kind, eps):
    holder, even = cancelling(eps, kind)
    dora = holder.target.adapter
    A, B, s = (t.detach() if torch.is_tensor(t) else t for t in dora.lora.factors())
    n = norms_of(holder)
    assert torch.equal(n[even], decomposition.direct_row_norms(holder.W, A, B, s)[even])
    factored, lost = decomposition.factored_row_norms(dora.decomposition.c, base_of(holder).project(A), A, B, s)
    assert torch.equal(lost, even)
    assert torch.equal(n[~even], factored[~even])
    assert not torch.equal(n[even], factored[even])
    x = inputs(kind)
    expected = holder.plain(x, dora.merged(holder.W).detach())
    assert_close(holder(x)[..., ~even], expected[..., ~even], EXACT[torch.float32])


def test_the_gradient_passes_through_the_direct_norm_too():
    holder, _ = cancelling(1e-3, dtype=torch.float64, detach_norm=False)
    dora, x = holder.target.adapter, inputs("linear", torch.float64)
    holder(x).square().sum().backward()
    found = [dora.lora.A.grad.clone(), dora.lora.B.grad.clone()]
    A, B, s = dora.lora.factors()
    V = holder.W + s * B @ A
    y = holder.plain(x, (dora.decomposition.m / torch.linalg.vector_norm(V, dim=1))[:, None] * V)
    for one, other in zip(found, torch.autograd.grad(y.square().sum(), (A, B)), strict=True):
        assert_close(one, other, EXACT[torch.float32])  # V itself has lost half its digits


def test_rows_that_cancel_to_nothing_stay_finite():
    holder, even = cancelling(0.0)
    y = holder(inputs("linear"))
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert_close(y[..., even], holder.b[even].expand_as(y[..., even]), EXACT[torch.float32])
    assert all(torch.isfinite(parameter.grad).all() for parameter in trainable(holder).values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("detach_norm", [True, False])
def test_zero_rows_of_the_base_learn_without_nan(kind, detach_norm):
    holder = Holder(kind)
    with torch.no_grad():
        holder.W[::3] = 0
    x = inputs(kind)
    expected = holder(x)
    adapt(holder, "dora", detach_norm=detach_norm)
    assert torch.equal(holder(x), expected)
    optimizer = torch.optim.SGD(trainable(holder).values(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        holder(x).square().sum().backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in trainable(holder).values())
        optimizer.step()
    assert torch.isfinite(holder(x)).all()
    merged = holder.target.adapter.merged(holder.W).detach()
    assert_close(holder(x), holder.plain(x, merged), EXACT[torch.float32])


# ---- dropout ----


@pytest.mark.parametrize("kind", WITH_INPUTS)
@pytest.mark.parametrize("mode", ["branch", "paper"])
def test_what_dropout_acts_on(kind, mode):
    holder = adapted_holder("dora", kind, dropout=0.4, dropout_mode=mode).train()
    A, B, s, m, _, n, _ = parts(holder)
    x, g = inputs(kind, torch.float64).requires_grad_(), m / n
    torch.manual_seed(3)
    y = holder(x)
    torch.manual_seed(3)
    dropped = dropout(x, 0.4)
    update = s * dropped @ A.T @ B.T
    rescaled = (dropped if mode == "paper" else x) @ holder.W.T
    expected = x @ holder.W.T + (g - 1) * rescaled + g * update + holder.b
    assert_close(y, expected.detach(), FP64)
    weights = torch.randn_like(y)
    found = torch.autograd.grad(y, x, weights)[0]
    assert_close(found, torch.autograd.grad(expected, x, weights)[0], FP64)


@pytest.mark.parametrize("kind", KINDS)
def test_without_dropout_both_modes_are_the_same(kind):
    def made(mode):
        torch.manual_seed(11)
        return adapted_holder("dora", kind, dropout=0.4, dropout_mode=mode).eval()

    x = inputs(kind, torch.float64)
    assert torch.equal(made("branch")(x), made("paper")(x))
    if kind == "embedding":  # which has no inputs to drop
        assert torch.equal(made("branch").train()(x), made("paper").train()(x))


def test_in_half_precision_the_papers_dropout_answers_in_the_bases_dtype():
    holder = Holder("linear", torch.bfloat16).train()
    adapt(holder, "dora", dropout=0.4, dropout_mode="paper")
    randomise(holder)
    assert holder(inputs("linear", torch.bfloat16)).dtype == torch.bfloat16


# ---- its other starts ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("init", ["gaussian", "pissa", "orthogonal"])
def test_it_starts_as_its_base_whatever_the_factors_start(kind, init):
    holder = Holder(kind)
    x = inputs(kind)
    expected = holder(x).detach()
    adapt(holder, "dora", init=init)
    assert_close(holder(x), expected, EXACT[torch.float32])
    assert list(inject.adapters(holder)) == ["target"]


# ---- magnitudes alone ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_magnitudes_alone_rescale_the_rows_of_the_base(kind, dropout):
    holder = adapted_holder("dora", kind, magnitude_only_modules=["target"], dropout=dropout, dropout_mode="paper")
    holder.train()
    assert list(trainable(holder)) == ["target.adapter.decomposition.m"]
    m = holder.target.adapter.decomposition.m
    n = (holder.W**2).sum(1).sqrt()
    W = (m.detach() / n)[:, None] * holder.W
    x = inputs(kind, torch.float64)
    y = holder(x)
    assert_close(y, holder.plain(x, W), FP64)
    assert_close(holder.target.adapter.merged(holder.W), W, FP64)
    g = torch.randn_like(y)
    y.backward(g)
    assert_close(m.grad, (gradient_of_weight(holder, x, g) * holder.W).sum(1) / n, FP64)


@pytest.mark.parametrize("kind", KINDS)
def test_magnitudes_alone_start_as_the_base(kind):
    holder, x = Holder(kind), inputs(kind)
    with torch.no_grad():
        holder.W[::3] = 0
    expected = holder(x)
    adapt(holder, "dora", magnitude_only_modules=["target"])
    assert torch.equal(holder(x), expected)


PARTIAL = {"magnitude_only_modules": ["self_attn.o_proj", "up_proj"], "alpha": 6.0}
PARTIAL_GPT2 = {"target_modules": ["c_attn", "c_fc", "wte"], "magnitude_only_modules": ["c_fc", "wte"]}


@pytest.mark.filterwarnings("ignore:::peft", "ignore::FutureWarning:transformers", "ignore:.*with tied.*:UserWarning")
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize(("family", "fields"), [("llama", PARTIAL), ("gpt2", PARTIAL_GPT2)])
def test_peft_computes_the_same_from_zeros_in_place_of_factors(family, fields, init, make_model, ids, tmp_path):
    from peft import PeftModel

    model, fields = make_model(family), {"target_modules": "all-linear", **fields, "init": init}
    config, sites = adapt(model, "dora", **fields)
    randomise(model, 0.1)
    save_adapter(tmp_path, model, origin_of("dora", config, base_model=""))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")
        theirs = PeftModel.from_pretrained(make_model(family), tmp_path).eval()
    assert_close(logits(theirs, ids), logits(model, ids), EXACT[torch.float32])
    again = make_model(family)
    assert attach(again, read_adapter(tmp_path))
    assert torch.equal(logits(again, ids), logits(model, ids))
    again(input_ids=ids, labels=ids).loss.backward()
    for site in sites:  # where there were no factors, none will grow
        if config.magnitude_only_at(site.name):
            factors = inject.adapters(again)[site.name].lora
            assert len(factors.A) == (2 if init == "pissa" else 1)
            assert not factors.A.any()
            assert not factors.A.grad.any()
            assert not factors.B.any()
            assert not factors.B.grad.any()


def test_magnitudes_alone_are_asked_for_by_the_adapted_modules_names(make_model):
    with pytest.raises(RecipeError) as raised:
        adapt(
            make_model(),
            "dora",
            ["q_proj", "o_proj", "up_proj"],
            magnitude_only_modules=["o_proj", "k_proj", "proj"],
            rank_pattern={"up_proj": 2, "o_proj": 2},
        )
    assert [problem.message for problem in raised.value.problems] == [
        "method.magnitude_only_modules: k_proj matches none of the adapted modules",
        "method.magnitude_only_modules: proj matches none of the adapted modules",
        "method.rank_pattern: o_proj matches none of the adapted modules",  # there are no factors to have a rank
    ]


def test_lora_plus_leaves_out_modules_without_factors(make_model):
    model = make_model()
    adapt(model, "dora", ["q_proj", "o_proj"], magnitude_only_modules=["o_proj"], loraplus_lr_ratio=16.0)
    factors = [adapter.learning_rate_factors() for adapter in inject.adapters(model).values()]
    assert factors == [{"lora.B": 16.0}, {}] * 2


# ---- published sizes ----

FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
REST = ["o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("targets", "fields", "expected"),
    [
        (FIVE, {"r": 32}, 56_975_360),
        (FIVE, {"r": 16}, 28_925_952),
        ("all-linear", {"r": 64}, 161_267_712),
        ("all-linear", {"r": 32, "magnitude_only_modules": REST}, 26_525_696),
    ],
)
def test_the_published_numbers_of_parameters(targets, fields, expected):
    assert count(llama_7b(), "dora", targets, **fields) == expected


@pytest.mark.parametrize("fields", [{}, {"magnitude_only_modules": ["target"]}, {"init": "pissa"}], ids=str)
def test_on_the_meta_device_nothing_is_computed(fields, monkeypatch):
    with torch.device("meta"):
        holder = Holder()
    monkeypatch.setattr("peftcli.sites.dense_weight", lambda *_: pytest.fail("a weight was read"))
    adapt(holder, "dora", **fields)
    adapter = holder.target.adapter
    tensors = [*adapter.parameters(), *adapter.buffers(), *adapter.peft_tensors().values()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


# ---- norms that are known ----


def computed_norms(holder):
    """Returns a list that grows with each computation of the norms."""
    decomposition, calls = holder.target.adapter.decomposition, []
    own = decomposition._computed_norms
    decomposition._computed_norms = lambda *given: calls.append(1) or own(*given)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_outside_of_training_norms_are_computed_once_for_each_content_of_the_factors(kind):
    holder, x = adapted_holder("dora", kind).eval(), inputs(kind, torch.float64)
    calls, lora = computed_norms(holder), holder.target.adapter.lora
    for factor in (None, lora.A, lora.B):
        if factor is not None:
            version = factor._version
            factor.data.mul_(1.5)
            assert factor._version == version, "a version counter would tell, and nothing would be shown here"
        before = len(calls)
        for _ in range(3):
            assert_close(holder(x), holder.plain(x, holder.target.adapter.merged(holder.W).detach()), FP64)
        assert len(calls) == before + 1
    holder.to(torch.float32)
    holder(inputs(kind))
    assert len(calls) == 4


def test_in_training_norms_are_computed_anew_and_no_copy_is_kept():
    holder, x = adapted_holder("dora").eval(), inputs("linear", torch.float64)
    calls = computed_norms(holder)
    holder(x)
    assert holder.target.adapter.decomposition._known is not None
    holder.train()
    holder(x), holder(x)
    assert len(calls) == 3
    assert holder.target.adapter.decomposition._known is None


def test_norms_that_get_a_gradient_are_never_kept():
    holder, x = adapted_holder("dora", detach_norm=False).eval(), inputs("linear", torch.float64)
    for _ in range(2):
        holder(x).sum().backward()
    assert holder.target.adapter.decomposition._known is None


# ---- what is kept for the backward pass ----


def test_a_feed_forwards_input_side_keeps_what_its_activation_keeps(make_model, ids):
    """Beside LoRA, of the outputs' size: nothing for gate and up, whose results are kept anyway, one for each other."""

    def kept(method):
        model = make_model().train()
        _, sites = adapt(model, method, "all-linear")
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=ids, use_cache=False)
        others = sum(site.out_features for site in sites if not site.name.endswith(("gate_proj", "up_proj")))
        return sum(tensor.numel() for tensor in storages.values() if tensor.shape[:2] == ids.shape), others

    (dora, others), (lora, _) = kept("dora"), kept("lora")
    assert dora == lora + ids.numel() * others


# ---- what an accelerator is asked once a step ----


@pytest.mark.parametrize("kept", [True, False])
def test_a_row_of_no_magnitude_still_learns(kept):
    """From its result alone, a row that is 0 could not tell what it was."""
    holder, x = adapted_holder("dora").train(), inputs("linear", torch.float64)
    dora = holder.target.adapter.decomposition
    dora.kept = kept
    with torch.no_grad():
        dora.m[3] = 0
    weights = torch.randn_like(holder(x))
    found = torch.autograd.grad(holder(x), dora.m, weights)[0]
    _, _, _, _, V, n, _ = parts(holder)
    assert_close(found, (weights * (x @ V.T)).flatten(0, -2).sum(0) / n, FP64)


def cancelling_since_the_last_answer():
    """Returns a holder whose even rows' updates cancel them but for a thousandth, since it was asked, and its norms."""
    holder, _ = cancelling(1e-3)
    holder.train()
    dora = holder.target.adapter
    dora.decomposition._loses_digits.last = False
    A, B, s = (t.detach() if torch.is_tensor(t) else t for t in dora.lora.factors())
    factored, _ = decomposition.factored_row_norms(dora.decomposition.c, base_of(holder).project(A), A, B, s)
    direct = decomposition.direct_row_norms(holder.W, A, B, s)
    assert not torch.equal(factored, direct)
    return holder, factored.detach(), direct


def test_an_accelerator_is_waited_for_once_a_step(monkeypatch):
    monkeypatch.setattr(_decomposed, "AT_ONCE", ())
    holder, factored, direct = cancelling_since_the_last_answer()
    for _ in range(2):  # as when activations are recomputed
        assert torch.equal(norms_of(holder), factored)
    holder.target.adapter.after_step(None, {"target": holder.target.adapter}, 1, 2)
    for _ in range(2):
        assert torch.equal(norms_of(holder)[::2], direct[::2])


def test_the_first_time_and_outside_of_training_it_is_waited_for_at_once(monkeypatch):
    monkeypatch.setattr(_decomposed, "AT_ONCE", ())
    for first in (True, False):
        holder, _, direct = cancelling_since_the_last_answer()
        if first:
            holder.target.adapter.decomposition._loses_digits.last = None
        else:
            holder.eval()
        assert torch.equal(norms_of(holder)[::2], direct[::2])


def test_all_answers_come_with_one_transfer(monkeypatch):
    monkeypatch.setattr(_decomposed, "AT_ONCE", ())
    holders = [adapted_holder("dora").train() for _ in range(3)]
    for holder in holders:
        for _ in range(2):
            holder(inputs("linear", torch.float64))
    adapters = {str(i): holder.target.adapter for i, holder in enumerate(holders)}
    transfers = []
    own = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: transfers.append(len(self)) or own(self))
    for _ in range(2):
        holders[0].target.adapter.after_step(None, adapters, 1, 2)
    assert transfers == [3]
