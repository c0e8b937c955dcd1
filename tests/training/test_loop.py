"""What the loop does when: logging, evaluating, saving, keeping the best, stopping, and refusing bad numbers."""

import json

import pytest
import torch
from torch import nn

from peftcli import inject
from peftcli.checkpoint import state
from peftcli.data.batching import Batcher
from peftcli.errors import ModelError, NumericalError
from peftcli.training import checks, loss
from tests.tolerances import EXACT, LOSS, LOSS_CURVE

SAMPLES_PER_EPOCH = 8  # of `make_trainer` as it is


def metrics(trainer):
    """Returns the lines of metrics.jsonl."""
    return [json.loads(line) for line in (trainer.task.run / "metrics.jsonl").read_text().splitlines()]


def saved(trainer):
    return list(state.checkpoints(trainer.task.run))


def steps_of(lines, key):
    return [line["step"] for line in lines if key in line]


def test_logs_average_over_tokens_since_the_last_log(make_trainer):
    trainer = make_trainer(logging_steps=3, max_steps=8, warmup_steps=2, lr_scheduler_type="linear")
    result = trainer.run()
    lines, losses = metrics(trainer), trainer.task.reporter.losses
    assert steps_of(lines, "loss") == [3, 6, 8]
    assert list(losses) == list(range(1, 9))
    tokens = [
        sum(trainer.task.batcher.batch(micro).num_supervised for micro in trainer.task.plan.step(step))
        for step in range(8)
    ]
    for first, last, line in zip((0, 3, 6), (3, 6, 8), lines, strict=True):
        weighted = sum(losses[step + 1] * tokens[step] for step in range(first, last)) / sum(tokens[first:last])
        assert line["loss"] == pytest.approx(weighted, rel=LOSS)
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.01, 0.01 * 3 / 6, 0.01 / 6])
    assert [line["epoch"] for line in lines] == [0.75, 1.5, 2.0]
    assert all(line["tokens_per_second"] > 0 and line["memory_gb"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert trainer.task.reporter.logged == [(line.pop("step"), line) for line in metrics(trainer)]
    assert (result.last_log["loss"], result.progress.tokens) == (lines[-1]["loss"], sum(tokens))


def test_the_loss_of_a_step_is_the_mean_over_its_tokens(make_trainer):
    trainer = make_trainer(max_steps=1, gradient_accumulation_steps=2)
    batches = [trainer.task.batcher.batch(micro) for micro in trainer.task.plan.step(0)]
    summed = sum(loss.score_reference(trainer.task.model, batch).item() for batch in batches)
    tokens = sum(batch.num_supervised for batch in batches)
    assert batches[0].num_supervised != batches[1].num_supervised
    trainer.run()
    assert trainer.task.reporter.losses[1] == pytest.approx(summed / tokens, rel=LOSS)


def test_an_epochs_last_step_is_smaller_and_no_sample_is_left_out(make_trainer):
    trainer = make_trainer(lengths=(9, 3, 14, 6, 11, 5, 7), gradient_accumulation_steps=2, num_train_epochs=2.0)
    supervised = int(trainer.task.batcher.dataset.supervised.sum())
    result = trainer.run()
    assert trainer.task.plan.steps_per_epoch == 2
    assert (result.progress.step, result.progress.tokens) == (4, 2 * supervised)


def test_each_epoch_has_every_sample_once_in_an_order_of_its_own(make_trainer, monkeypatch):
    trainer, used = make_trainer(num_train_epochs=3.0), []
    original = Batcher.batch

    def seen(self, indices):
        used.extend(indices)
        return original(self, indices)

    monkeypatch.setattr(Batcher, "batch", seen)
    trainer.run()
    epochs = [used[start : start + SAMPLES_PER_EPOCH] for start in range(0, len(used), SAMPLES_PER_EPOCH)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(SAMPLES_PER_EPOCH))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"num_train_epochs": 1.5}, 6), ({"num_train_epochs": 0.1}, 1), ({"max_steps": 3}, 3), ({"max_steps": 9}, 9)],
)
def test_how_long_it_trains(make_trainer, settings, steps):
    trainer = make_trainer(**settings)
    assert trainer.run().progress.step == steps == trainer.task.reporter.total_steps


@pytest.mark.parametrize(("every", "steps"), [(3, [3, 6, 9, 10]), (None, [4, 8, 10]), (10, [10]), (50, [10])], ids=str)
def test_evaluation_and_saving_are_due(make_trainer, every, steps):
    """Every so many steps, else at each epoch's end; and at the end."""
    losses = iter(range(100, 0, -1))
    trainer = make_trainer(losses, max_steps=10, eval_steps=every, save_steps=every, save_total_limit=None)
    trainer.run()
    assert steps_of(metrics(trainer), "eval_loss") == steps
    assert saved(trainer) == steps


def test_saving_does_not_wait_for_evaluation(make_trainer):
    trainer = make_trainer([3.0, 2.0], max_steps=6, eval_steps=3, save_steps=2, save_total_limit=None)
    trainer.run()
    assert (steps_of(metrics(trainer), "eval_loss"), saved(trainer)) == ([3, 6], [2, 4, 6])


@pytest.mark.parametrize(("limit", "kept"), [(1, [6]), (2, [5, 6]), (None, [1, 2, 3, 4, 5, 6])])
def test_rotation_keeps_the_newest(make_trainer, limit, kept):
    trainer = make_trainer(max_steps=6, save_steps=1, save_total_limit=limit)
    trainer.run()
    assert saved(trainer) == kept


def test_the_best_is_kept_and_restored(make_trainer, tensors):
    taken = {}
    trainer = make_trainer(
        [3.0, 1.0, 2.0, 2.5], max_steps=4, eval_steps=1, save_steps=4, save_total_limit=1, load_best_at_end=True
    )
    trainer.task.reporter.on_step = lambda step: taken.update({step: tensors(trainer.task.model)})
    result = trainer.run()
    assert saved(trainer) == [2, 4]  # the best is not counted in the limit
    assert (result.progress.best_step, result.progress.best_loss, result.progress.step) == (2, 1.0, 4)
    assert result.last_evaluation["eval_loss"] == 1.0
    now = tensors(trainer.task.model)
    assert all(torch.equal(now[name], taken[2][name]) for name in now)
    assert not all(torch.equal(now[name], taken[4][name]) for name in now)
    assert "restored step 2" in trainer.task.reporter.notes[-1]


def test_without_asking_the_last_one_is_kept(make_trainer, tensors):
    taken = {}
    trainer = make_trainer([3.0, 1.0, 2.0], max_steps=3, eval_steps=1)
    trainer.task.reporter.on_step = lambda step: taken.update({step: tensors(trainer.task.model)})
    result = trainer.run()
    now = tensors(trainer.task.model)
    assert all(torch.equal(now[name], taken[3][name]) for name in now)
    assert (result.last_evaluation["eval_loss"], result.progress.best_loss) == (2.0, 1.0)


def test_early_stopping(make_trainer):
    losses = [3.0, 2.0, 2.0, 2.5, 1.0]  # an equal loss is not a lower one
    trainer = make_trainer(losses, max_steps=20, eval_steps=2, early_stopping_patience=2)
    result = trainer.run()
    assert result.progress.step == 8
    assert (result.progress.best_step, result.progress.evaluations_since_best) == (4, 2)
    assert "stopped early at step 8" in trainer.task.reporter.notes[-1]


def test_patience_starts_anew_with_each_lower_loss(make_trainer):
    trainer = make_trainer([3.0, 3.1, 2.0, 2.1, 1.0, 1.1], max_steps=6, eval_steps=1, early_stopping_patience=2)
    assert trainer.run().progress.step == 6


def test_evaluating_and_saving_change_nothing(make_trainer, tensors):
    """With dropout, too: a step's noise follows from its number alone, and the model is put back in training mode."""
    fields = {"dropout": 0.3}
    plain = make_trainer(max_steps=5, fields=fields)
    plain.run()
    busy = make_trainer([1.0] * 5, max_steps=5, eval_steps=1, save_steps=1, logging_steps=2, fields=fields)
    evaluate = busy.task.evaluate

    def evaluates_as_ours_do():
        busy.task.model.eval()
        torch.rand(7)
        return evaluate()

    object.__setattr__(busy.task, "evaluate", evaluates_as_ours_do)
    busy.run()
    without = make_trainer(max_steps=5)
    without.run()
    expected, found, undropped = (tensors(one.task.model) for one in (plain, busy, without))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(undropped[name], expected[name]) for name in expected)


def test_every_micro_batch_has_noise_of_its_own(make_trainer, monkeypatch):
    places, original = [], loss.seed_noise

    def seen(*place):
        places.append(place)
        original(*place)

    monkeypatch.setattr(loss, "seed_noise", seen)
    make_trainer(max_steps=3, gradient_accumulation_steps=2, seed=5).run()
    assert places == [(5, step, micro, 0) for step in range(3) for micro in range(2)]


def test_the_seed_is_what_makes_runs_differ(make_trainer, tensors):
    def run(seed):
        trainer = make_trainer(max_steps=3, seed=seed, fields={"dropout": 0.3})
        trainer.run()
        return trainer.task.reporter.losses

    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize("limit", [1e-3, None])
def test_clipping(make_trainer, tensors, limit):
    trainer = make_trainer(max_steps=1, warmup_steps=0, optim="sgd", learning_rate=1.0, max_grad_norm=limit)
    before = tensors(trainer.task.model)
    trainer.run()
    after = tensors(trainer.task.model)
    moved = torch.stack([(after[name] - before[name]).double().norm() for name in before]).norm().item()
    (line,) = metrics(trainer)
    assert line["grad_norm"] > 0.01  # before clipping
    assert moved == pytest.approx(line["grad_norm"] if limit is None else limit, rel=LOSS_CURVE)


def params(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}


def test_a_base_with_nan_is_refused_before_it_is_learned_from(make_trainer, make_model):
    model = make_model()
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("nan")
    trainer = make_trainer(model=model, max_steps=3, save_steps=1)
    before = params(trainer)
    with pytest.raises(NumericalError, match="step 1: the loss is nan, since the base") as caught:
        trainer.run()
    assert "model's model.layers.1.mlp.down_proj.weight holds values that are not finite; the step" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in params(trainer).items())
    assert (saved(trainer), metrics(trainer)) == ([], [])


def test_a_diverging_run_ends_with_its_checkpoint_intact(make_trainer):
    trainer = make_trainer(max_steps=9, save_steps=1, warmup_steps=0, learning_rate=1e30, max_grad_norm=None)
    with pytest.raises(NumericalError, match=r"step 2: .*\(training rows \d+, \d+\)") as caught:
        trainer.run()
    assert "learning_rate" in caught.value.problems[0].hint
    whole, remarks = state.newest_checkpoint(trainer.task.run)
    assert (whole.name, remarks) == ("checkpoint-1", [])
    kept = params(trainer)
    state.load_checkpoint(whole, trainer.task.model, trainer.optimizer)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in params(trainer).items())


def test_weights_that_the_last_step_has_spoilt_are_not_saved(make_trainer):
    """No later step's loss shows them."""
    trainer = make_trainer(max_steps=1, save_steps=1, warmup_steps=0, learning_rate=1e39, max_grad_norm=None)
    with pytest.raises(NumericalError, match=r"the adapter cannot be saved: .* not finite") as caught:
        trainer.run()
    assert "learning_rate" in caught.value.problems[0].hint
    assert saved(trainer) == []


def test_a_gradient_that_is_not_finite_is_named(make_trainer):
    trainer = make_trainer(max_steps=3)
    name = next(name for name in trainer.parameters if "layers.1.self_attn.v_proj" in name and name.endswith(".B"))
    trainer.parameters[name].register_hook(lambda gradient: gradient * float("inf"))
    before = params(trainer)
    with pytest.raises(NumericalError, match=f"step 1: the gradient of {name} is not finite"):
        trainer.run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in params(trainer).items())


@pytest.mark.parametrize(("factor", "limit"), [("nan", 1.0), ("inf", None)])
def test_no_parameter_is_blamed_that_clipping_has_spoilt(factor, limit, make_trainer):
    """Every gradient is not a number then, and the first one's parameter would be named."""
    trainer = make_trainer(max_steps=3, max_grad_norm=limit)
    parameter = list(trainer.parameters.values())[-1]
    parameter.register_hook(lambda gradient: gradient * float(factor))
    with pytest.raises(NumericalError, match="step 1: the gradient of a parameter is not finite"):
        trainer.run()


def test_a_trainable_that_gets_no_gradient_is_named(make_trainer, make_model):
    model = make_model()
    model.model.layers[0].spare = nn.Linear(48, 48)  # a module that no forward calls
    trainer = make_trainer(model=model, max_steps=3)
    before = params(trainer)
    with pytest.raises(
        NumericalError, match=r"2 of 30 trainable tensors got no gradient: .*layers\.0\.spare"
    ) as caught:
        trainer.run()
    assert "target_modules" in caught.value.problems[0].hint
    assert all(torch.equal(tensor, before[name]) for name, tensor in params(trainer).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trainables_in_half_precision_are_refused(make_model, dtype):
    parameters = {"x.B": nn.Parameter(torch.zeros(2)), "x.A": nn.Parameter(torch.zeros(2, dtype=dtype))}
    with pytest.raises(ModelError, match=f"x.A trains in {dtype}"):
        checks.something_trains(parameters)
    checks.something_trains({"x.B": parameters["x.B"]})


def test_a_half_precision_base_trains_in_float32(make_trainer, make_model):
    trainer = make_trainer(model=make_model(dtype=torch.bfloat16), max_steps=1)
    assert {parameter.dtype for parameter in trainer.parameters.values()} == {torch.float32}
    trainer.run()


def test_nothing_to_train_is_refused(make_trainer):
    with pytest.raises(ModelError, match="nothing would train"):
        checks.something_trains({})
    trainer = make_trainer(max_steps=1)
    for parameter in trainer.parameters.values():
        parameter.requires_grad_(False)
    with pytest.raises(ModelError, match="nothing would train"):
        type(trainer)(trainer.task, trainer.accelerator, trainer.processes)


def test_only_the_adapter_moves(make_trainer):
    trainer = make_trainer(max_steps=3)
    frozen = {
        name: parameter.detach().clone()
        for name, parameter in trainer.task.model.named_parameters()
        if name not in trainer.parameters
    }
    trainer.run()
    now = dict(trainer.task.model.named_parameters())
    assert len(inject.adapters(trainer.task.model)) == 14
    assert all(torch.equal(now[name], tensor) and now[name].grad is None for name, tensor in frozen.items())


def test_gradient_checkpointing_and_not_learn_the_same(make_trainer, tensors):
    plain = make_trainer(max_steps=3, fields={"dropout": 0.2})
    plain.run()
    thrifty = make_trainer(max_steps=3, fields={"dropout": 0.2})
    thrifty.task.model.activation_checkpointing_enable({"use_reentrant": False})
    thrifty.run()
    expected, found = tensors(plain.task.model), tensors(thrifty.task.model)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=EXACT[torch.float32])
