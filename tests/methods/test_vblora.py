import json
import math

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from peftcli import inject
from peftcli.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_tensors, attach, read_adapter, save_adapter
from peftcli.errors import ModelError, RecipeError
from peftcli.methods.vblora import VBLoRA
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
from tests.methods.skeletons import count, roberta
from tests.tolerances import EXACT, STANDARD_ERRORS

FP64, FP32 = EXACT[torch.float64], EXACT[torch.float32]
KINDS = ("linear", "conv1d")
OF_FAMILY = {"llama": ["q_proj", "k_proj", "gate_proj", "down_proj"], "gpt2": ["c_attn", "c_fc", "mlp.c_proj"]}
LINEAR = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
SMALL = {"r": 4, "num_vectors": 12, "vector_length": 8}

quietly = pytest.mark.filterwarnings("ignore:::peft", "ignore::FutureWarning:transformers")


def mixture(row, bank, k):
    """Returns one piece [b] by the paper's words: the k largest logits, their softmax, the weighted vectors."""
    chosen = sorted(range(len(row)), key=lambda j: -float(row[j]))[:k]
    total = sum(math.exp(float(row[j])) for j in chosen)
    return sum(math.exp(float(row[j])) / total * bank[j] for j in chosen)


def factors(holder, k=2):
    """Returns A [r, I] and B [O, r], put together piece by piece, detached."""
    vblora, bank = holder.target.adapter, inject.shared_part(holder).bank.detach()
    A = torch.stack([torch.cat([mixture(row, bank, k) for row in rows]) for rows in vblora.logits_A.detach()])
    columns = vblora.logits_B.detach().transpose(0, 1)  # a column of B for each rank, its pieces from top to bottom
    B = torch.stack([torch.cat([mixture(row, bank, k) for row in rows]) for rows in columns], dim=1)
    return A, B


def peft_settings(family, **fields):
    from peft import VBLoRAConfig

    chosen = {**SMALL, "target_modules": OF_FAMILY[family], "fan_in_fan_out": family == "gpt2", **fields}
    return VBLoRAConfig(task_type="CAUSAL_LM", **chosen)


# ---- the closed form ----


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("topk", [1, 2, 5, 12])
def test_the_output_is_that_of_the_dense_weight(kind, topk):
    holder = adapted_holder("vblora", kind, topk=topk, r=3)
    A, B = factors(holder, topk)
    assert (A.shape, B.shape) == ((3, IN), (OUT, 3))
    x = inputs(kind, torch.float64)
    assert_close(holder(x), holder.plain(x, holder.W + B @ A), FP64)
    assert_close(holder.target.adapter.merged(holder.W), holder.W + B @ A, FP64)
    for found, expected in zip(holder.target.adapter.low_rank(), (A, B), strict=True):
        assert_close(found, expected, FP64)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_those_of_the_formula(kind):
    holder = adapted_holder("vblora", kind)
    vblora, bank = holder.target.adapter, inject.shared_part(holder).bank
    A, B = factors(holder)
    x = inputs(kind, torch.float64).requires_grad_()
    y = holder(x)
    g = torch.randn_like(y)
    y.backward(g)
    assert_close(x.grad, g @ (holder.W + B @ A), FP64)
    x_TI, g_TO = x.detach().flatten(0, 1), g.flatten(0, 1)
    dA = ((g_TO @ B).T @ x_TI).unflatten(1, (-1, 8))  # [r, I/b, b]
    dB = (g_TO.T @ (x_TI @ A.T)).T.unflatten(1, (-1, 8)).transpose(0, 1)  # [O/b, r, b]
    expected = torch.zeros_like(bank)
    for logits_, dV in ((vblora.logits_A, dA), (vblora.logits_B, dB)):
        kept = logits_.detach().topk(2).indices
        weights = torch.zeros_like(logits_).scatter(-1, kept, logits_.detach().gather(-1, kept).softmax(-1))
        along = dV @ bank.detach().T  # ∂L/∂weight
        of_softmax = weights * (along - (weights * along).sum(-1, keepdim=True))
        assert_close(logits_.grad, of_softmax, FP64)
        assert torch.equal(logits_.grad != 0, weights != 0)
        expected += torch.einsum("...h,...b->hb", weights, dV)
    assert_close(bank.grad, expected, FP64)


def test_gradcheck():
    holder = adapted_holder("vblora")
    x = inputs("linear", torch.float64, length=2).requires_grad_()
    tensors = (x, *trainable(holder).values())
    assert len(tensors) == 4
    assert torch.autograd.gradcheck(lambda x, *_: holder(x), tensors, fast_mode=True)


def test_logits_far_apart_choose_single_vectors():
    holder = adapted_holder("vblora")
    vblora, bank = holder.target.adapter, inject.shared_part(holder).bank
    with torch.no_grad():
        vblora.logits_A.copy_(1000 * torch.eye(12, dtype=torch.float64)[torch.randint(12, (4, IN // 8))])
    pieces = vblora.low_rank()[0].unflatten(1, (-1, 8))
    assert torch.equal(pieces, bank[vblora.logits_A.argmax(-1)])


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_on_the_adapters_input_alone(kind):
    holder = adapted_holder("vblora", kind, dropout=0.4).train()
    A, B = factors(holder)
    x = inputs(kind, torch.float64)
    torch.manual_seed(3)
    y = holder(x)
    torch.manual_seed(3)
    assert_close(y, holder.plain(x, holder.W) + dropout(x, 0.4) @ A.T @ B.T, FP64)


@pytest.mark.parametrize("kind", KINDS)
def test_it_becomes_a_lora(kind):
    holder, lora = adapted_holder("vblora", kind), Holder(kind, torch.float64)
    lora.load_state_dict({key: value for key, value in holder.state_dict().items() if "adapter" not in key})
    adapt(lora, "lora", r=4, alpha=4.0)
    A, B = holder.target.adapter.low_rank()
    lora.target.adapter.A.data, lora.target.adapter.B.data = A.detach(), B.detach()
    x = inputs(kind, torch.float64)
    assert_close(holder(x), lora(x), FP64)


# ---- the start ----


def test_it_starts_small_but_not_at_nothing(make_model):
    model = make_model()
    adapt(model, "vblora", OF_FAMILY["llama"])
    shared = inject.shared_part(model)
    assert 0.015 < float(shared.bank.detach().abs().max()) <= 0.02
    assert shared.bank.detach().unique().numel() > 90
    starts = torch.cat([p.detach().flatten() for a in inject.adapters(model).values() for p in a.parameters()])
    assert abs(float(starts.mean())) <= STANDARD_ERRORS * 0.1 / math.sqrt(starts.numel())
    assert abs(float(starts.square().mean()) / 0.01 - 1) <= STANDARD_ERRORS * math.sqrt(2 / starts.numel())
    for adapter in inject.adapters(model).values():
        A, B = (factor.detach() for factor in adapter.low_rank())
        assert 0 < float((B @ A).abs().max()) <= 4 * 0.02**2  # r times two numbers of at most 0.02


def test_the_start_is_a_function_of_the_seed(make_model):
    def start(seed):
        model = make_model()
        adapt(model, "vblora", OF_FAMILY["llama"], seed=seed)
        return adapter_tensors(model)

    torch.manual_seed(1)
    first = start(0)
    torch.manual_seed(2)
    assert all(torch.equal(tensor, first[key]) for key, tensor in start(0).items())
    assert not any(torch.equal(tensor, first[key]) for key, tensor in start(1).items())


# ---- the shared bank ----


def test_all_modules_share_one_bank_that_trains_slower(make_model):
    model = make_model()
    adapt(model, "vblora", OF_FAMILY["llama"])
    shared = inject.shared_part(model)
    assert shared.bank.shape == (12, 8)
    assert [name for name in trainable(model) if "bank" in name] == ["shared_adapter.bank"]
    assert shared.learning_rate_factors() == {"bank": 0.1}
    assert VBLoRA.default_learning_rate * 0.1 == pytest.approx(1e-3)
    with torch.no_grad():
        shared.bank.zero_()
    assert not any(adapter.low_rank()[0].any() for adapter in inject.adapters(model).values())
    adapt(other := Holder(), "vblora", bank_lr_ratio=0.5)
    assert inject.shared_part(other).learning_rate_factors() == {"bank": 0.5}


# ---- beside PEFT ----


@quietly
@pytest.mark.parametrize("family", OF_FAMILY)
@pytest.mark.parametrize("topk", [2, 3])
def test_outputs_and_gradients_are_pefts(family, topk, make_model, ids):
    model = make_model(family, torch.float64)
    twin = twin_of(model, peft_settings(family, topk=topk)).double().eval()
    adapt(model, "vblora", OF_FAMILY[family], topk=topk)
    model.double()
    randomise(model)
    give(twin, model)
    found = compared(model, twin, ids)
    assert_close(found.logits[0], found.logits[1], FP64)
    assert_close(*found.loss, FP64)
    assert len(found.gradients) == 2 * len(inject.adapters(model)) + 1
    for ours, theirs in found.gradients.values():
        assert_close(ours, theirs, FP64)
    plain = twin.merge_and_unload()
    for path, adapter in inject.adapters(model).items():
        kind = kind_of(model.get_submodule(path))
        W, expected = (dense_weight(one.get_submodule(path), kind) for one in (model, plain))
        assert_close(adapter.merged(W), expected, FP64)


def adapted(make_model, family, **fields):
    model = make_model(family)
    config, _ = adapt(model, "vblora", OF_FAMILY[family], **fields)
    randomise(model)
    return model, config


@quietly
@pytest.mark.parametrize("family", OF_FAMILY)
@pytest.mark.parametrize(("topk_only", "topk"), [(False, 2), (True, 1), (True, 2), (True, 3)])
def test_peft_loads_what_we_write(family, topk_only, topk, make_model, ids, tmp_path):
    from peft import PeftModel

    model, config = adapted(make_model, family, topk=topk, save_topk_only=topk_only, dropout=0.1)
    save_adapter(tmp_path, model, origin_of("vblora", config, base_model=""))
    assert any("topk" in key for key in load_file(tmp_path / WEIGHTS_FILE)) == topk_only
    theirs = PeftModel.from_pretrained(make_model(family), tmp_path).eval()
    assert_close(logits(theirs, ids), logits(model, ids), FP32)
    assert not torch.allclose(logits(model, ids), logits(make_model(family), ids))
    again = make_model(family)
    attach(again, read_adapter(tmp_path))
    assert_close(logits(again, ids), logits(model, ids), FP32)
    if not topk_only:
        assert torch.equal(logits(again, ids), logits(model, ids))
    kept = config.model_dump(exclude={"target_modules"})
    assert read_adapter(tmp_path).config.model_dump(exclude={"target_modules"}) == kept


@quietly
@pytest.mark.parametrize("family", OF_FAMILY)
@pytest.mark.parametrize(("topk_only", "num_vectors"), [(False, 12), (True, 12), (True, 300)])
def test_we_load_what_peft_writes(family, topk_only, num_vectors, make_model, ids, tmp_path):
    fields = {"save_only_topk_weights": topk_only, "num_vectors": num_vectors, "vblora_dropout": 0.1, "topk": 3}
    theirs = twin_of(make_model(family), peft_settings(family, **fields)).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    assert any("topk" in key for key in load_file(tmp_path / WEIGHTS_FILE)) == topk_only
    model = make_model(family)
    attach(model, read_adapter(tmp_path))
    assert_close(logits(model, ids), logits(theirs, ids), FP32)
    assert not torch.allclose(logits(model, ids), logits(make_model(family), ids))


@quietly
def test_both_write_the_same_file_of_the_chosen_alone(make_model, tmp_path):
    model, config = adapted(make_model, "llama", save_topk_only=True)
    twin = twin_of(make_model(), peft_settings("llama", save_only_topk_weights=True))
    give(twin, model)
    twin.save_pretrained(tmp_path / "theirs")
    theirs = load_file(tmp_path / "theirs" / WEIGHTS_FILE)
    ours = VBLoRA.tensors_to_peft(adapter_tensors(model), config)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype
        assert_close(ours[key].double(), tensor.double(), FP32)


# ---- the chosen alone ----


def test_a_checkpoint_keeps_every_logit(make_model, tmp_path):
    model, config = adapted(make_model, "llama", save_topk_only=True)
    save_adapter(tmp_path, model, origin_of("vblora", config), resumable=True)
    again = make_model()
    attach(again, read_adapter(tmp_path))
    for key, tensor in adapter_tensors(model).items():
        assert torch.equal(adapter_tensors(again)[key], tensor)


def test_training_on_from_the_chosen_alone_never_chooses_others(make_model, ids, tmp_path):
    model, config = adapted(make_model, "llama", save_topk_only=True)
    save_adapter(tmp_path, model, origin_of("vblora", config))
    attach(model := make_model(), read_adapter(tmp_path))
    chosen = {key: tensor.topk(2).indices.sort().values for key, tensor in trainable(model).items() if "logits" in key}
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        assert all(torch.isfinite(parameter.grad).all() for parameter in trainable(model).values())
        optimizer.step()
    for key, indices in chosen.items():
        assert torch.equal(model.get_parameter(key).topk(2).indices.sort().values, indices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, key: tensors.pop(key + "_topk_weights"), "do not belong together"),
        (lambda tensors, key: tensors.update({key + "_topk_weights": torch.zeros(3, 6, 2)}), "do not belong together"),
        (lambda tensors, key: tensors[key + "_topk_indices"].fill_(12), "none of the bank's 12 vectors"),
    ],
)
def test_a_damaged_file_of_the_chosen_is_told(change, message, make_model):
    model, config = adapted(make_model, "llama", save_topk_only=True)
    tensors = VBLoRA.tensors_to_peft(adapter_tensors(model), config)
    key = next(key for key in tensors if "topk" in key).rpartition("_topk")[0]
    change(tensors, key)
    with pytest.raises(ValueError, match=message):
        VBLoRA.tensors_from_peft(tensors, VBLoRA.peft_config(config))


# ---- published sizes ----


@pytest.mark.parametrize(("size", "expected"), [("base", 26_928), ("large", 33_408)])
def test_the_published_size_of_the_file(size, expected):
    """What is stored, counted in float32 numbers: 0.25 for each byte of an index."""
    model = roberta(size)
    fields = {"r": 4, "num_vectors": 90, "vector_length": 256, "save_topk_only": True}
    config, _ = adapt(model, "vblora", LINEAR, **fields)
    stored = VBLoRA.tensors_to_peft(adapter_tensors(model), config)
    assert sum(tensor.nbytes for tensor in stored.values()) == 4 * expected


def test_the_number_of_parameters_that_train():
    """Far more than what is stored: 24 modules of 24 pieces with 90 logits each, and the bank."""
    fields = {"r": 4, "num_vectors": 90, "vector_length": 256}
    assert count(roberta("base"), "vblora", ["query", "value"], **fields) == 90 * 256 + 24 * 24 * 90 == 74_880


# ---- bad input ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topk": 13}, "topk: 13 is more than the 12 vectors of the bank"),
        ({"topk": 0}, "topk"),
        ({"num_vectors": 0}, "num_vectors"),
        ({"num_vectors": 2**31}, "num_vectors"),
        ({"vector_length": 0}, "vector_length"),
        ({"r": 0}, "r\n"),
        ({"dropout": 1.0}, "dropout"),
        ({"bank_lr_ratio": 0.0}, "bank_lr_ratio"),
        ({"alpha": 4.0}, "alpha"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        config_for("vblora", **fields)


def test_what_does_not_fit_the_modules_is_refused(make_model):
    with pytest.raises(RecipeError) as raised:
        adapt(make_model(), "vblora", ["q_proj", "k_proj", "down_proj"], vector_length=16, r=25)
    assert [problem.message for problem in raised.value.problems] == [
        "method.vector_length: 16 does not divide both sides of model.layers.0.self_attn.k_proj (48 × 24); "
        "it must divide 8, the largest number that divides those of all adapted modules",
        "method.r: 25 is more than the 24 that model.layers.0.self_attn.k_proj (48 × 24) can have",
    ]


def test_embeddings_are_refused(make_model):
    with pytest.raises(RecipeError, match="matches only Embedding, which cannot be adapted"):
        adapt(make_model(), "vblora", ["embed_tokens"])


def test_a_file_without_a_field_is_told(make_model, tmp_path):
    model, config = adapted(make_model, "llama")
    save_adapter(tmp_path, model, origin_of("vblora", config))
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    del fields["num_vectors"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields))
    with pytest.raises(ModelError, match="num_vectors is missing"):
        read_adapter(tmp_path)
