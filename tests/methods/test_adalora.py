import copy
import json

import pytest
import torch
from pydantic import ValidationError

from peftcli import inject
from peftcli.checkpoint import state
from peftcli.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_tensors, attach, read_adapter, save_adapter
from peftcli.errors import ModelError, RecipeError
from peftcli.methods.adalora import AdaLoRA, AdaLoRAConfig
from peftcli.ops.dropout import dropout
from peftcli.sites import kind_of
from tests.methods.building import (
    Holder,
    adapt,
    adapted_holder,
    assert_close,
    config_for,
    inputs,
    logits,
    origin_of,
    randomise,
    trainable,
)
from tests.methods.side_by_side import assert_same_outputs_and_input_gradients
from tests.tolerances import EXACT, STANDARD_ERRORS

FP64 = EXACT[torch.float64]
FP32 = EXACT[torch.float32]
KINDS = ("linear", "conv1d")
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj", "lm_head"]}
PHASES = {"warmup_steps": 3, "final_steps": 5, "interval": 2}
STEPS = 16

pytestmark = pytest.mark.filterwarnings(
    "ignore:::peft", "ignore::FutureWarning:transformers", "ignore:.*target_modules. with tied.*:UserWarning"
)

of_each_kind = pytest.mark.parametrize("kind", KINDS)
of_each_family = pytest.mark.parametrize("family", TARGETS)


def parts(holder):
    """Returns the adapter and its A, E and B, detached."""
    adapter = holder.target.adapter
    return adapter, adapter.A.detach(), adapter.E.detach(), adapter.B.detach()


# ---- the closed form ----


@of_each_kind
@pytest.mark.parametrize(("alpha", "s"), [(6.0, 6 / 4.00001), (None, 8 / 4.00001)])
def test_the_output_is_that_of_the_dense_weight(kind, alpha, s):
    holder = adapted_holder("adalora", kind, alpha=alpha)
    adapter, A, E, B = parts(holder)
    assert (A.shape, E.shape, B.shape) == ((4, 24), (4,), (40, 4))
    W = holder.W + s * B @ torch.diag(E) @ A
    x = inputs(kind, torch.float64)
    assert_close(holder(x), holder.plain(x, W), FP64)
    assert_close(adapter.merged(holder.W), W, FP64)


@of_each_kind
def test_the_gradients_are_those_of_the_formula(kind):
    holder = adapted_holder("adalora", kind, alpha=6.0)
    adapter, A, E, B = parts(holder)
    s = adapter.scale
    x = inputs(kind, torch.float64).requires_grad_()
    y = holder(x)
    g = torch.randn_like(y)
    y.backward(g)
    G = s * g.flatten(0, 1).T @ x.detach().flatten(0, 1)  # s · ∂L/∂W'
    assert_close(adapter.A.grad, torch.diag(E) @ B.T @ G, FP64)
    assert_close(adapter.B.grad, G @ A.T @ torch.diag(E), FP64)
    assert_close(adapter.E.grad, torch.diag(B.T @ G @ A.T), FP64)
    assert_close(x.grad, g @ (holder.W + s * B @ torch.diag(E) @ A), FP64)


def test_gradcheck():
    holder = adapted_holder("adalora")
    x = inputs("linear", torch.float64, length=2).requires_grad_()
    tensors = tuple(trainable(holder).values())
    assert len(tensors) == 3
    assert torch.autograd.gradcheck(lambda x, *_: holder(x), (x, *tensors), fast_mode=True)


@of_each_kind
def test_dropout_acts_on_the_adapters_input_alone(kind):
    holder = adapted_holder("adalora", kind, dropout=0.4).train()
    adapter, A, E, B = parts(holder)
    x = inputs(kind, torch.float64)
    torch.manual_seed(3)
    y = holder(x)
    torch.manual_seed(3)
    dropped = dropout(x, 0.4)
    assert not torch.equal(dropped, x)
    assert_close(y, holder.plain(x, holder.W) + adapter.scale * dropped @ A.T @ torch.diag(E) @ B.T, FP64)


def test_it_starts_with_small_factors_and_no_values():
    _, A, E, B = parts(adapted_holder("adalora", r=20, noisy=False))
    assert not E.any()
    drawn = torch.cat([A.flatten(), B.flatten()]) / 0.02
    assert abs(drawn.mean()) <= STANDARD_ERRORS / drawn.numel() ** 0.5
    assert abs(drawn.square().mean() - 1) <= STANDARD_ERRORS * (2 / drawn.numel()) ** 0.5
    assert drawn.abs().max() > 3, "this is not a normal distribution"


@of_each_kind
def test_as_a_lora_it_is_the_same(kind):
    """Exactly: E and the scale, offset and all, go into the factors, and ranks that are gone give zeros."""
    holder = adapted_holder("adalora", kind, alpha=6.0)
    adapter = holder.target.adapter
    with torch.no_grad():
        adapter.keep(torch.tensor([True, False, True, False]))
    A, B = adapter.low_rank()
    assert_close(holder.W + B @ A, adapter.merged(holder.W).detach(), FP64)
    assert torch.equal(B.any(0) & A.any(1), torch.tensor([True, False, True, False]))
    lora = Holder(kind, torch.float64)
    lora.load_state_dict({key: value for key, value in holder.state_dict().items() if "adapter" not in key})
    adapt(lora, "lora", alpha=4.0)
    lora.target.adapter.double().load_peft_tensors({"lora_A.weight": A, "lora_B.weight": B})
    x = inputs(kind, torch.float64)
    assert_close(lora(x), holder(x), FP64)


# ---- the penalty ----


def test_the_penalty_is_the_mean_distance_of_all_factors(make_model):
    model = make_model("llama", torch.float64)
    config, _ = adapt(model, "adalora", TARGETS["llama"], orthogonality=0.3)
    model.double()
    randomise(model)
    adapters = inject.adapters(model).values()
    distances = []
    for adapter in adapters:
        for gram in (adapter.A @ adapter.A.T, adapter.B.T @ adapter.B):
            distances.append(((gram - torch.eye(4, dtype=torch.float64)) ** 2).sum().sqrt())
    assert len(distances) == 12
    assert_close(AdaLoRA.penalty(config, adapters), 0.3 * sum(distances).detach() / 12, FP64)


def test_without_a_weight_there_is_no_penalty():
    config = config_for("adalora", orthogonality=0.0)
    assert AdaLoRA.penalty(config, [adapted_holder("adalora").target.adapter]) is None


# ---- the allocation ----


def cross_entropy(logits, labels, **_):
    """Returns the loss in the logits' own dtype, where transformers' is in float32: rounding it would show below."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def train_step(model, config, optimizer, ids, step, total=STEPS):
    """Does what the training loop does, in its order."""
    adapters = inject.adapters(model)
    (loss_of(model, ids) + AdaLoRA.penalty(config, adapters.values())).backward()
    optimizer.step()
    AdaLoRA.after_step(config, adapters, step, total)
    optimizer.zero_grad()


def made(make_model, family="llama", dtype=torch.float32, **fields):
    model = make_model(family, dtype)
    model.loss_function = cross_entropy
    config, _ = adapt(model, "adalora", TARGETS[family], **{"r": 6, "target_r": 4, **PHASES, **fields})
    for adapter in inject.adapters(model).values():
        adapter.to(dtype)
    return model, config, torch.optim.AdamW(trainable(model).values(), lr=0.02)


def live(model):
    return sum(int(adapter.E.count_nonzero()) for adapter in inject.adapters(model).values())


def test_as_many_values_live_as_the_budget_says(make_model, ids):
    model, config, optimizer = made(make_model)
    expected = {step: 24 + 12 * (1 - (step - 3) / 8) ** 3 for step in (4, 6, 8, 10)}
    for step in range(1, STEPS + 1):
        train_step(model, config, optimizer, ids, step)
        if step in expected:
            assert live(model) == int(expected[step])
        elif step >= 11:
            assert live(model) == 24
        else:
            assert live(model) == 36  # what was set to 0 goes on learning until the end of the allocation
    kept = [int(adapter.kept.sum()) for adapter in inject.adapters(model).values()]
    assert len(set(kept)) > 1, "every module kept as much as the others"


def test_without_a_surplus_nothing_goes(make_model, ids):
    model, config, optimizer = made(make_model, target_r=6)
    for step in range(1, STEPS + 1):
        train_step(model, config, optimizer, ids, step)
        assert live(model) == 36


def test_the_last_allocation_is_made_up_for_where_its_step_was_skipped(make_model, ids):
    """As it is when a gradient scaler meets an overflow."""
    model, config, optimizer = made(make_model, interval=100)
    for step in (*range(1, 11), *range(12, STEPS + 1)):
        train_step(model, config, optimizer, ids, step)
        assert live(model) == (24 if step > 11 else 36)


def peft_twin(model, family, steps=STEPS, **fields):
    """Returns a copy of `model` that PEFT adapts, at its start."""
    from peft import AdaLoraConfig, get_peft_model

    settings = {"init_r": 6, "target_r": 4, "lora_alpha": 6, "tinit": 3, "tfinal": 5, "deltaT": 2, **fields}
    config = AdaLoraConfig(
        target_modules=TARGETS[family],
        total_step=steps,
        task_type="CAUSAL_LM",
        fan_in_fan_out=family == "gpt2",
        **settings,
    )
    twin = copy.deepcopy(model)
    twin.loss_function = cross_entropy
    return get_peft_model(twin, config).eval()


def peft_tensors(twin):
    """Returns what the paper trains. On a base that is not float32, PEFT makes the rank in its scale trainable too."""
    return {name.removesuffix(".default"): p for name, p in twin.named_parameters() if ".lora_" in name}


def give(twin, tensors):
    theirs = peft_tensors(twin)
    assert {key: t.shape for key, t in tensors.items()} == {key: t.shape for key, t in theirs.items()}
    with torch.no_grad():
        for key, tensor in tensors.items():
            theirs[key].copy_(tensor)


def test_it_learns_as_pefts_does_step_by_step(make_model, ids):
    """Weights, averages and what is kept, through all phases: PEFT's allocator runs beside ours."""

    def base(*arguments):
        return make_model(*arguments, tie_word_embeddings=False)

    model, config, optimizer = made(base, "gpt2", torch.float64, alpha=6.0)
    twin = peft_twin(base("gpt2", torch.float64), "gpt2").double()
    give(twin, adapter_tensors(model))
    other = torch.optim.AdamW(peft_tensors(twin).values(), lr=0.02)
    for step in range(1, STEPS + 1):
        train_step(model, config, optimizer, ids, step)
        loss_of(twin, ids).backward()  # PEFT's loss has the penalty in it
        other.step()
        twin.base_model.update_and_allocate(step)
        other.zero_grad()
        theirs = peft_tensors(twin)
        for key, tensor in adapter_tensors(model).items():
            assert_close(tensor, theirs[key], FP64)
            assert torch.equal(tensor == 0, theirs[key] == 0), step
        allocator = twin.base_model.rankallocator
        for path, adapter in inject.adapters(model).items():
            for name in "AEB" if step < STEPS - 5 else "":
                key = f"{path}.lora_{name}.default"
                for ours, averages in (("importance", "exp_avg_ipt"), ("deviation", "exp_avg_unc")):
                    found = adapter.get_buffer(f"{name}_{ours}")
                    assert_close(found, getattr(allocator, averages)[key].view_as(found), FP64)
            pattern = twin.peft_config["default"].rank_pattern
            if pattern:
                assert adapter.kept.tolist() == pattern[f"{path}.lora_E.default"]
    assert live(model) == 4 * len(inject.adapters(model))


@of_each_family
def test_outputs_gradients_and_merged_weights_are_pefts(family, make_model, ids):
    model, config, _ = made(make_model, family, torch.float64, alpha=6.0)
    twin = peft_twin(make_model(family, torch.float64), family).double()
    randomise(model)
    give(twin, adapter_tensors(model))
    assert_close(logits(model, ids), logits(twin, ids), FP64)
    penalty = AdaLoRA.penalty(config, inject.adapters(model).values())
    assert_close(loss_of(model, ids) + penalty, loss_of(twin, ids), FP64)
    theirs = peft_tensors(twin)
    for path, adapter in inject.adapters(model).items():
        ours, its_twin = model.get_submodule(path), twin.get_submodule(f"base_model.model.{path}")
        assert_same_outputs_and_input_gradients(ours, its_twin, adapter.A.shape[1])
        for name, parameter in adapter.named_parameters():
            gradient = theirs[f"base_model.model.{path}.lora_{name}"].grad
            assert gradient.any()
            assert_close(parameter.grad, gradient.view_as(parameter), FP64)
    plain = twin.merge_and_unload()
    for path, adapter in inject.adapters(model).items():
        weight, merged = (one.get_submodule(path).weight.detach() for one in (model, plain))
        if kind_of(model.get_submodule(path)) == "conv1d":
            weight, merged = weight.t(), merged.t()
        assert_close(adapter.merged(weight), merged, FP64)


def test_a_checkpoint_keeps_the_averages_and_what_was_kept(make_model, ids, tmp_path):
    """Stopped and resumed, before and after the last allocation, it ends as it would have."""

    def trained(steps, model, config, optimizer):
        for step in steps:
            train_step(model, config, optimizer, ids, step)
        return adapter_tensors(model)

    whole = trained(range(1, STEPS + 1), *made(make_model))
    for stop in (7, 13):
        model, config, optimizer = made(make_model)
        trained(range(1, stop + 1), model, config, optimizer)
        progress = state.Progress(data="")
        progress.step = stop
        origin = origin_of("adalora", config)
        folder = state.save_checkpoint(tmp_path, progress, model, optimizer, origin)
        again, _, optimizer = made(make_model)
        state.load_checkpoint(folder, again, optimizer)
        found = trained(range(stop + 1, STEPS + 1), again, config, optimizer)
        assert all(torch.equal(found[key], tensor) for key, tensor in whole.items())


# ---- bad input ----


def test_schedules_that_are_left_open():
    def schedule(total, **fields):
        return AdaLoRAConfig.model_validate(fields).schedule(total)

    assert schedule(1000) == (100, 550, 10)
    assert schedule(1000, warmup_steps=200) == (200, 600, 10)
    assert schedule(1000, final_steps=500) == (50, 500, 10)
    assert schedule(1000, warmup_steps=0, final_steps=0, interval=7) == (0, 1000, 7)
    for total in range(1, 30):
        warmup, end, interval = schedule(total)
        assert 0 <= warmup < end <= total
        assert interval >= 1


def test_a_schedule_without_room_is_refused(make_model, ids):
    with pytest.raises(RecipeError, match=r"method\.warmup_steps: 10, and 6 final_steps, leave none of the 16 steps"):
        AdaLoRAConfig(warmup_steps=10, final_steps=6).schedule(16)
    model, config, optimizer = made(make_model, warmup_steps=STEPS)
    with pytest.raises(RecipeError, match=r"method\.warmup_steps: 16"):
        train_step(model, config, optimizer, ids, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, 0) for field in ("r", "target_r", "interval", "beta2")),
        *((field, 1.0) for field in ("beta1", "dropout")),
        *((field, -1) for field in ("warmup_steps", "final_steps", "orthogonality")),
        *(("alpha", value) for value in (0, float("inf"))),
    ],
)
def test_values_that_make_no_sense(field, value):
    with pytest.raises(ValidationError, match=field):
        config_for("adalora", **{field: value})


def test_the_target_is_at_most_the_start():
    with pytest.raises(ValidationError, match="target_r: 5 is more than r, the 4 to start from"):
        config_for("adalora", r=4, target_r=5)


@of_each_kind
def test_a_rank_above_that_of_the_weight_is_refused(kind):
    with pytest.raises(RecipeError, match="r: 25 is more than the 24 that target"):
        adapt(Holder(kind), "adalora", r=25)


def test_embeddings_are_refused(make_model):
    with pytest.raises(RecipeError, match="matches only Embedding, which cannot be adapted"):
        adapt(make_model(), "adalora", ["embed_tokens"])


# ---- PEFT's files ----


@of_each_family
@pytest.mark.parametrize("trained", [0, 7, STEPS])
def test_peft_loads_what_we_write(family, trained, make_model, ids, tmp_path):
    from peft import PeftModel

    model, config, optimizer = made(make_model, family)
    base = logits(model, ids)
    for step in range(1, trained + 1):
        train_step(model, config, optimizer, ids, step)
    if not trained:
        randomise(model)
    save_adapter(tmp_path, model, origin_of("adalora", config, base_model=""))
    theirs = PeftModel.from_pretrained(make_model(family), tmp_path).eval()
    assert_close(logits(theirs, ids), logits(model, ids), FP32)
    assert not torch.allclose(logits(model, ids), base)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["rank_pattern"] is None


def pruned(make_model, family, ids, folder):
    """Writes a file of PEFT's own, trained to the end; returns PEFT's model."""
    theirs = peft_twin(make_model(family), family, deltaT=1)
    optimizer = torch.optim.AdamW(peft_tensors(theirs).values(), lr=0.02)
    for step in range(1, STEPS + 1):
        loss_of(theirs, ids).backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.save_pretrained(folder)
    return theirs


@of_each_family
def test_we_load_what_peft_has_pruned(family, make_model, ids, tmp_path):
    from safetensors.torch import load_file

    theirs = pruned(make_model, family, ids, tmp_path)
    ranks = {len(tensor) for key, tensor in load_file(tmp_path / WEIGHTS_FILE).items() if key.endswith("lora_E")}
    assert max(ranks) <= 6
    assert len(ranks) > 1, "nothing was pruned"
    model = make_model(family)
    attach(model, read_adapter(tmp_path))
    assert_close(logits(model, ids), logits(theirs, ids), FP32)
    assert not torch.allclose(logits(model, ids), logits(make_model(family), ids))
    assert live(model) == 4 * len(inject.adapters(model))


def test_we_load_what_peft_has_not_pruned(make_model, ids, tmp_path):
    theirs = peft_twin(make_model(), "llama", lora_alpha=0)  # which means r to PEFT
    with torch.no_grad():
        for tensor in peft_tensors(theirs).values():
            tensor.add_(0.3 * torch.randn_like(tensor))
    theirs.save_pretrained(tmp_path)
    model = make_model()
    attach(model, read_adapter(tmp_path))
    assert_close(logits(model, ids), logits(theirs, ids), FP32)


def test_a_module_that_has_lost_all_its_ranks(make_model, ids, tmp_path):
    """PEFT writes it as tensors of no rows; padded, it adds nothing."""
    theirs = pruned(make_model, "llama", ids, tmp_path)
    from safetensors.torch import load_file, save_file

    path = "model.layers.1.self_attn.q_proj"
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    for name, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
        key = f"base_model.model.{path}.{name}"
        tensors[key] = tensors[key].narrow(dim, 0, 0).contiguous()
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    fields["rank_pattern"][f"{path}.lora_E"] = [False] * 6
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields))
    with torch.no_grad():
        theirs.get_submodule(f"base_model.model.{path}").lora_E["default"].zero_()
    model = make_model()
    attach(model, read_adapter(tmp_path))
    assert_close(logits(model, ids), logits(theirs, ids), FP32)


@pytest.mark.parametrize("kept", [[True] * 5, [1] * 6, "all", 6], ids=str)
def test_a_rank_pattern_that_is_none_is_refused(kept):
    fields = {**AdaLoRA.peft_config(config_for("adalora", r=6)), "rank_pattern": {"a.lora_E": [True] * 6}}
    assert AdaLoRA.config_from_peft(fields).r == 6
    fields["rank_pattern"]["b.lora_E"] = kept
    with pytest.raises(ValueError, match=r"rank_pattern: b\.lora_E must be a list of 6 truth values"):
        AdaLoRA.config_from_peft(fields)


def test_tensors_that_are_not_of_the_ranks_kept_are_refused(make_model, ids, tmp_path):
    pruned(make_model, "llama", ids, tmp_path)
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    pattern = fields["rank_pattern"]["model.layers.0.mlp.down_proj.lora_E"]
    pattern[pattern.index(True)] = False
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields))
    with pytest.raises(ModelError, match=r"down_proj\.lora_E has shape"):
        attach(make_model(), read_adapter(tmp_path))
