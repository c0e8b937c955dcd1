import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from peftcli import inject
from peftcli.checkpoint.adapter import attach, read_adapter, save_adapter
from peftcli.errors import ModelError, RecipeError
from peftcli.ops.dropout import dropout
from peftcli.sites import dense_weight, kind_of
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
    origin_of,
    randomise,
    trainable,
)
from tests.methods.peft_twins import compared, give, stir, twin_of
from tests.methods.skeletons import count, llama_7b, roberta
from tests.tolerances import EXACT, STANDARD_ERRORS

FP64, FP32 = EXACT[torch.float64], EXACT[torch.float32]
KINDS = ("linear", "conv1d")
SHAPES = ["q_proj", "k_proj", "gate_proj", "down_proj"]  # 48 × 48, 48 × 24, 48 × 80, 80 × 48
OF_FAMILY = {"llama": SHAPES, "gpt2": ["c_attn", "c_fc", "mlp.c_proj"]}

quietly = pytest.mark.filterwarnings("ignore:::peft", "ignore::FutureWarning:transformers")


def parts(holder):
    """Returns A, B, b, d and ΔW by the paper's formula, all detached."""
    vera, shared = holder.target.adapter, inject.shared_part(holder)
    A, B, b, d = shared.A, shared.B, vera.b.detach(), vera.d.detach()
    return A, B, b, d, torch.diag(b) @ B @ torch.diag(d) @ A


def peft_settings(family, **fields):
    from peft import VeraConfig

    chosen = {"r": 4, "target_modules": OF_FAMILY[family], "fan_in_fan_out": family == "gpt2", **fields}
    return VeraConfig(task_type="CAUSAL_LM", **chosen)


# ---- the closed form ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("r", [4, 60])  # the rank may be more than a side of the weight
def test_the_output_is_that_of_the_dense_weight(kind, r):
    holder = adapted_holder("vera", kind, r=r)
    A, B, b, d, delta = parts(holder)
    assert (A.shape, B.shape, b.shape, d.shape) == ((r, IN), (OUT, r), (OUT,), (r,))
    x = inputs(kind, torch.float64)
    assert_close(holder(x), holder.plain(x, holder.W + delta), FP64)
    assert_close(holder.target.adapter.merged(holder.W), holder.W + delta, FP64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_those_of_the_formula(kind):
    holder = adapted_holder("vera", kind)
    A, B, b, d, delta = parts(holder)
    x = inputs(kind, torch.float64).requires_grad_()
    y = holder(x)
    g = torch.randn_like(y)
    y.backward(g)
    x_TI, g_TO = x.detach().flatten(0, 1), g.flatten(0, 1)
    assert_close(holder.target.adapter.b.grad, (g_TO * (d * (x_TI @ A.T) @ B.T)).sum(0), FP64)
    assert_close(holder.target.adapter.d.grad, ((b * g_TO) @ B * (x_TI @ A.T)).sum(0), FP64)
    assert_close(x.grad, g @ (holder.W + delta), FP64)


def test_gradcheck():
    holder = adapted_holder("vera")
    x = inputs("linear", torch.float64, length=2).requires_grad_()
    tensors = (x, *trainable(holder).values())
    assert len(tensors) == 3
    assert torch.autograd.gradcheck(lambda x, *_: holder(x), tensors, fast_mode=True)


def test_at_the_first_step_only_b_has_a_gradient():
    holder = adapted_holder("vera", noisy=False, d_initial=0.3)
    vera = holder.target.adapter
    assert not vera.b.any()
    assert torch.equal(vera.d, torch.full((4,), 0.3, dtype=vera.d.dtype).float().double())
    holder(inputs("linear", torch.float64)).square().sum().backward()
    assert not vera.d.grad.any()
    assert vera.b.grad.all()


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_on_the_adapters_input_alone(kind):
    holder = adapted_holder("vera", kind, dropout=0.4).train()
    x = inputs(kind, torch.float64)
    torch.manual_seed(3)
    y = holder(x)
    torch.manual_seed(3)
    assert_close(y, holder.plain(x, holder.W) + dropout(x, 0.4) @ parts(holder)[-1].T, FP64)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_lora_with_scaled_factors(kind):
    holder, lora = adapted_holder("vera", kind), Holder(kind, torch.float64)
    lora.load_state_dict({key: value for key, value in holder.state_dict().items() if "adapter" not in key})
    adapt(lora, "lora", r=4, alpha=4.0)
    A, B, b, d, _ = parts(holder)
    lora.target.adapter.A.data, lora.target.adapter.B.data = d[:, None] * A, b[:, None] * B
    x = inputs(kind, torch.float64)
    assert_close(holder(x), lora(x), FP64)
    A, B = holder.target.adapter.low_rank()
    lora.target.adapter.A.data, lora.target.adapter.B.data = A.detach(), B.detach()
    assert_close(holder(x), lora(x), FP64)


def test_training_keeps_nothing_of_the_inputs_or_outputs_size():
    """A and B are frozen, so what a trained matrix would need for its gradient is never kept."""
    holder = adapted_holder("vera").train()
    x, shapes = inputs("linear", torch.float64).requires_grad_(), []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        holder(x)
    assert (3, 7, 4) in shapes  # x Aᵀ
    assert not [shape for shape in shapes if math.prod(shape) in (x.numel(), 21 * OUT)]


# ---- the shared pair ----


def test_all_modules_share_one_frozen_pair_and_take_slices_of_it(make_model):
    model = make_model()
    adapt(model, "vera", SHAPES)
    shared = inject.shared_part(model)
    assert (shared.A.shape, shared.B.shape) == ((4, 80), (80, 4))
    starts = set()
    for adapter in inject.adapters(model).values():
        A, _, scale = adapter.factors()
        starts.add((A.data_ptr(), scale))
        assert A.shape == (4, adapter.in_features)
        with torch.no_grad():
            adapter.b.fill_(1)
            adapter.d.fill_(1)
        assert torch.equal(adapter.factors()[1], shared.B[: adapter.out_features])
    assert starts == {(shared.A.data_ptr(), 1.0)}
    assert {name.rpartition(".")[2] for name in trainable(model)} == {"b", "d"}
    assert not [key for key in model.state_dict() if key.startswith("shared_adapter")]  # no copy in checkpoints
    assert not list(shared.parameters())


@quietly
@pytest.mark.parametrize("family", OF_FAMILY)
@pytest.mark.parametrize("key", [0, 1234567])
def test_the_pair_is_pefts_to_the_last_bit(family, key, make_model):
    model = make_model(family)
    twin = twin_of(model, peft_settings(family, r=7, projection_prng_key=key))
    adapt(model, "vera", OF_FAMILY[family], r=7, projection_prng_key=key, seed=99)
    shared = inject.shared_part(model)
    assert torch.equal(shared.A, twin.base_model.vera_A["default"])
    assert torch.equal(shared.B, twin.base_model.vera_B["default"])


def test_the_pair_is_uniform_with_kaimings_bounds():
    holder = Holder()
    holder.target = nn.Linear(3000, 2000)
    adapt(holder, "vera", r=16)
    shared = inject.shared_part(holder)
    for matrix, fan_in in ((shared.A, 3000), (shared.B, 16)):
        unit = matrix * math.sqrt(fan_in / 6)
        assert 0.99 < float(unit.max()) <= 1 + FP32
        assert -1 - FP32 <= float(unit.min()) < -0.99
        assert abs(float(unit.mean())) <= STANDARD_ERRORS / math.sqrt(3 * unit.numel())
        assert abs(float(unit.square().mean()) - 1 / 3) <= STANDARD_ERRORS * math.sqrt(4 / 45 / unit.numel())


# ---- beside PEFT ----


@quietly
@pytest.mark.parametrize("family", OF_FAMILY)
def test_outputs_and_gradients_are_pefts(family, make_model, ids):
    model = make_model(family, torch.float64)
    twin = twin_of(model, peft_settings(family)).double().eval()
    adapt(model, "vera", OF_FAMILY[family])
    model.double()
    randomise(model)
    give(twin, model)
    found = compared(model, twin, ids)
    assert_close(found.logits[0], found.logits[1], FP64)
    assert_close(*found.loss, FP64)
    assert len(found.gradients) == 2 * len(inject.adapters(model))
    for ours, theirs in found.gradients.values():
        assert_close(ours, theirs, FP64)
    plain = twin.merge_and_unload()
    for path, adapter in inject.adapters(model).items():
        kind = kind_of(model.get_submodule(path))
        W, expected = (dense_weight(one.get_submodule(path), kind) for one in (model, plain))
        assert_close(adapter.merged(W), expected, FP64)


@quietly
@pytest.mark.parametrize("family", OF_FAMILY)
@pytest.mark.parametrize("saved", [True, False])
def test_peft_loads_what_we_write(family, saved, make_model, ids, tmp_path):
    from peft import PeftModel

    model = make_model(family)
    fields = {"projection_prng_key": 5, "dropout": 0.1, "save_projection": saved}
    config, _ = adapt(model, "vera", OF_FAMILY[family], **fields)
    randomise(model)
    save_adapter(tmp_path, model, origin_of("vera", config, base_model=""))
    theirs = PeftModel.from_pretrained(make_model(family), tmp_path).eval()
    assert_close(logits(theirs, ids), logits(model, ids), FP32)
    assert not torch.allclose(logits(model, ids), logits(make_model(family), ids))
    assert read_adapter(tmp_path).config.model_dump(exclude={"target_modules"}) == config.model_dump(
        exclude={"target_modules"}
    )


@quietly
@pytest.mark.parametrize("family", OF_FAMILY)
@pytest.mark.parametrize("saved", [True, False])
def test_we_load_what_peft_writes(family, saved, make_model, ids, tmp_path):
    fields = {"projection_prng_key": 5, "vera_dropout": 0.1, "d_initial": 0.2, "save_projection": saved}
    theirs = twin_of(make_model(family), peft_settings(family, **fields)).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    model = make_model(family)
    attach(model, read_adapter(tmp_path))
    assert_close(logits(model, ids), logits(theirs, ids), FP32)
    assert not torch.allclose(logits(model, ids), logits(make_model(family), ids))


@quietly
def test_trained_biases_are_refused(make_model, tmp_path):
    twin_of(make_model(), peft_settings("llama", bias="vera_only")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="bias = vera_only"):
        read_adapter(tmp_path)


# ---- published sizes ----


@pytest.mark.parametrize(
    ("size", "r", "expected"),
    [("base", 1, 18_456), ("base", 256, 24_576), ("base", 1024, 43_008), ("large", 1, 49_200), ("large", 256, 61_440)],
)
def test_the_published_numbers_of_parameters(size, r, expected):
    assert count(roberta(size), "vera", ["query", "value"], r=r) == expected


def test_the_published_number_for_llama():
    assert count(llama_7b(), "vera", "all-linear", r=1024) == 1_589_248


def test_auto_means_queries_and_values(make_model):
    model = make_model()
    adapt(model, "vera", "auto")
    assert {path.rpartition(".")[2] for path in inject.adapters(model)} == {"q_proj", "v_proj"}


# ---- bad input ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_initial": 0.0}, "d_initial: b starts at 0"),
        ({"d_initial": float("nan")}, "d_initial"),
        ({"r": 0}, "r\n"),
        ({"dropout": 1.0}, "dropout"),
        ({"projection_prng_key": -1}, "projection_prng_key"),
        ({"projection_prng_key": 2**63}, "projection_prng_key"),
        ({"alpha": 4.0}, "alpha"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        config_for("vera", **fields)


def test_embeddings_are_refused(make_model):
    with pytest.raises(RecipeError, match="matches only Embedding, which cannot be adapted"):
        adapt(make_model(), "vera", ["embed_tokens"])
