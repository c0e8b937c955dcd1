"""Which parameters an optimizer gets, with which rates and decay, and the steps that it makes of them."""

import subprocess
import sys
import warnings
from typing import get_args

import pytest
import torch
from torch import nn

from peftcli import inject, methods
from peftcli.checkpoint.state import folder_of
from peftcli.recipe import TrainingSection
from peftcli.training.optimizers import make_optimizer, optimizer_facts, set_learning_rate, trainable_parameters
from tests.tolerances import EIGHT_BITS, EXACT

OPTIMIZERS = get_args(TrainingSection.model_fields["optim"].annotation)
UNPAGED = {"paged_adamw_8bit": "AdamW8bit", "paged_adamw_32bit": "AdamW32bit"}


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


def effective(group, optim):
    """Returns the step size of a group and what it takes off the weights; Adafactor has both times a power of two."""
    scale = group["eps"][1] if optim == "adafactor" else 1.0
    return group["lr"] * scale, group["lr"] * group["weight_decay"]


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_has_the_rates_and_the_decay(adapted, optim):
    model = adapted("dora", loraplus_lr_ratio=16.0)
    optimizer = make_optimizer(model, TrainingSection(weight_decay=0.25, optim=optim), 0.3, 0.3)
    set_learning_rate(optimizer, 0.5)
    found = {kind: effective(group, optim) for kind, group in groups_by_parameter(model, optimizer).items()}
    assert found == {"A": (0.15, 0.15 * 0.25), "B": (2.4, 2.4 * 0.25), "m": (0.15, 0.0)}  # to the bit


class Matrices(nn.Module):
    """A matrix that is held in 8 bits, one that is not, and a vector."""

    SIZES = (64, 96), (8, 12), (40,)

    def __init__(self, dtype=torch.float32):
        super().__init__()
        noise = torch.Generator().manual_seed(5)
        values = (torch.randn(size, generator=noise, dtype=torch.float64) for size in self.SIZES)
        self.large, self.small, self.vector = (nn.Parameter(value.to(dtype)) for value in values)

    def learn(self, optimizer, steps=5, scale=1.0):
        """Steps along gradients that are the same for every optimizer; returns where each parameter has gone."""
        for step in range(steps):
            for parameter, gradient in zip(self.parameters(), gradients(step, scale), strict=True):
                parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}


def gradients(step, scale=1.0):
    noise = torch.Generator().manual_seed(100 + step)
    return [scale * torch.randn(size, generator=noise, dtype=torch.float64) for size in Matrices.SIZES]


def learned(optim, rate=0.01, steps=5, scale=1.0, **settings):
    """Returns where `optim` has taken each parameter, and its optimizer."""
    model = Matrices()
    optimizer = make_optimizer(model, TrainingSection(optim=optim, **settings), rate, rate)
    return model.learn(optimizer, steps, scale), optimizer


def apart(one, other):
    """Returns how far apart two paths from the start ended, relative to the second; the largest of the parameters."""
    start = {name: parameter.detach() for name, parameter in Matrices().named_parameters()}
    return max(float((one[name] - end).norm() / (end - start[name]).norm()) for name, end in other.items())


def closed_form(step, rate, decay, steps=5, scale=1.0):
    """Returns where `step`, of (parameter, its state, gradient, number from 1), takes the parameters in float64."""
    model = Matrices(torch.float64)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    states = {name: {} for name in values}
    for number in range(steps):
        for name, gradient in zip(values, gradients(number, scale), strict=True):
            kept = 1 - rate * (decay if values[name].ndim > 1 else 0)
            values[name] = kept * values[name] - rate * step(states[name], gradient, number + 1)
    return values


def adamw_step(state, gradient, number, beta1=0.9, beta2=0.999, epsilon=1e-8):
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * gradient
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * gradient**2
    return state["m"] / (1 - beta1**number) / ((state["v"] / (1 - beta2**number)).sqrt() + epsilon)


def lion_step(state, gradient, number, beta1=0.9, beta2=0.99):
    """Algorithm 2 of arXiv 2302.06675."""
    update = (beta1 * state.get("m", 0) + (1 - beta1) * gradient).sign()
    state["m"] = beta2 * state.get("m", 0) + (1 - beta2) * gradient
    return update


def adafactor_step(state, gradient, number):
    """Algorithms 4 and 5 of arXiv 1804.04235, with sums as the paper has them, but without ε₁ and parameter scaling."""
    beta2 = 1 - number**-0.8
    square = gradient**2
    if gradient.ndim == 1:
        state["V"] = V = beta2 * state.get("V", 0) + (1 - beta2) * square
    else:
        state["R"] = R = beta2 * state.get("R", 0) + (1 - beta2) * square.sum(1, keepdim=True)
        state["C"] = C = beta2 * state.get("C", 0) + (1 - beta2) * square.sum(0, keepdim=True)
        V = R @ C / R.sum()
    U = gradient / V.sqrt()
    return U / max(1.0, float(U.square().mean().sqrt()))


def sgd_step(state, gradient, number):
    return gradient


STEPS = {"adamw": adamw_step, "paged_adamw_32bit": adamw_step, "adafactor": adafactor_step, "sgd": sgd_step}


@pytest.mark.parametrize("optim", STEPS)
def test_its_steps_are_the_papers(optim):
    found, _ = learned(optim, 0.05, weight_decay=0.5)
    assert apart(found, closed_form(STEPS[optim], 0.05, 0.5)) < EXACT[torch.float32]


def test_lions_steps_are_the_papers():
    """Of what is held in 32 bits: a sign is not nearly right. Its own beta2 makes a difference here."""
    found, _ = learned("lion_8bit", 0.05, weight_decay=0.5)
    expected, other = (closed_form(step, 0.05, 0.5) for step in (lion_step, lambda *a: lion_step(*a, beta2=0.9)))
    del found["large"], expected["large"], other["large"]
    assert apart(found, expected) < EXACT[torch.float32] < apart(other, expected)


@pytest.mark.parametrize("scale", [1e-4, 1e-8])
def test_adafactor_does_not_mind_the_gradients_scale(scale):
    """torch's own ε₁ would: it hides what gradients below 1e-7 have to tell."""
    found, _ = learned("adafactor", 0.05, scale=scale)
    assert apart(found, learned("adafactor", 0.05)[0]) < EXACT[torch.float32]


def test_adafactor_stays_where_gradients_are_zero():
    """As those of LoRA's A are in the first step, since B is zero."""
    found, _ = learned("adafactor", 0.05, scale=0.0)
    assert all(value.equal(start) for value, start in zip(found.values(), Matrices().parameters(), strict=True))


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bits_of_adamw_take_nearly_its_way(optim):
    found, optimizer = learned(optim, weight_decay=0.5)
    exact, _ = learned("adamw", weight_decay=0.5)
    assert 0 < apart(found, exact) < EIGHT_BITS
    large = found.pop("large")
    assert not large.equal(exact["large"])
    assert apart(found, {name: exact[name] for name in found}) < EXACT[torch.float32]  # the small are in 32 bits
    held = [kept["state1"].dtype for kept in optimizer.state.values()]
    assert held == [torch.uint8, torch.float32, torch.float32]


def test_8_bits_of_lion_take_mostly_its_way():
    """Its step is a sign, which only moments near 0 can get wrong."""
    found, _ = learned("lion_8bit", 0.01)
    expected = closed_form(lion_step, 0.01, 0)
    wrong = (found["large"] - expected["large"]).abs() > 0.01
    assert 0 < float(wrong.double().mean()) < EIGHT_BITS


@pytest.mark.parametrize("optim", UNPAGED)
def test_paged_is_unpaged_on_a_cpu(optim):
    """To the bit, and as bitsandbytes' own paged class, which warns that it pages nothing."""
    import bitsandbytes

    found, _ = learned(optim)
    for name in (UNPAGED[optim], f"Paged{UNPAGED[optim]}"):
        model = Matrices()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kind = getattr(bitsandbytes.optim, name)
            expected = model.learn(kind(model.parameters(), lr=0.01, weight_decay=0.0))
        assert any("not supported on CPU" in str(one.message) for one in caught) is name.startswith("Paged")
        assert all(found[key].equal(value) for key, value in expected.items())


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(optim, make_trainer):
    rate = {"sgd": 0.5, "lion_8bit": 0.003}.get(optim, 0.01)
    trainer = make_trainer(max_steps=12, optim=optim, learning_rate=rate)
    trainer.run()
    losses = list(trainer.task.reporter.losses.values())
    assert sum(losses[-4:]) < 0.99 * sum(losses[:4])  # the same samples each


# ---- what is said of it ----


def sized(*sizes):
    return [torch.zeros(size, device="meta") for size in sizes]


@pytest.mark.parametrize(
    ("optim", "sizes", "facts"),
    [
        ("adamw", (9, 9000), []),
        ("sgd", (9, 9000), []),
        ("adafactor", (9, 9000), []),
        (
            "adamw_8bit",
            (4095, 4096, 8000, 9),
            [
                "adamw_8bit: the moments of 2 of 4 tensors, 74.7% of the trained numbers, are held in 8 bits; "
                "those of tensors below 4,096 numbers stay in 32"
            ],
        ),
        (
            "adamw_8bit",
            (4095, 9),
            [
                "adamw_8bit holds nothing in 8 bits here: none of the 2 tensors has 4,096 numbers, "
                "and the moments of smaller ones stay in 32 bits; choose adamw"
            ],
        ),
        (
            "lion_8bit",
            (9, 4095, 1),
            [
                "lion_8bit holds nothing in 8 bits here: none of the 3 tensors has 4,096 numbers, "
                "and the moments of smaller ones stay in 32 bits; "
                "it is Lion in 32 bits; for less memory choose adafactor"
            ],
        ),
        (
            "paged_adamw_32bit",
            (9, 9000),
            ["paged_adamw_32bit pages nothing here: that needs a CUDA GPU; adamw does the same"],
        ),
        (
            "paged_adamw_8bit",
            (9, 9000),
            [
                "paged_adamw_8bit: the moments of 1 of 2 tensors, 99.9% of the trained numbers, are held in 8 bits; "
                "those of tensors below 4,096 numbers stay in 32",
                "paged_adamw_8bit pages nothing here: that needs a CUDA GPU; adamw_8bit does the same",
            ],
        ),
        (
            "paged_adamw_8bit",
            (9,),
            [
                "paged_adamw_8bit holds nothing in 8 bits here: none of the 1 tensors has 4,096 numbers, "
                "and the moments of smaller ones stay in 32 bits; choose adamw",
                "paged_adamw_8bit pages nothing here: that needs a CUDA GPU; adamw does the same",
            ],
        ),
    ],
)
def test_what_is_said(optim, sizes, facts):
    assert optimizer_facts(optim, sized(*sizes)) == facts


def test_what_is_said_of_pages_on_a_gpu():
    """Of stand-ins for tensors there, since no test has a GPU."""

    class Claims:
        device = torch.device("cuda")

        def __init__(self, size):
            self.numel = lambda: size

    assert optimizer_facts("paged_adamw_32bit", [Claims(99_999), Claims(100_000)]) == [
        "paged_adamw_32bit: the moments of 1 of 2 tensors are paged; tensors below 100,000 numbers never are"
    ]
    assert optimizer_facts("paged_adamw_32bit", [Claims(99_999)]) == [
        "paged_adamw_32bit: the moments of 0 of 1 tensors are paged; tensors below 100,000 numbers never are; "
        "adamw does the same"
    ]


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "lion_8bit"])
def test_what_is_said_of_8_bits_is_so(optim):
    model = Matrices()
    optimizer = make_optimizer(model, TrainingSection(optim=optim), 0.01, 0.01)
    fact = optimizer_facts(optim, list(model.parameters()))[0]
    model.learn(optimizer, 1)
    packed = [parameter.numel() for parameter, kept in optimizer.state.items() if kept["state1"].dtype == torch.uint8]
    share = sum(packed) / sum(parameter.numel() for parameter in model.parameters())
    assert f"the moments of {len(packed)} of 3 tensors, {share:.1%} of the" in fact


def test_it_is_said_once_and_without_bitsandbytes_own_warnings(make_trainer):
    trainer = make_trainer(max_steps=2, optim="paged_adamw_8bit")
    trainer.run()
    assert trainer.task.reporter.notes == optimizer_facts("paged_adamw_8bit", trainer.parameters.values())
    assert len(trainer.task.reporter.notes) == 2


def test_a_resumed_optimizer_is_not_loaded_a_second_time(make_trainer, tmp_path):
    """Accelerate would, into copies: of bitsandbytes' pages these are ordinary memory."""
    make_trainer(max_steps=2, optim="adamw_8bit").run()
    trainer = make_trainer(max_steps=4, optim="adamw_8bit")
    trainer.resume(folder_of(tmp_path, 2))
    before = {name: dict(trainer.optimizer.state[parameter]) for name, parameter in trainer.parameters.items()}
    trainer.run()
    for name, parameter in trainer.parameters.items():
        after = trainer.optimizer.state[parameter]
        assert (before[name]["step"], after["step"]) == (2, 4)
        assert after["state1"] is before[name]["state1"]


def test_bitsandbytes_waits_for_an_optimizer_of_its_own():
    code = (
        "import sys, torch; from peftcli.recipe import TrainingSection; from peftcli.training import optimizers\n"
        "model = torch.nn.Linear(2, 3)\n"
        "for optim in ('adamw', 'adafactor', 'sgd', 'adamw_8bit'):\n"
        "    optimizers.make_optimizer(model, TrainingSection(optim=optim), 0.1, 0.1)\n"
        "    print('bitsandbytes' in sys.modules)\n"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["False", "False", "False", "True"], "")


@pytest.mark.parametrize(
    ("optim", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("adafactor", torch.optim.Adafactor)]
)
def test_the_optimizer_that_is_named(adapted, optim, kind):
    assert type(make_optimizer(adapted("lora"), TrainingSection(optim=optim), 0.1, 0.1)) is kind
