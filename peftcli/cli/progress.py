"""Progress on a terminal as a live display, and elsewhere (a log file, CI) as plain lines."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from peftcli.cli.console import shown, stderr
from peftcli.cli.metrics import metrics_line

if TYPE_CHECKING:
    from peftcli.reporting import Metrics, Reporter


WIDE = 120
"""Columns from which the bar has room for every metric beside it."""


def make_reporter() -> Reporter:
    """Returns the reporter that suits where stderr goes; a dumb terminal cannot redraw a line."""
    return LiveReporter() if stderr.is_terminal and not stderr.is_dumb_terminal else PlainReporter()


def describe(metrics: Metrics) -> str:
    """Returns the metrics that people follow, in one line."""
    parts = []
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.4f}")
    if "eval_loss" in metrics:
        parts.append(metrics_line(metrics))
    if "learning_rate" in metrics:
        parts.append(f"lr {metrics['learning_rate']:.2e}")
    if "grad_norm" in metrics:
        parts.append(f"grad {metrics['grad_norm']:.2f}")
    if "tokens_per_second" in metrics:
        parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    if "memory_gb" in metrics:
        parts.append(f"{metrics['memory_gb']:.2f} GB")
    return "  ".join(parts)


class PlainReporter:
    """Lines on stderr: stages, facts, and the averages at every log."""

    def __init__(self) -> None:
        self._total = 0
        self._first = 0
        self._started = time.monotonic()

    def stage(self, text: str) -> None:  # noqa: D102
        stderr.print(f"{shown(text)} …")

    def note(self, text: str) -> None:  # noqa: D102
        stderr.print(shown(text))

    def begin(self, total_steps: int, first_step: int) -> None:  # noqa: D102
        self._total, self._first, self._started = total_steps, first_step, time.monotonic()
        stderr.print(f"training, {total_steps - first_step} steps …")

    def step(self, step: int, metrics: Metrics) -> None:  # noqa: D102
        pass

    def log(self, step: int, metrics: Metrics) -> None:  # noqa: D102
        left = ""
        if step > self._first and "loss" in metrics and step < self._total:
            pace = (time.monotonic() - self._started) / (step - self._first)
            left = f"  {_clock(pace * (self._total - step))} left"
        stderr.print(f"step {step}/{self._total}  {describe(metrics)}{left}")

    def advance(self, done: int, total: int) -> None:  # noqa: D102
        pass

    def end(self) -> None:  # noqa: D102
        pass


class LiveReporter:
    """A bar that shows the present step, above which the averages at every log scroll by."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._training: TaskID | None = None
        self._other: TaskID | None = None

    def _display(self) -> Progress:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=stderr,
                transient=True,
            )
            self._progress.start()
        return self._progress

    def stage(self, text: str) -> None:  # noqa: D102
        stderr.print(f"[dim]{shown(text)} …[/]")

    def note(self, text: str) -> None:  # noqa: D102
        stderr.print(shown(text))

    def begin(self, total_steps: int, first_step: int) -> None:  # noqa: D102
        self._training = self._display().add_task("training", total=total_steps, completed=first_step, facts="")

    def step(self, step: int, metrics: Metrics) -> None:  # noqa: D102
        if self._training is not None:
            shown = metrics
            if stderr.width < WIDE:  # the log lines above have the rest
                shown = {name: metrics[name] for name in ("loss", "tokens_per_second") if name in metrics}
            self._display().update(self._training, completed=step, facts=describe(shown))

    def log(self, step: int, metrics: Metrics) -> None:  # noqa: D102
        stderr.print(f"step {step}  {describe(metrics)}")

    def advance(self, done: int, total: int) -> None:  # noqa: D102
        display = self._display()
        if self._other is None:
            self._other = display.add_task("evaluating", total=total, facts="")
        display.update(self._other, completed=done, total=total)
        if done >= total:
            display.remove_task(self._other)
            self._other = None
            if self._training is None:
                self.end()

    def end(self) -> None:  # noqa: D102
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._training = self._other = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
