"""Where a run's metrics go to stay: metrics.jsonl always, TensorBoard where the recipe asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peftcli import files
from peftcli.errors import HostError
from peftcli.reporting import Metrics

METRICS_FILE = "metrics.jsonl"


def read(run: Path, last_step: int) -> list[tuple[int, Metrics]]:
    """Returns what a run has logged up to step `last_step`, oldest first.

    A line that was cut short, as a power failure may leave the last one, is not among it.
    """
    path, found = run / METRICS_FILE, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            metrics = json.loads(line)
        except ValueError:
            continue
        found.append((metrics.pop("step"), metrics))
    return [(step, metrics) for step, metrics in found if step <= last_step]


class MetricsLog:
    """metrics.jsonl: one JSON object a line, each with `step`. Lines after the step resumed from are dropped."""

    def __init__(self, run: Path, first_step: int) -> None:
        self._path = run / METRICS_FILE
        kept = read(run, first_step) if first_step else []
        files.write_text(self._path, "".join(_line(step, metrics) for step, metrics in kept))

    def write(self, step: int, metrics: Metrics) -> None:
        """Appends one line; a crash may leave a part of it."""
        files.append_text(self._path, _line(step, metrics))

    def sync(self) -> None:
        """Waits until all lines are on the disk."""
        with files.explained(self._path):
            files.sync_file(self._path)


def _line(step: int, metrics: Metrics) -> str:
    return json.dumps({"step": step, **metrics}) + "\n"


class TensorBoardLog:
    """TensorBoard event files in the run's `tensorboard` folder. What came after the step resumed from is hidden."""

    def __init__(self, run: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise HostError(
                "logging.report_to: tensorboard is not installed", hint="pip install 'peftcli[tensorboard]'"
            ) from error
        files.require_own(run / "tensorboard", run)
        self._writer: Any = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, metrics: Metrics) -> None:
        """Adds each metric as a scalar; evaluation metrics keep their prefix as a group."""
        for name, value in metrics.items():
            group, _, rest = name.partition("_")
            tag = f"eval/{rest}" if group == "eval" else f"train/{name}"
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def sync(self) -> None:
        """Does nothing: events are a copy of what metrics.jsonl holds."""
