"""What trains beside the adapters: parameters of the base itself, and what all adapters share."""

import pytest
import torch
from torch import nn

from peftcli import inject, methods
from peftcli.checkpoint.adapter import attach, read_adapter, save_adapter, trained_beside
from peftcli.recipe import TrainingSection
from peftcli.training.optimizers import make_optimizer, trainable_parameters
from tests.families import tiny_model
from tests.methods.building import Holder, adapt, config_for, origin_of, randomise, trainable

SHARING = {"vblora": {}, "vera": {}, "dvora": {}, "split_lora": {"combine": "task", "task_head": 0}}


def optimizer_of(model, **settings):
    return make_optimizer(model, TrainingSection(**settings), 0.01, 0.5, list(inject.head_parameters(model)))


# ---- the base's own parameters ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_trains_of_the_base_is_widened(dtype):
    """A head, a method's own choice and what a file names: all of them, and nothing that is frozen."""
    model = tiny_model("bert", "BertForSequenceClassification").to(dtype)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    config = config_for("adapter", "auto")
    inject.graft(model, methods.load("adapter"), config, 0, trained=["bert.pooler.dense"])
    inject.widen_trained(model)
    own = inject.trained_base(model)
    wide = torch.promote_types(dtype, torch.float32)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in own} == {"classifier", "dense", "LayerNorm"}
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter.dtype == (wide if name in own else dtype), name
            assert torch.equal(parameter, before[name].to(parameter.dtype))
    assert own.keys() <= trainable_parameters(model).keys(), "they are the parameters that they were"


def test_a_widened_head_is_what_the_optimizer_holds():
    model = tiny_model("bert", "BertForSequenceClassification").bfloat16()
    adapt(model, "lora", ["query"])
    inject.widen_trained(model)
    held = {id(parameter) for group in optimizer_of(model).param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in trainable(model).values()}
    assert id(model.classifier.weight) in held


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("lora", "BertForSequenceClassification", False),  # its head trains anyway, and is widened by itself
        ("bitfit", "BertForSequenceClassification", True),
        ("adapter", "BertForSequenceClassification", True),
        ("full", "BertForSequenceClassification", True),
        ("prompt", "BertForSequenceClassification", False),
    ],
)
def test_whether_the_base_trains(name, kind, expected):
    method, config = methods.load(name), methods.load(name).Config()
    assert inject.trains_base(tiny_model("bert", kind), method, config) is expected


def test_bottlenecks_alone_leave_the_base_as_it_is():
    config = config_for("adapter", "auto", layer_norms="none")
    model = tiny_model("bert", "BertForSequenceClassification")
    assert not inject.trains_base(model, methods.load("adapter"), config)
    inject.graft(model, methods.load("adapter"), config, 0)
    assert {name.rpartition(".")[0] for name in inject.trained_base(model)} == {"classifier"}


def test_a_head_that_a_file_names_is_trained_and_read_again(tmp_path):
    """`modules_to_save`, whatever it is that was trained in full."""
    model = tiny_model("llama", "LlamaForCausalLM")
    config = config_for("lora", ["q_proj"])
    inject.graft(model, methods.load("lora"), config, 0, trained=["lm_head", "layers.1.input_layernorm"])
    randomise(model)
    save_adapter(tmp_path, model, origin_of("lora", config, base_model=""))
    adapter = read_adapter(tmp_path)
    assert set(adapter.trained) == {"lm_head", "model.layers.1.input_layernorm"}
    again = tiny_model("llama", "LlamaForCausalLM")
    attach(again, adapter)
    for name, parameter in inject.trained_base(model).items():
        assert torch.equal(again.get_parameter(name), parameter)
    assert len(inject.trained_base(again)) == 2


# ---- what adapters share ----


@pytest.fixture(params=SHARING)
def sharing(request):
    """A model whose adapters share something."""
    model = tiny_model("llama", "LlamaForCausalLM")
    adapt(model, request.param, ["q_proj", "down_proj"], **SHARING[request.param])
    return model


def test_it_is_registered_once(sharing):
    shared = inject.shared_part(sharing)
    assert shared is not None
    assert [name for name, module in sharing.named_modules() if module is shared] == [inject.SHARED]
    names = [name for name, _ in sharing.named_parameters(remove_duplicate=False) if inject.SHARED in name]
    assert names == [f"{inject.SHARED}.{name}" for name, _ in shared.named_parameters()]
    places = [tensor.data_ptr() for _, tensor in [*sharing.named_parameters(), *sharing.named_buffers()]]
    assert all(places.count(tensor.data_ptr()) == 1 for tensor in [*shared.parameters(), *shared.buffers()])
    assert list(inject.parts(sharing)).count(inject.SHARED) == 1
    assert all(adapter._shared[0] is shared for adapter in inject.adapters(sharing).values())


def test_it_goes_with_the_adapters(sharing):
    before = set(tiny_model("llama", "LlamaForCausalLM").state_dict())
    inject.ungraft(sharing)
    assert inject.shared_part(sharing) is None
    assert set(sharing.state_dict()) == before


def test_all_adapters_learn_it_together():
    model = tiny_model("llama", "LlamaForCausalLM")
    adapt(model, "vblora", ["q_proj", "v_proj"])
    bank = inject.shared_part(model).bank
    ids = torch.randint(3, 40, (2, 5))
    model(input_ids=ids, labels=ids).loss.backward()
    whole = bank.grad.clone()
    parts = []
    for own in inject.adapters(model).values():
        bank.grad = None
        for other in inject.adapters(model).values():
            frozen = other is not own
            other._shared = (
                (type(inject.shared_part(model))(bank.detach().clone(), 1.0),)
                if frozen
                else (inject.shared_part(model),)
            )
        model(input_ids=ids, labels=ids).loss.backward()
        parts.append(bank.grad.clone())
    torch.testing.assert_close(sum(parts), whole)
    assert all(bool(part.any()) for part in parts)


def test_the_optimizer_has_it_once_and_at_its_own_rate():
    model = tiny_model("llama", "LlamaForSequenceClassification", pad_token_id=0)
    adapt(model, "vblora", ["q_proj", "v_proj"], bank_lr_ratio=0.25)
    groups = optimizer_of(model, weight_decay=0.1).param_groups
    rates = [(id(parameter), group["peak_lr"]) for group in groups for parameter in group["params"]]
    assert len(rates) == len(dict(rates)) == len(trainable(model))
    bank = inject.shared_part(model).bank
    assert dict(rates)[id(bank)] == pytest.approx(0.25 * 0.01)
    assert dict(rates)[id(model.score.weight)] == 0.5
    others = [rate for key, rate in rates if key not in (id(bank), id(model.score.weight))]
    assert set(others) == {0.01}


def test_it_is_told_what_each_sample_is():
    model = tiny_model("llama", "LlamaForCausalLM")
    adapt(model, "split_lora", ["q_proj"], combine="task", num_heads=2)
    tasks = torch.tensor([1, 0])
    inject.see(model, tasks)
    assert inject.shared_part(model).task_ids is tasks
    randomise(model)
    ids = torch.randint(3, 40, (2, 5))
    both = model(input_ids=ids).logits
    for row, task in enumerate(tasks.tolist()):
        inject.see(model, torch.tensor([task]))
        alone = model(input_ids=ids[row : row + 1]).logits
        torch.testing.assert_close(alone[0], both[row])
        inject.see(model, torch.tensor([1 - task]))
        assert not torch.allclose(model(input_ids=ids[row : row + 1]).logits[0], both[row])


def test_who_shares_nothing_is_told_nothing():
    for model in (Holder(), nn.Linear(2, 2)):
        inject.see(model, torch.tensor([0]))
    holder = Holder()
    adapt(holder, "lora")
    inject.see(holder, None)
    assert inject.shared_part(holder) is None


def test_what_started_at_random_learns_at_the_heads_rate_and_what_the_method_trains_at_its_own():
    """A pooler that the checkpoint lacked is no part of the head's module, but as new as the head."""
    model = tiny_model("bert", "BertForSequenceClassification")
    config = config_for("adapter", "auto")
    inject.graft(model, methods.load("adapter"), config, 0, trained=["bert.pooler.dense"])
    heads = trained_beside(model, origin_of("adapter", config, task="sequence-classification"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {
        names[id(parameter)]: group["lr"]
        for group in make_optimizer(model, TrainingSection(), 0.01, 0.5, heads).param_groups
        for parameter in group["params"]
    }
    assert {name for name, rate in rates.items() if rate == 0.5} == {
        f"{path}.{leaf}" for path in ("classifier", "bert.pooler.dense") for leaf in ("weight", "bias")
    }
    assert rates["bert.encoder.layer.0.output.LayerNorm.weight"] == 0.01
