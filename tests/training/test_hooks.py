"""When the loop asks a method for its penalty and tells it of its steps."""

import pytest
import torch

from peftcli import inject, methods
from tests.tolerances import LOSS, LOSS_CURVE, SAME_STEPS

ADALORA = {"target_r": 2, "warmup_steps": 1, "final_steps": 1, "interval": 1, "orthogonality": 5.0}


@pytest.fixture
def told(monkeypatch):
    """Notes, in order, what the loop asks of and tells LoRA: returns the list."""
    notes, lora = [], methods.load("lora")

    def noting(name, value=None):
        def hook(cls, config, adapters, *step):
            notes.append((name, *step))
            assert len(adapters) == 14
            return value

        monkeypatch.setattr(lora, name, classmethod(hook))

    for name in ("penalty", "before_step", "after_step"):
        noting(name)
    return notes


@pytest.mark.parametrize("cut", [(1, 8), (2, 4), (4, 2)], ids=str)
def test_a_penalty_counts_once_a_step_however_the_batch_is_cut(cut, make_trainer, tensors):
    """AdaLoRA's: with as many micro-batches as samples, a penalty on each would be eight times as strong."""
    fields = {"r": 4, **ADALORA}
    size, accumulation = cut

    def run(size, accumulation):
        trainer = make_trainer(
            method="adalora",
            fields=fields,
            joins=False,
            max_steps=4,
            warmup_steps=0,
            max_grad_norm=None,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.run()
        return trainer.task.reporter.losses, tensors(trainer.task.model)

    (losses, found), (expected_losses, expected) = run(size, accumulation), run(8, 1)
    assert list(losses.values()) == pytest.approx(list(expected_losses.values()), rel=SAME_STEPS)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=SAME_STEPS)


def test_a_penalty_is_in_the_gradient_and_not_in_the_loss(make_trainer):
    """One step of SGD moves A by the gradient of both; the loss that is reported is the data's alone."""
    moved, losses = [], []
    for weight in (0.0, 5.0):
        trainer = make_trainer(
            method="adalora",
            fields={**ADALORA, "orthogonality": weight, "warmup_steps": 0, "final_steps": 0},
            max_steps=1,
            warmup_steps=0,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=None,
        )
        adapters = inject.adapters(trainer.task.model)
        before = {name: one.A.detach().clone() for name, one in adapters.items()}
        penalty = trainer.task.origin.method.penalty(trainer.task.origin.config, adapters.values())
        slopes = None if penalty is None else torch.autograd.grad(penalty, [one.A for one in adapters.values()])
        trainer.run()
        moved.append([one.A.detach() - before[name] for name, one in adapters.items()])
        losses.append(trainer.task.reporter.losses[1])
    assert losses[0] == pytest.approx(losses[1], rel=LOSS)
    for without, with_penalty, slope in zip(*moved, slopes, strict=True):
        torch.testing.assert_close(with_penalty - without, -slope, rtol=0, atol=SAME_STEPS)
        assert bool(slope.any())


@pytest.mark.parametrize("accumulation", [1, 4])
def test_each_step_is_told_once_and_in_order(accumulation, make_trainer, told):
    make_trainer(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation).run()
    assert told == [entry for step in (1, 2, 3) for entry in (("penalty",), ("before_step",), ("after_step", step, 3))]


def test_a_resumed_run_goes_on_counting(make_trainer, told):
    first = make_trainer(max_steps=2, save_steps=2)
    first.run()
    second = make_trainer(max_steps=4)
    second.resume(first.task.run / "checkpoint-2")
    told.clear()
    second.run()
    assert [entry for entry in told if entry[0] == "after_step"] == [("after_step", 3, 4), ("after_step", 4, 4)]


def test_gradients_are_changed_before_they_are_clipped(make_trainer, monkeypatch):
    """What a method makes of them is what the norm is of, and no step is longer than it allows."""
    lora, limit = methods.load("lora"), 1e-3

    def enlarge(cls, config, adapters):
        for adapter in adapters.values():
            adapter.B.grad.mul_(1000)

    def run(**settings):
        trainer = make_trainer(max_steps=1, warmup_steps=0, optim="sgd", learning_rate=1.0, **settings)
        before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
        trainer.run()
        moved = [parameter.detach() - before[name] for name, parameter in trainer.parameters.items()]
        return trainer.last_log["grad_norm"], float(torch.stack([one.double().norm() for one in moved]).norm())

    norm, _ = run(max_grad_norm=None)
    monkeypatch.setattr(lora, "before_step", classmethod(enlarge))
    enlarged, moved = run(max_grad_norm=limit)
    assert enlarged == pytest.approx(1000 * norm, rel=LOSS_CURVE)  # A's gradients are 0 while B is
    assert moved == pytest.approx(limit, rel=LOSS_CURVE)


def test_gradients_are_still_there_after_a_step(make_trainer, monkeypatch):
    seen = []

    def look(cls, config, adapters, step, total):
        seen.append([adapter.B.grad is not None and bool(adapter.B.grad.any()) for adapter in adapters.values()])

    monkeypatch.setattr(methods.load("lora"), "after_step", classmethod(look))
    make_trainer(max_steps=2).run()
    assert seen == [[True] * 14] * 2
