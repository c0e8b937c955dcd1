"""The training loop.

One optimizer step is a pure function of the weights, the optimizer's state and the step's number: which samples it
sees, in which order, with which noise and learning rate all follow from (seed, step, rank). The loss is divided by the
supervised tokens of the whole step, over all micro-batches and ranks, so that neither padding nor the way a batch is
cut up changes what is learned.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftcli import inject, sharding
from peftcli.checkpoint import state
from peftcli.checkpoint.adapter import trained_beside
from peftcli.checkpoint.state import Progress
from peftcli.errors import DataError, Interrupted, NumericalError
from peftcli.training import checks, compiling, logs, loss, offloading, optimizers, schedule
from peftcli.training.distributed import Processes, circumstances
from peftcli.training.meter import Meter
from peftcli.training.signals import StopRequest

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from peftcli.checkpoint.adapter import Origin
    from peftcli.data.batching import Batches
    from peftcli.data.sampling import Plan
    from peftcli.recipe import TrainingSection
    from peftcli.reporting import Metrics, Reporter
    from peftcli.training.logs import MetricsLog, TensorBoardLog
    from peftcli.training.objectives import Objective


@dataclass(frozen=True)
class Task:
    """All that a run trains with, made by the composition root.

    Attributes:
        run: The output folder.
        model: The base model with its adapters, on its device or spread over the processes.
        origin: What adapter files say beside the tensors; the method and its Config among it.
        settings: The recipe's training section.
        learning_rate: The peak learning rate.
        head_learning_rate: That of the task's head.
        objective: Returns the summed loss of a batch.
        plan: Which samples each step sees.
        batcher: Turns samples into batches.
        evaluate: Returns the metrics of the evaluation set, names starting with `eval_`; None without such a set.
        reporter: Where progress goes.
        logs: Where metrics stay.
    """

    run: Path
    model: PreTrainedModel
    origin: Origin
    settings: TrainingSection
    learning_rate: float
    head_learning_rate: float
    objective: Objective
    plan: Plan
    batcher: Batches
    evaluate: Callable[[], dict[str, float]] | None
    reporter: Reporter
    logs: list[MetricsLog | TensorBoardLog]


@dataclass(frozen=True)
class Result:
    """How training ended.

    Attributes:
        progress: Where it ended.
        last_log: The last logged training metrics.
        last_evaluation: The last evaluation's metrics; of the best one where that was restored.
        seconds: Time spent in the loop, in this process.
    """

    progress: Progress
    last_log: Metrics
    last_evaluation: Metrics
    seconds: float


class Trainer:
    """Runs one task from a checkpoint, or from the start, to the end."""

    def __init__(self, task: Task, accelerator: Accelerator, processes: Processes) -> None:
        self.task = task
        self.accelerator = accelerator
        self.processes = processes
        self.parameters = optimizers.trainable_parameters(task.model)
        self.adapters = inject.adapters(task.model)  # once: finding them walks the whole model
        checks.something_trains(self.parameters)
        self.optimizer = optimizers.make_optimizer(
            task.model,
            task.settings,
            task.learning_rate,
            task.head_learning_rate,
            trained_beside(task.model, task.origin),
        )
        for fact in optimizers.optimizer_facts(task.settings.optim, self.parameters.values()):
            task.reporter.note(fact)
        self.progress = Progress(
            data=task.batcher.dataset.fingerprint,
            samples_per_step=task.plan.samples_per_step,
            computed_on=circumstances(processes),
        )
        self.is_spread = any(sharding.is_spread(parameter) for parameter in self.parameters.values())
        self.total = schedule.total_steps(task.settings, task.plan.steps_per_epoch)
        self.factor = schedule.learning_rate_schedule(task.settings, self.total)
        self.meter = Meter()
        self.last_log: Metrics = {}
        self.evaluations: dict[int, Metrics] = {}
        self.prepared: Any = None
        self.saved_step: int | None = None
        self.watch = compiling.Watch() if task.settings.torch_compile else None
        wanted = task.settings.activation_offloading
        self.offloading = offloading.policy_of(task.model, processes.device) if wanted else None

    def resume(self, folder: Path) -> None:
        """Continues from the checkpoint in `folder`, with what was logged up to it; call it before `run`.

        Raises:
            DataError: The training samples are not those of the run.
        """
        found = state.load_checkpoint(folder, self.task.model, self.optimizer)
        if found.data != self.progress.data:
            raise DataError(
                f"data.train: it has changed since {self.task.run} was started with it",
                hint="put the old data back, or start a new run with output_dir=DIR",
            )
        self._note_other_circumstances(found.computed_on)
        found.computed_on = self.progress.computed_on
        self.progress = found
        if found.meter is not None:
            self.meter.restore(found.meter)
        for step, metrics in logs.read(self.task.run, self.progress.step):
            if "eval_loss" in metrics:
                self.evaluations[step] = metrics
            else:
                self.last_log = metrics
        self._rotate()  # what was killed between saving its last step and this leaves one checkpoint too many

    def _note_other_circumstances(self, before: Mapping[str, Any]) -> None:
        """Says where the remaining steps will be rounded otherwise than those that were done."""
        now = self.progress.computed_on
        changed = [f"{name} {then}, now {now[name]}" for name, then in before.items() if now.get(name, then) != then]
        if changed:
            self.task.reporter.note(
                f"resuming under other circumstances ({'; '.join(changed)}): what follows is the same run to within "
                "rounding, not to the bit"
            )

    def run(self) -> Result:
        """Trains to the end.

        Raises:
            NumericalError: A loss or gradient is not finite; that step was not applied.
            Interrupted: A signal asked for an end; the run is saved and can be resumed.
        """
        task, started = self.task, time.monotonic()
        # Only the optimizer: Accelerate would replace the model's forward, and put DDP around it. And nothing placed,
        # for which it would load the optimizer's state again: it copies bitsandbytes' and takes it out of its pages.
        self.prepared = self.accelerator.prepare_optimizer(self.optimizer, device_placement=False)
        if self.accelerator.scaler is not None and self.progress.loss_scale:
            self.accelerator.scaler.load_state_dict(self.progress.loss_scale)
        task.reporter.begin(self.total, self.progress.step)
        task.model.train()
        try:
            with StopRequest() as stop:
                while self.progress.step < self.total and not self._out_of_patience():
                    self._step()
                    self._after_step()
                    # Whichever process was asked to stop, all of them do, after the same step.
                    stopping = self.processes.sums(stop.signal_name is not None)[0]
                    if stopping and self.progress.step < self.total:
                        self._save()
                        raise Interrupted(
                            f"{stop.signal_name or 'a signal to another process'}: stopped after step "
                            f"{self.progress.step} of {self.total}; it is saved",
                            hint="run the same command with --resume to go on",
                        )
        finally:
            task.reporter.end()
        if self.watch is not None:
            task.reporter.note(self.watch.summary())
        self._restore_best()
        final = self.evaluations.get(self.progress.best_step if task.settings.load_best_at_end else self.progress.step)
        return Result(self.progress, self.last_log, final or {}, time.monotonic() - started)

    def _step(self) -> None:
        """Does one optimizer step, or raises a NumericalError without having changed a weight."""
        task, step, settings = self.task, self.progress.step, self.task.settings
        batches = [task.batcher.batch(indices) for indices in task.plan.step(step)]
        tokens, all_tokens = self.processes.sums(
            sum(batch.num_supervised for batch in batches), sum(batch.num_tokens for batch in batches)
        )
        optimizers.set_learning_rate(self.optimizer, self.factor(step))
        summed = torch.zeros((), device=self.processes.device)
        for position, batch in enumerate(batches):
            summed += self._backward(batch, tokens, position, last=position == len(batches) - 1)
        self._backward_penalty()
        self.processes.add_gradients(self.parameters)
        if step == 0:
            checks.gradients_arrived(self.parameters)
        task.origin.method.before_step(task.origin.config, self.adapters)
        norm = float(
            sharding.whole(
                self.accelerator.clip_grad_norm_(self.parameters.values(), settings.max_grad_norm or math.inf)
            )
        )
        total_loss = self.processes.sums(summed)[0] / tokens
        self._refuse_unless_finite(total_loss, norm)
        self.prepared.step()
        # Else the loss scale was too large, and nothing was changed. Accelerate's word for that does not cover fused
        # optimizers, which are called all the same and do nothing.
        if math.isfinite(norm):
            task.origin.method.after_step(task.origin.config, self.adapters, step + 1, self.total)
        self.prepared.zero_grad()
        self.progress.step += 1
        self.progress.tokens += int(tokens)
        lr = self.task.learning_rate * self.factor(step)
        self.meter.add(total_loss * tokens, int(tokens), int(all_tokens), norm, lr)

    def _backward(self, batch: Any, tokens: float, position: int, *, last: bool) -> Tensor:
        """Adds one micro-batch's gradients and returns its summed loss, detached."""
        batch = batch.to(self.processes.device)
        loss.seed_noise(self.task.settings.seed, self.progress.step, position, self.processes.place.rank)
        if self.is_spread:
            sharding.set_gradient_sync(self.task.model, on=last)
        with offloading.while_saving(self.offloading), self.accelerator.autocast():
            summed = self.task.objective(self.task.model, batch)
        # The processes' gradients are averaged: their number undoes that, so the sum is over all tokens of the step.
        self.accelerator.backward(summed * (self.processes.count / tokens))
        return summed.detach()

    def _backward_penalty(self) -> None:
        """Adds the gradient of the method's own penalty, once for the whole step and alike on every rank."""
        method, config = self.task.origin.method, self.task.origin.config
        penalty = method.penalty(config, self.adapters.values())
        if penalty is not None:
            self.accelerator.backward(penalty)

    def _refuse_unless_finite(self, value: float, norm: float) -> None:
        """Raises a NumericalError, naming the rows, where the step's loss or gradient is not finite.

        With a loss scale the gradient may overflow: then the step is skipped and the scale halved. Below 1 it is no
        longer the scale that is at fault, and skipping would never end.
        """
        scaler = self.accelerator.scaler
        if math.isfinite(value) and (math.isfinite(norm) or (scaler is not None and scaler.get_scale() >= 1)):
            return
        what = f"the loss is {value}"
        if math.isfinite(value):
            # Clipping by a norm that is not a number makes every gradient that: then none can be told from the others.
            names = checks.not_finite(self.parameters)
            which = names[0] if len(names) in range(1, len(self.parameters)) else "a parameter"
            what = f"the gradient of {which} is not finite"
        poisoned = checks.poisoned(self.task.model)
        if poisoned is not None:
            what += f", since {poisoned} holds values that are not finite"
        rows = self.task.plan.samples(self.progress.step).tolist()
        raise NumericalError(
            f"step {self.progress.step + 1}: {what}; the step was not applied "
            f"(training rows {', '.join(map(str, rows[:16]))}{' …' if len(rows) > 16 else ''})",
            hint="lower training.learning_rate, set training.max_grad_norm, or use mixed_precision no or bf16; "
            "the last checkpoint is intact",
        )

    def _after_step(self) -> None:
        """Logs, evaluates and saves, where it is time to."""
        step, task = self.progress.step, self.task
        task.reporter.step(step, self.meter.latest)
        at_end = step == self.total
        if self.watch is not None and (remark := self.watch.failure(step)):
            task.reporter.note(remark)
        epoch_ends = step % task.plan.steps_per_epoch == 0 or at_end
        if at_end or step % task.settings.logging_steps == 0:
            self.last_log = {"epoch": round(step / task.plan.steps_per_epoch, 4), **self.meter.flush()}
            self._log(self.last_log)
        improved = False
        if task.evaluate is not None and _is_due(step, task.settings.eval_steps, epoch_ends, at_end=at_end):
            improved = self._evaluate()
        if (improved and task.settings.load_best_at_end) or _is_due(
            step, task.settings.save_steps, epoch_ends, at_end=at_end
        ):
            self._save()

    def _log(self, metrics: Metrics) -> None:
        for log in self.task.logs:
            log.write(self.progress.step, metrics)
        self.task.reporter.log(self.progress.step, metrics)

    def _evaluate(self) -> bool:
        """Evaluates, logs it, and returns whether the loss is the lowest so far."""
        assert self.task.evaluate is not None
        with compiling.set_aside(self.watch), self.accelerator.autocast():
            metrics = self.task.evaluate()
        sharding.reshard(self.task.model)
        self.task.model.train()
        self.meter.restart_clock()
        self._log(metrics)
        self.evaluations[self.progress.step] = metrics
        improved = self.progress.best_loss is None or metrics["eval_loss"] < self.progress.best_loss
        if improved:
            self.progress.best_loss, self.progress.best_step = metrics["eval_loss"], self.progress.step
        self.progress.evaluations_since_best = 0 if improved else self.progress.evaluations_since_best + 1
        return improved

    def _out_of_patience(self) -> bool:
        patience = self.task.settings.early_stopping_patience
        if patience is None or self.progress.evaluations_since_best < patience:
            return False
        self.task.reporter.note(
            f"stopped early at step {self.progress.step}: {patience} evaluations without a loss lower than "
            f"{self.progress.best_loss:.4f} (step {self.progress.best_step})"
        )
        return True

    def _save(self) -> None:
        """Saves the present step, once: replacing a checkpoint would leave a moment without it."""
        task = self.task
        if self.saved_step == self.progress.step:
            return
        if self.accelerator.scaler is not None:
            self.progress.loss_scale = self.accelerator.scaler.state_dict()
        self.progress.meter = self.meter.state()
        for log in task.logs:
            log.sync()  # a checkpoint vouches for what was logged before it
        writes = self.processes.is_first
        state.save_checkpoint(task.run, self.progress, task.model, self.optimizer, task.origin, writes=writes)
        self._rotate()
        self.saved_step = self.progress.step
        self.processes.wait()  # until it is there for all

    def _rotate(self) -> None:
        """Removes the checkpoints that are more than the recipe asks for."""
        settings = self.task.settings
        keep = {self.progress.best_step} if settings.load_best_at_end else set()
        if self.processes.is_first:
            state.rotate(self.task.run, settings.save_total_limit, keep)

    def _restore_best(self) -> None:
        """Puts the adapter with the lowest evaluation loss back, where the recipe asks for it."""
        best = self.progress.best_step
        if self.task.settings.load_best_at_end and best != self.progress.step:
            state.load_checkpoint(state.folder_of(self.task.run, best), self.task.model, self.optimizer)
            self.task.reporter.note(
                f"restored step {best}: its evaluation loss {self.progress.best_loss:.4f} is the lowest"
            )


def _is_due(step: int, every: int | None, epoch_ends: bool, *, at_end: bool) -> bool:
    """Returns whether something that happens every so many steps, or at each epoch's end, happens now."""
    return at_end or (epoch_ends if every is None else step % every == 0)
