import copy
from dataclasses import dataclass, field, replace

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from peftcli import inject, methods
from peftcli.checkpoint.adapter import attach, read_adapter, save_adapter
from peftcli.errors import RecipeError
from peftcli.methods import hydralora
from peftcli.methods._place import Site
from peftcli.methods.hydralora import HydraLoRA, HydraLoRAConfig
from peftcli.ops.dropout import dropout
from peftcli.ops.heads import gates
from peftcli.sites import make_site
from tests.methods.building import (
    IN,
    OUT,
    Holder,
    adapt,
    adapted_holder,
    assert_close,
    inputs,
    logits,
    origin_of,
    randomise,
    trainable,
)
from tests.ops.test_clustering import topics
from tests.tolerances import EXACT

FP64 = EXACT[torch.float64]
R, N, ALPHA, S = 4, 3, 6.0, 1.5
with_inputs = pytest.mark.parametrize("kind", ["linear", "conv1d"])


def hydra(kind="linear", **fields):
    return adapted_holder("hydralora", kind, **{"r": R, "num_heads": N, "alpha": ALPHA, **fields})


def parts(holder):
    """Returns A, the list of B_i, and R of the holder's adapter, detached."""
    adapter = holder.target.adapter
    return adapter.A.detach(), list(adapter.B.detach().chunk(adapter.num_heads, dim=1)), adapter.R.detach()


def by_the_paper(holder, x):
    """Returns the output as the authors' code computes it without dropout: a loop over heads."""
    A, heads, router = parts(holder)
    omega = F.softmax(x @ router.T, dim=-1)
    y = x @ holder.W.T + holder.b
    for i, B in enumerate(heads):
        y = y + S * omega[..., i, None] * (x @ A.T @ B.T)
    return y


# ---- the closed form ----


@with_inputs
def test_the_output_is_that_of_a_loop_over_the_heads(kind):
    holder, x = hydra(kind), inputs(kind, torch.float64)
    A, heads, router = parts(holder)
    assert (A.shape, len(heads), heads[0].shape, router.shape) == ((R, IN), N, (OUT, R), (N, IN))
    assert_close(holder(x), by_the_paper(holder, x), FP64)


@with_inputs
def test_the_gradients_are_those_of_the_paper(kind):
    holder = hydra(kind)
    A, heads, router = parts(holder)
    x = inputs(kind, torch.float64).requires_grad_()
    y = holder(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    x_TI, g_TO = x.detach().flatten(0, 1), upstream.flatten(0, 1)
    omega, u = F.softmax(x_TI @ router.T, dim=-1), x_TI @ A.T
    a = torch.stack([S * (g_TO * (u @ B.T)).sum(1) for B in heads], dim=1)  # a_ti = s g_tᵀ B_i u_t
    z = omega * (a - (omega * a).sum(1, keepdim=True))
    through_A = S * sum(omega[:, [i]] * (g_TO @ B) for i, B in enumerate(heads))
    adapter = holder.target.adapter
    assert_close(adapter.R.grad, z.T @ x_TI, FP64)
    assert_close(adapter.A.grad, through_A.T @ x_TI, FP64)
    for i, found in enumerate(adapter.B.grad.chunk(N, dim=1)):
        assert_close(found, S * (omega[:, [i]] * g_TO).T @ u, FP64)
    assert_close(x.grad.flatten(0, 1), g_TO @ holder.W + through_A @ A + z @ router, FP64)


@with_inputs
def test_at_the_first_step_only_the_heads_have_a_gradient(kind):
    holder, x = hydra(kind, noisy=False), inputs(kind, torch.float64)
    A, _, router = parts(holder)
    y = holder(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    adapter, omega = holder.target.adapter, F.softmax(x @ router.T, dim=-1)
    assert not adapter.A.grad.any()
    assert not adapter.R.grad.any()
    for i, found in enumerate(adapter.B.grad.chunk(N, dim=1)):
        assert_close(found, S * (omega[..., [i]] * upstream).flatten(0, 1).T @ (x @ A.T).flatten(0, 1), FP64)


def test_gradcheck():
    holder = hydra()
    x = inputs("linear", torch.float64, length=2).requires_grad_()
    tensors = (x, *trainable(holder).values())
    assert len(tensors) == 4
    assert torch.autograd.gradcheck(lambda x, *_: holder(x), tensors, fast_mode=True)


# ---- the router ----


def test_without_noise_in_the_router_all_heads_stay_one():
    """Why R must not start at 0: every B_i then gets the same gradient, and R none."""
    holder = hydra(noisy=False)
    torch.nn.init.zeros_(holder.target.adapter.R)
    x, wanted = inputs("linear", torch.float64), torch.randn(3, 7, OUT, dtype=torch.float64)
    optimizer = torch.optim.SGD(trainable(holder).values(), lr=0.01)

    def learn(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            (holder(x) - wanted).square().sum().backward()
            optimizer.step()
        return parts(holder)

    _, heads, router = learn(5)
    assert heads[0].abs().max() > 1e-3, "nothing was learned"
    assert_close(heads[1], heads[0], FP64)
    assert_close(heads[2], heads[0], FP64)
    assert float(router.abs().max()) <= FP64
    torch.nn.init.kaiming_uniform_(holder.target.adapter.R, a=5**0.5)
    _, heads, router = learn(5)
    assert float((heads[1] - heads[0]).abs().max()) > 1e-3
    assert float(holder.target.adapter.R.grad.abs().max()) > 1e-3


def test_it_starts_with_a_router_that_tells_the_heads_apart():
    A, heads, router = parts(hydra(noisy=False))
    assert not torch.cat(heads).any()
    for uniform in (A, router):
        assert uniform.abs().max() <= IN**-0.5
        assert uniform.abs().max() > 0.8 * IN**-0.5
        assert uniform.unique().numel() == uniform.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_router_computes_in_float32_on_a_half_precision_base(dtype, monkeypatch):
    seen = []
    monkeypatch.setattr(hydralora, "gates", lambda x, router: seen.append(gates(x, router)) or seen[-1])
    holder = Holder("linear", dtype).eval()
    adapt(holder, "hydralora")
    randomise(holder)
    x = inputs("linear", dtype)
    holder(x)
    with torch.autocast("cpu", torch.bfloat16):
        holder(x)
    expected = F.softmax(x.float() @ holder.target.adapter.R.detach().T, dim=-1)
    assert len(seen) == 2
    for omega in seen:
        assert omega.dtype == torch.float32
        assert_close(omega, expected, EXACT[torch.float32])


def test_each_token_has_gates_of_its_own():
    """So neither the order of samples nor what stands beside a token changes its output."""
    holder, x = hydra(), inputs("linear", torch.float64)
    y = holder(x)
    assert_close(holder(x.flip(0)).flip(0), y, FP64)
    assert_close(holder(F.pad(x, (0, 0, 2, 3)))[:, 2:-3], y, FP64)
    assert_close(torch.stack([holder(token) for token in x.flatten(0, 1)]), y.flatten(0, 1), FP64)


def test_the_heads_have_no_order():
    holder, x = hydra(), inputs("linear", torch.float64)
    expected = holder(x)
    adapter, order = holder.target.adapter, [2, 0, 1]
    with torch.no_grad():
        adapter.B.copy_(torch.cat([adapter.B.chunk(N, dim=1)[i] for i in order], dim=1))
        assert not torch.allclose(holder(x), expected)
        adapter.R.copy_(adapter.R[order])
    assert_close(holder(x), expected, FP64)


# ---- where it is a LoRA ----


def lora_like(holder, **fields):
    """Returns a holder with the same base and a LoRA of the same A and `fields`' B."""
    twin = Holder(holder.kind, torch.float64)
    twin.load_state_dict({key: value for key, value in holder.state_dict().items() if "adapter" not in key})
    adapt(twin, "lora", r=R, alpha=ALPHA)
    twin.target.adapter.double()
    with torch.no_grad():
        twin.target.adapter.A.copy_(holder.target.adapter.A)
        twin.target.adapter.B.copy_(fields["B"])
    return twin


@with_inputs
def test_one_head_is_lora(kind):
    holder = hydra(kind, num_heads=1)
    adapter, x = holder.target.adapter, inputs(kind, torch.float64)
    lora = lora_like(holder, B=adapter.B)
    y, expected = holder(x), lora(x)
    assert_close(y, expected, FP64)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    assert_close(adapter.A.grad, lora.target.adapter.A.grad, FP64)
    assert_close(adapter.B.grad, lora.target.adapter.B.grad, FP64)
    assert not adapter.R.grad.any()
    config = HydraLoRAConfig(num_heads=1)
    assert HydraLoRA.unmergeable(config) is None
    assert HydraLoRA.not_low_rank(config) is None
    A, B = adapter.low_rank()
    assert_close(holder.W + B @ A, lora.target.adapter.merged(holder.W), FP64)
    assert_close(adapter.merged(holder.W), lora.target.adapter.merged(holder.W), FP64)


def test_with_a_router_of_zeros_it_is_lora_with_the_mean_of_the_heads():
    holder, x = hydra(), inputs("linear", torch.float64)
    torch.nn.init.zeros_(holder.target.adapter.R)
    _, heads, _ = parts(holder)
    assert_close(holder(x), lora_like(holder, B=sum(heads) / N)(x), FP64)


def test_with_equal_heads_it_is_lora():
    holder, x = hydra(), inputs("linear", torch.float64)
    adapter = holder.target.adapter
    with torch.no_grad():
        adapter.B.copy_(adapter.B[:, :R].repeat(1, N))
    assert_close(holder(x), lora_like(holder, B=adapter.B[:, :R])(x), FP64)


def test_several_heads_are_no_lora_and_say_why():
    for reason in (HydraLoRA.unmergeable(HydraLoRAConfig()), HydraLoRA.not_low_rank(HydraLoRAConfig())):
        assert "token" in reason
    holder = hydra()
    with pytest.raises(AssertionError):
        holder.target.adapter.merged(holder.W)


# ---- the mean gates ----


def test_the_mean_of_the_gates_is_over_every_token_since_the_beginning():
    holder = hydra().eval()
    adapter, (A, heads, router) = holder.target.adapter, parts(holder)
    holder(inputs("linear", torch.float64))  # before the beginning
    adapter.begin_average()
    seen = [inputs("linear", torch.float64, length) for length in (7, 2, 1)]
    for x in seen:
        holder(x)
    holder.train()(inputs("linear", torch.float64))  # does not count
    tokens = torch.cat([x.flatten(0, 1) for x in seen])
    expected = F.softmax(tokens @ router.T, dim=-1).mean(0)
    assert_close(adapter.mean_gates(), expected, FP64)
    found_A, found_B = adapter.averaged_low_rank()
    assert torch.equal(found_A, A)
    assert_close(found_B, S * sum(omega * B for omega, B in zip(expected, heads, strict=True)), FP64)
    adapter.begin_average()
    holder.eval()(seen[1])
    assert_close(adapter.mean_gates(), F.softmax(seen[1] @ router.T, dim=-1).flatten(0, 1).mean(0), FP64)


def test_where_the_gates_are_the_same_everywhere_the_average_is_exact():
    holder, x = hydra().eval(), inputs("linear", torch.float64)
    adapter = holder.target.adapter
    torch.nn.init.zeros_(adapter.R)
    adapter.begin_average()
    y = holder(x)
    A, B = adapter.averaged_low_rank()
    assert_close(holder.plain(x, holder.W + (B @ A).detach()), y, FP64)


def test_an_average_of_nothing_is_refused():
    adapter = hydra().target.adapter
    with pytest.raises(ValueError, match="no token has passed"):
        adapter.averaged_low_rank()
    adapter.begin_average()
    with pytest.raises(ValueError, match="no token has passed"):
        adapter.averaged_low_rank()


def test_averaging_changes_no_output_and_follows_a_copy(make_model, ids):
    model = make_model()
    adapt(model, "hydralora", "all-linear", r=2, num_heads=3)
    randomise(model)
    expected = logits(model, ids)
    for adapter in inject.adapters(model).values():
        adapter.begin_average()
    assert torch.equal(logits(model, ids), expected)
    for adapter in inject.adapters(copy.deepcopy(model)).values():
        assert adapter.num_gated == ids.numel()
        assert float((adapter.mean_gates().sum() - 1).abs()) <= EXACT[torch.float32]


# ---- dropout ----


@with_inputs
def test_one_mask_for_all_heads_and_none_for_the_router(kind):
    holder, x = hydra(kind, dropout=0.4).train(), inputs(kind, torch.float64)
    A, heads, router = parts(holder)
    torch.manual_seed(3)
    y = holder(x)
    torch.manual_seed(3)
    dropped, omega = dropout(x, 0.4), F.softmax(x @ router.T, dim=-1)
    assert not torch.equal(dropped, x)
    expected = x @ holder.W.T + holder.b
    expected += S * sum(omega[..., [i]] * (dropped @ A.T @ B.T) for i, B in enumerate(heads))
    assert_close(y, expected, FP64)


@with_inputs
def test_independent_masks(kind):
    holder, x = hydra(kind, dropout=0.4, independent_dropout=True).train(), inputs(kind, torch.float64)
    A, heads, router = parts(holder)
    torch.manual_seed(3)
    y = holder(x)
    torch.manual_seed(3)
    omega, expected = F.softmax(x @ router.T, dim=-1), x @ holder.W.T + holder.b
    for i, B in enumerate(heads):  # a mask each, drawn head by head
        expected += S * omega[..., [i]] * (dropout(x, 0.4) @ A.T @ B.T)
    assert_close(y, expected, FP64)
    assert_close(holder.eval()(x), by_the_paper(holder, x), FP64)


# ---- the number of heads ----


@dataclass
class Facts:
    samples: list = field(default_factory=list)
    frequent_ids: tuple = ()
    labels: tuple = ()

    def tokenize(self, text):
        raise AssertionError


@pytest.mark.parametrize("kinds", [2, 4, 10])
def test_auto_counts_the_kinds_of_samples(kinds):
    config = HydraLoRAConfig(r=5, num_heads="auto", target_modules=["x"])
    found = HydraLoRA.prepare(config, Facts(topics(kinds)))
    assert found == config.model_copy(update={"num_heads": kinds})
    assert config.num_heads == "auto"


def test_a_given_number_stays():
    config = HydraLoRAConfig(num_heads=7)
    assert HydraLoRA.prepare(config, Facts(topics(3))) is config


def test_auto_must_be_found_before_adapters_are_made():
    config, site = HydraLoRAConfig(num_heads="auto"), make_site("target", Holder().target)
    with pytest.raises(RecipeError, match=r"method\.num_heads: auto is found in the training data"):
        adapt(Holder(), "hydralora", num_heads="auto")
    with pytest.raises(RecipeError, match=r"method\.num_heads: auto is found in the training data"):
        HydraLoRA(config, site, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_heads": 0},
        {"num_heads": "some"},
        {"num_heads": 2.0},
        {"num_heads": True},
        {"r": 0},
        {"alpha": 0.0},
        {"alpha": float("inf")},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"independent_dropout": 1},
        {"heads": 2},
    ],
    ids=str,
)
def test_what_a_field_cannot_be(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        HydraLoRAConfig.model_validate(wrong)


def test_a_rank_above_that_of_the_weight_is_refused():
    with pytest.raises(RecipeError, match="25 is more than the 24 that target"):
        adapt(Holder(), "hydralora", r=25)
    adapt(Holder(), "hydralora", r=24)


def test_embeddings_are_no_place_for_a_router():
    with pytest.raises(RecipeError, match="matches only Embedding"):
        adapt(Holder("embedding"), "hydralora")


# ---- counts and files ----


def meta_site(name, size):
    def dense():
        raise AssertionError("on the meta device nothing may be computed")

    return Site(name, "linear", size, size, False, torch.device("meta"), dense)


@pytest.mark.parametrize(("heads", "without", "with_router"), [(3, 8_388_608, 9_175_040), (10, 23_068_672, 25_690_112)])
def test_the_papers_counts_leave_out_the_router(heads, without, with_router):
    """LLaMA-7B's query and value projections at rank 8: 0.124 % and, for BBH's ten heads, 0.341 % of the model."""
    config, llama = HydraLoRAConfig(r=8, num_heads=heads), 6_738_415_616
    sizes = [
        (name in HydraLoRA.router_parameters, parameter.numel())
        for layer in range(32)
        for leaf in ("q_proj", "v_proj")
        for name, parameter in HydraLoRA(config, meta_site(f"{layer}.{leaf}", 4096), 0).named_parameters()
    ]
    assert sum(size for is_router, size in sizes if not is_router) == without
    assert sum(size for _, size in sizes) == with_router
    assert round(100 * without / (llama + without), 3) == {3: 0.124, 10: 0.341}[heads]


def test_the_names_on_file_are_the_authors():
    adapter = hydra().target.adapter
    A, heads, router = parts(hydra())
    found = {name: tensor.shape for name, tensor in adapter.peft_tensors().items()}
    names = ["lora_A.weight", *(f"lora_B{i}.weight" for i in range(N)), "lora_route.weight"]
    assert found == dict(zip(names, [A.shape, *(B.shape for B in heads), router.shape], strict=True))
    for i, B in enumerate(adapter.B.chunk(N, dim=1)):
        assert torch.equal(adapter.peft_tensors()[f"lora_B{i}.weight"], B)


def test_its_files_are_its_own_and_say_all_that_it_computes_from(make_model, ids, tmp_path):
    from peft import PeftType

    model = make_model()
    fields = {"r": 3, "alpha": 5.0, "num_heads": 4, "dropout": 0.1, "independent_dropout": True}
    config, _ = adapt(model, "hydralora", ["q_proj", "v_proj"], **fields)
    randomise(model)
    save_adapter(tmp_path, model, origin_of("hydralora", config))
    adapter, again = read_adapter(tmp_path), make_model()
    assert adapter.method is methods.load("hydralora")
    assert {name: getattr(adapter.config, name) for name in fields} == fields
    attach(again, adapter)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert HydraLoRA.peft_type not in set(PeftType), "PEFT would take it for a method of its own"


def test_on_half_precision_inputs_one_wide_copy_serves_adapter_and_router():
    """Both need the input in float32 for the backward pass: kept twice, it would double the layer's memory."""
    holder = Holder("linear", torch.bfloat16)
    adapt(holder, "hydralora")
    randomise(holder)
    x, kept = inputs("linear", torch.bfloat16).requires_grad_(), {}

    def pack(tensor):
        if tensor.shape[-1] == IN and tensor.numel() == x.numel():
            kept[tensor.data_ptr()] = tensor.dtype
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        holder(x).sum().backward()
    assert list(kept.values()) == [torch.float32]


def test_the_sites_dense_weight_is_not_asked_for():
    site = replace(make_site("target", Holder().target), dense=lambda: pytest.fail("it was"))
    HydraLoRA(HydraLoRAConfig(r=4), site, 0)
