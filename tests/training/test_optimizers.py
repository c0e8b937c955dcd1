"""Which parameters an optimizer gets, and with which rates and decay."""

import pytest
import torch

from peftcli import inject, methods
from peftcli.recipe import TrainingSection
from peftcli.training.optimizers import make_optimizer, set_learning_rate, trainable_parameters


@pytest.fixture
def adapted(make_model):
    def make(name, **fields):
        method, model = methods.load(name), make_model()
        inject.graft(model, method, method.Config(r=2, **fields), seed=0)
        return model

    return make


def groups_by_parameter(model, optimizer):
    """Returns each parameter's group by the last part of its name; all of one name must share one."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            kind = names[parameter].rpartition(".")[2]
            assert found.setdefault(kind, group) is group
    return found


def test_every_parameter_that_trains_and_no_other(adapted):
    model = adapted("dora")
    optimizer = make_optimizer(model, TrainingSection(), 0.1, 0.1)
    given = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(given) == len(wanted) == 3 * 14
    assert {id(parameter) for parameter in given} == {id(parameter) for parameter in wanted}
    assert list(trainable_parameters(model).values()) == wanted


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize("name", ["lora", "dora"])
def test_lora_plus_and_no_decay_on_vectors(adapted, name, optim):
    model = adapted(name, loraplus_lr_ratio=16.0)
    optimizer = make_optimizer(model, TrainingSection(weight_decay=0.25, optim=optim), 0.1, 0.1)
    found = groups_by_parameter(model, optimizer)
    assert {kind: (round(group["lr"], 9), group["weight_decay"]) for kind, group in found.items()} == {
        "A": (0.1, 0.25),
        "B": (1.6, 0.25),
        **({"m": (0.1, 0.0)} if name == "dora" else {}),
    }
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.25)  # of the peak, not of the present rate
    assert found["A"]["lr"] == pytest.approx(0.025)
    assert found["B"]["lr"] == pytest.approx(0.4)


def test_adamw_takes_the_recipes_values(adapted):
    settings = TrainingSection(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    (group,) = make_optimizer(adapted("lora"), settings, 0.1, 0.1).param_groups
    assert (group["betas"], group["eps"], group["lr"], group["weight_decay"]) == ((0.8, 0.95), 1e-6, 0.1, 0.0)


@pytest.mark.parametrize(("optim", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_optimizer_that_is_named(adapted, optim, kind):
    assert type(make_optimizer(adapted("lora"), TrainingSection(optim=optim), 0.1, 0.1)) is kind
