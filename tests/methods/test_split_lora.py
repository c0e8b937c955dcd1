import copy

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from peftcli import inject, methods
from peftcli.checkpoint.adapter import adapter_tensors, attach, load_tensors, read_adapter, save_adapter
from peftcli.errors import DataError, RecipeError
from peftcli.methods.lora import LoRA
from peftcli.methods.split_lora import SplitLoRA, SplitLoRAConfig
from peftcli.ops.dropout import dropout
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
    token_ids,
    trainable,
)
from tests.methods.test_peft_parity import give, peft_gradients_by_key, peft_twin, step
from tests.tolerances import EXACT

FP64 = EXACT[torch.float64]
R, N, ALPHA, S = 4, 3, 6.0, 1.5
COMBINES = ("sum", "mean", "task", "router")
TASKS = torch.tensor([2, 0, 2])  # of the three samples that `inputs` gives; head 1 has none
with_inputs = pytest.mark.parametrize("kind", ["linear", "conv1d"])
each_way = pytest.mark.parametrize("combine", COMBINES)


def split(combine, kind="linear", **fields):
    """Returns a holder whose next forward pass, with `task`, is about `TASKS`."""
    holder = adapted_holder("split_lora", kind, combine=combine, **{"r": R, "num_heads": N, "alpha": ALPHA, **fields})
    see(holder, TASKS if holder.target.adapter.num_heads >= N else TASKS * 0)
    return holder


def see(model, task_ids):
    shared = inject.shared_part(model)
    if shared is not None:
        shared.see(task_ids)


def parts(holder):
    """Returns the lists of A_i and B_i, detached."""
    adapter = holder.target.adapter
    return list(adapter.A.detach().chunk(adapter.num_heads)), list(adapter.B.detach().chunk(adapter.num_heads, dim=1))


def gates_of(holder, x, combine):
    """Returns ω [3, L, N] by its definition."""
    if combine == "router":
        return F.softmax(x @ holder.target.adapter.R.detach().T, dim=-1)
    if combine == "task":
        return F.one_hot(TASKS, N)[:, None].expand(*x.shape[:2], N).double()
    return torch.full((*x.shape[:2], N), 1 if combine == "sum" else 1 / N, dtype=torch.float64)


def expected_output(holder, x, combine, inner=None):
    """Returns the output as written in the docstring, head by head."""
    y, omega = x @ holder.W.T + holder.b, gates_of(holder, x, combine)
    for i, (A, B) in enumerate(zip(*parts(holder), strict=True)):
        y = y + S * omega[..., [i]] * ((x if inner is None else inner) @ A.T @ B.T)
    return y


# ---- the closed form ----


@with_inputs
@each_way
def test_the_output_is_that_of_a_loop_over_the_heads(combine, kind):
    holder, x = split(combine, kind), inputs(kind, torch.float64)
    A, B = parts(holder)
    assert [(one.shape, other.shape) for one, other in zip(A, B, strict=True)] == [((R, IN), (OUT, R))] * N
    assert_close(holder(x), expected_output(holder, x, combine), FP64)


@with_inputs
@each_way
def test_the_gradients_are_those_of_the_formula(combine, kind):
    holder = split(combine, kind)
    x = inputs(kind, torch.float64).requires_grad_()
    y = holder(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    x_TI, g_TO, x_grad = x.detach().flatten(0, 1), upstream.flatten(0, 1), x.grad.flatten(0, 1)
    omega = gates_of(holder, x.detach(), combine).flatten(0, 1)
    A, B = parts(holder)
    adapter, dx, a = holder.target.adapter, g_TO @ holder.W, []
    for i in range(N):
        through = S * omega[:, [i]] * (g_TO @ B[i])
        assert_close(adapter.A.grad.chunk(N)[i], through.T @ x_TI, FP64)
        assert_close(adapter.B.grad.chunk(N, dim=1)[i], S * (omega[:, [i]] * g_TO).T @ (x_TI @ A[i].T), FP64)
        dx, a = dx + through @ A[i], [*a, S * (g_TO * (x_TI @ A[i].T @ B[i].T)).sum(1)]
    if combine == "router":
        a_TN = torch.stack(a, dim=1)
        z = omega * (a_TN - (omega * a_TN).sum(1, keepdim=True))
        assert_close(adapter.R.grad, z.T @ x_TI, FP64)
        dx = dx + z @ adapter.R.detach()
    assert_close(x_grad, dx, FP64)


@each_way
def test_gradcheck(combine):
    holder = split(combine)
    x = inputs("linear", torch.float64, length=2).requires_grad_()
    tensors = (x, *trainable(holder).values())
    assert len(tensors) == (4 if combine == "router" else 3)
    assert torch.autograd.gradcheck(lambda x, *_: holder(x), tensors, fast_mode=True)


@each_way
def test_dropout_is_on_the_adapters_input_and_not_on_the_routers(combine):
    holder, x = split(combine, dropout=0.4).train(), inputs("linear", torch.float64)
    torch.manual_seed(3)
    y = holder(x)
    torch.manual_seed(3)
    assert_close(y, expected_output(holder, x, combine, dropout(x, 0.4)), FP64)
    assert_close(holder.eval()(x), expected_output(holder, x, combine), FP64)


# ---- where it is a LoRA ----


def lora_on(holder, A, B, **fields):
    """Returns a holder with the same base and a LoRA of these factors."""
    twin = Holder(holder.kind, torch.float64)
    twin.load_state_dict({key: value for key, value in holder.state_dict().items() if "adapter" not in key})
    adapt(twin, "lora", r=len(A), **fields)
    twin.target.adapter.double()
    with torch.no_grad():
        twin.target.adapter.A.copy_(A)
        twin.target.adapter.B.copy_(B)
    return twin


@with_inputs
@pytest.mark.parametrize(("combine", "alpha"), [("sum", N * ALPHA), ("mean", ALPHA)])
def test_sum_and_mean_are_one_lora_of_the_total_rank(combine, alpha, kind):
    holder, x = split(combine, kind), inputs(kind, torch.float64)
    adapter = holder.target.adapter
    lora = lora_on(holder, adapter.A, adapter.B, alpha=alpha)
    y, expected = holder(x), lora(x)
    assert_close(y, expected, FP64)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    assert_close(adapter.A.grad, lora.target.adapter.A.grad, FP64)
    assert_close(adapter.B.grad, lora.target.adapter.B.grad, FP64)
    assert_close(adapter.merged(holder.W), lora.target.adapter.merged(holder.W), FP64)
    A, B = adapter.low_rank()
    assert_close(holder.W + B @ A, lora.target.adapter.merged(holder.W), FP64)


@pytest.mark.parametrize(("combine", "alpha"), [("sum", N * ALPHA), ("mean", ALPHA)])
def test_sum_and_mean_learn_as_that_lora_does(combine, alpha):
    """Which is why splitting alone can win nothing: step by step, they are the same."""
    holder, x = split(combine), inputs("linear", torch.float64)
    twin = lora_on(holder, holder.target.adapter.A, holder.target.adapter.B, alpha=alpha)
    wanted = torch.randn(3, 7, OUT)
    for one in (holder, twin):
        optimizer = torch.optim.SGD(trainable(one).values(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            (one(x) - wanted).square().mean().backward()
            optimizer.step()
    assert_close(holder.target.adapter.A, twin.target.adapter.A, FP64)
    assert_close(holder.target.adapter.B, twin.target.adapter.B, FP64)


@each_way
def test_one_head_is_lora(combine):
    holder, x = split(combine, num_heads=1), inputs("linear", torch.float64)
    adapter = holder.target.adapter
    assert_close(holder(x), lora_on(holder, adapter.A, adapter.B, alpha=ALPHA)(x), FP64)


def test_a_router_over_equal_as_is_hydralora():
    holder, x = split("router"), inputs("linear", torch.float64)
    hydra = adapted_holder("hydralora", r=R, num_heads=N, alpha=ALPHA)
    adapter, other = holder.target.adapter, hydra.target.adapter
    with torch.no_grad():
        hydra.target.weight.copy_(holder.target.weight)
        hydra.target.bias.copy_(holder.target.bias)
        adapter.A.copy_(other.A.repeat(N, 1))
        adapter.B.copy_(other.B)
        adapter.R.copy_(other.R)
    assert_close(holder(x), hydra(x), FP64)


def test_the_heads_have_no_order():
    holder, x, order = split("router"), inputs("linear", torch.float64), [2, 0, 1]
    expected, adapter, (A, B) = holder(x), holder.target.adapter, parts(holder)
    with torch.no_grad():
        adapter.A.copy_(torch.cat([A[i] for i in order]))
        adapter.B.copy_(torch.cat([B[i] for i in order], dim=1))
        assert not torch.allclose(holder(x), expected)
        adapter.R.copy_(adapter.R[order])
    assert_close(holder(x), expected, FP64)


@each_way
def test_the_count_is_that_of_the_total_rank_however_it_is_split(combine):
    for num_heads, r in ((1, 24), (2, 12), (3, 8), (8, 3)):
        adapter = split(combine, num_heads=num_heads, r=r).target.adapter
        sizes = {name: parameter.numel() for name, parameter in adapter.named_parameters()}
        routers = {name: sizes.pop(name) for name in SplitLoRA.router_parameters & set(sizes)}
        assert sum(sizes.values()) == 24 * (IN + OUT)
        assert routers == ({"R": num_heads * IN} if combine == "router" else {})


# ---- tasks ----


@with_inputs
def test_a_head_without_samples_gets_a_gradient_of_exactly_nothing(kind):
    holder = split("task", kind)
    holder(inputs(kind, torch.float64)).square().sum().backward()
    adapter = holder.target.adapter
    for gradients in (adapter.A.grad.chunk(N), adapter.B.grad.chunk(N, dim=1)):
        assert [bool(gradient.any()) for gradient in gradients] == [True, False, True]


def test_tasks_of_tokens_where_samples_lie_end_to_end():
    holder, x = split("task"), inputs("linear", torch.float64)
    expected, lengths = holder(x), [7, 2, 4]
    flat = torch.cat([x[i, :length] for i, length in enumerate(lengths)])[None]
    see(holder, torch.repeat_interleave(TASKS, torch.tensor(lengths))[None])
    assert_close(holder(flat), torch.cat([expected[i, :n] for i, n in enumerate(lengths)])[None], FP64)


def test_a_pooled_input_has_one_row_a_sample():
    holder, x = split("task"), inputs("linear", torch.float64)
    assert_close(holder(x[:, 0]), holder(x)[:, 0], FP64)


@pytest.mark.parametrize("head", range(N))
def test_where_no_task_is_named_the_chosen_head_answers(head):
    holder, x = split("task", task_head=head), inputs("linear", torch.float64)
    see(holder, None)
    found = holder(x)
    see(holder, torch.full((3,), head))
    assert_close(found, holder(x), FP64)
    merged = holder.target.adapter.merged(holder.W).detach()
    assert_close(holder.plain(x, merged), found, FP64)
    (A, B), adapter = parts(holder), holder.target.adapter
    assert_close(merged, holder.W + S * B[head] @ A[head], FP64)
    low_A, low_B = adapter.low_rank()
    assert_close(low_B @ low_A, S * B[head] @ A[head], FP64)
    assert SplitLoRA.unmergeable(SplitLoRAConfig(combine="task", task_head=head)) is None


def test_the_answering_head_can_be_changed_for_the_whole_model(make_model, ids):
    model = make_model()
    adapt(model, "split_lora", "all-linear", r=2, num_heads=N, combine="task", task_head=0)
    randomise(model)
    tasks = inject.shared_part(model)
    answers = []
    for tasks.task_head in range(N):
        answers.append(logits(model, ids))
        tasks.see(torch.full((len(ids),), tasks.task_head))
        assert_close(logits(model, ids), answers[-1], EXACT[torch.float32])
        tasks.see(None)
    assert not torch.allclose(answers[0], answers[1])
    assert not torch.allclose(answers[1], answers[2])


def test_in_a_model_each_sample_goes_through_its_own_head(make_model):
    model, ids = make_model("llama", torch.float64), token_ids()
    adapt(model, "split_lora", "all-linear", r=2, num_heads=N, combine="task")
    model.double()
    randomise(model)
    see(model, torch.tensor([2, 1]))
    together = logits(model, ids)
    for row, task in enumerate((2, 1)):
        see(model, torch.tensor([task]))
        assert_close(together[[row]], logits(model, ids[[row]]), FP64)
    see(model, torch.tensor([1, 2]))
    assert not torch.allclose(logits(model, ids), together)


def test_without_a_task_and_without_a_chosen_head_nothing_is_guessed():
    holder = split("task")
    see(holder, None)
    with pytest.raises(RecipeError, match="no task is named") as raised:
        holder(inputs("linear", torch.float64))
    assert "method.task_head" in raised.value.problems[0].hint
    assert "task_head" in SplitLoRA.unmergeable(SplitLoRAConfig(combine="task"))


@pytest.mark.parametrize(("ids", "wrong"), [([0, 3], 3), ([[0, 1, 7]], 7), ([-1, 0], -1)], ids=str)
def test_a_task_without_a_head_is_refused(ids, wrong):
    holder = split("task")
    with pytest.raises(DataError, match=f"a task {wrong}, but there are only 3 heads") as raised:
        see(holder, torch.tensor(ids))
    assert "num_heads" in raised.value.problems[0].hint


@pytest.mark.parametrize("shape", [(4, 7), (6,), (21,), (1, 3)], ids=str)
def test_inputs_that_are_not_laid_out_by_samples_are_refused(shape):
    """Such as an expert's, which gets some tokens of every sample."""
    holder = split("task")
    with pytest.raises(RecipeError, match="cannot adapt target"):
        holder(torch.randn(*shape, IN, dtype=torch.float64))


def test_a_copy_of_the_model_has_tasks_of_its_own():
    holder, x = split("task"), inputs("linear", torch.float64)
    expected, twin = holder(x), copy.deepcopy(holder)
    see(twin, torch.tensor([1, 1, 1]))
    assert torch.equal(holder(x), expected)
    assert not torch.allclose(twin(x), expected)
    assert sum(1 for module in holder.modules() if module is inject.shared_part(holder)) == 1


def test_gradient_checkpointing_recomputes_with_the_same_tasks(make_model, ids):
    model = make_model().train()
    adapt(model, "split_lora", "all-linear", r=2, num_heads=N, combine="task", dropout=0.2)
    randomise(model)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        see(model, torch.tensor([2, 1]))
        step(model, ids)
        found.append([parameter.grad for parameter in trainable(model).values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("combine", ["sum", "mean", "task"])  # the router is in the contract suite
def test_compiled_without_a_break_it_equals_eager(combine):
    holder = split(combine, task_head=1) if combine == "task" else split(combine)
    x = inputs("linear", torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(holder, fullgraph=True, backend="aot_eager")
    for task_ids in (TASKS, torch.tensor([1, 1, 0]), None):
        see(holder, task_ids)
        assert_close(compiled(x), holder(x), FP64)


# ---- what the contract suite asks of every method, for the ways that are not its default ----


@pytest.mark.parametrize("combine", ["sum", "mean", "task"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_starts_as_its_base_and_all_of_it_learns(combine, family, make_model, ids):
    model = make_model(family)
    expected = logits(model, ids)
    adapt(model, "split_lora", ".*", combine=combine, num_heads=2)
    see(model, torch.tensor([0, 1]))
    assert torch.equal(logits(model, ids), expected)
    randomise(model)
    step(model, ids)
    assert set(trainable(model)) == {f"{path}.adapter.{key}" for path in inject.adapters(model) for key in ("A", "B")}
    assert all(parameter.grad.any() for parameter in trainable(model).values())


@pytest.mark.parametrize("combine", ["sum", "mean", "task", "router"])
def test_on_the_meta_device_there_are_only_shapes(combine):
    holder = Holder().to("meta")
    adapt(holder, "split_lora", combine=combine)
    assert {parameter.device.type for parameter in trainable(holder).values()} == {"meta"}


# ---- files ----


@pytest.mark.filterwarnings("ignore:::peft", "ignore::FutureWarning:transformers")
@pytest.mark.parametrize(("combine", "alpha"), [("sum", 15.0), ("mean", 5.0)])
def test_peft_reads_sum_and_mean_as_a_lora_and_so_do_we(combine, alpha, make_model, ids, tmp_path):
    model = make_model("llama", torch.float64)
    targets = ["q_proj", "v_proj", "down_proj"]
    config, _ = adapt(model, "split_lora", targets, r=4, num_heads=3, alpha=5.0, combine=combine)
    twin = peft_twin(make_model("llama", torch.float64), "lora", targets, r=12, lora_alpha=alpha)
    model.double()
    randomise(model)
    give(twin, adapter_tensors(model))
    assert_close(logits(model, ids), logits(twin, ids), FP64)
    step(model, ids)
    step(twin, ids)
    theirs = peft_gradients_by_key(twin)
    for path, adapter in inject.adapters(model).items():
        for letter in "AB":
            expected = theirs[f"base_model.model.{path}.lora_{letter}.weight"]
            assert_close(getattr(adapter, letter).grad, expected, FP64)
    assert SplitLoRA.peft_type_of(config) == "LORA"
    written = SplitLoRA.peft_config(config)
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (12, alpha, False)
    assert set(written) == set(LoRA.peft_config(LoRA.Config()))
    again = LoRA.config_from_peft(written)
    assert (again.r, again.scale_at("any")) == (12, pytest.approx(model.model.layers[0].mlp.down_proj.adapter.scale))
    save_adapter(tmp_path, model, origin_of("split_lora", config))
    read, plain = read_adapter(tmp_path), make_model("llama", torch.float64)
    assert read.method is methods.load("lora")
    attach(plain, read)
    plain.double()
    load_tensors(plain, read.tensors, "again, in float64")
    assert_close(logits(plain, ids), logits(model, ids), FP64)


@pytest.mark.parametrize("combine", ["task", "router"])
def test_task_and_router_have_files_of_their_own(combine, make_model, ids, tmp_path):
    from peft import PeftType

    model = make_model()
    fields = {"r": 3, "num_heads": 4, "alpha": 5.0, "dropout": 0.1, "combine": combine}
    fields["task_head"] = 2 if combine == "task" else None
    config, _ = adapt(model, "split_lora", ["q_proj", "v_proj"], **fields)
    randomise(model)
    save_adapter(tmp_path, model, origin_of("split_lora", config))
    adapter, again = read_adapter(tmp_path), make_model()
    assert adapter.method is methods.load("split_lora")
    assert {name: getattr(adapter.config, name) for name in fields} == fields
    attach(again, adapter)
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert SplitLoRA.peft_type_of(config) == SplitLoRA.peft_type
    assert SplitLoRA.peft_type not in set(PeftType), "PEFT would take it for a method of its own"


@pytest.mark.parametrize("combine", ["task", "router"])
def test_on_file_each_head_is_a_lora(combine):
    holder = split(combine)
    found = holder.target.adapter.peft_tensors()
    A, B = parts(holder)
    for i in range(N):
        assert torch.equal(found.pop(f"lora_A{i}.weight"), A[i])
        assert torch.equal(found.pop(f"lora_B{i}.weight"), B[i])
    assert list(found) == (["lora_route.weight"] if combine == "router" else [])


# ---- bad input ----


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"combine": "max"}, "combine"),
        ({"num_heads": 0}, "num_heads"),
        ({"num_heads": "auto"}, "num_heads"),
        ({"task_head": 0}, "task_head: with combine router every head takes part"),
        ({"combine": "sum", "task_head": 0}, "task_head: with combine sum every head takes part"),
        ({"combine": "task", "num_heads": 2, "task_head": 2}, "task_head: 2 is none of the 2 heads"),
        ({"combine": "task", "task_head": -1}, "task_head"),
        ({"alpha": 0.0}, "alpha"),
        ({"r": 0}, "r"),
        ({"dropout": 1.0}, "dropout"),
    ],
    ids=str,
)
def test_what_a_field_cannot_be(wrong, message):
    with pytest.raises(ValidationError, match=message):
        SplitLoRAConfig.model_validate(wrong)


def test_a_rank_above_that_of_the_weight_is_refused():
    with pytest.raises(RecipeError, match="25 is more than the 24 that target"):
        adapt(Holder(), "split_lora", r=25)
    for combine in ("task", "router"):
        adapt(Holder(), "split_lora", r=24, num_heads=3, combine=combine)
    for combine in ("sum", "mean"):  # which are written as a LoRA of the total rank
        with pytest.raises(RecipeError, match=f"num_heads: with combine {combine}.* 27 is more than the 24"):
            adapt(Holder(), "split_lora", r=9, num_heads=3, combine=combine)
        adapt(Holder(), "split_lora", r=8, num_heads=3, combine=combine)


def test_a_router_cannot_be_merged_and_says_why():
    for reason in (SplitLoRA.unmergeable(SplitLoRAConfig()), SplitLoRA.not_low_rank(SplitLoRAConfig())):
        assert "token" in reason
    holder = split("router")
    with pytest.raises(AssertionError):
        holder.target.adapter.merged(holder.W)
