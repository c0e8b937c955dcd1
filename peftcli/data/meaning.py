"""What rows are encoded for: the task, and the labels and tasks that were found in the training data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli import files
from peftcli.data.dataset import Goal
from peftcli.data.formats import BadRow
from peftcli.data.labels import Kind, Labels, task_name
from peftcli.data.rows import Row
from peftcli.errors import ModelError

GOALS: dict[str, Goal] = {
    "causal-lm": "next-token",
    "seq2seq-lm": "answer",
    "sequence-classification": "sample",
    "token-classification": "token",
    "image-classification": "sample",
}
"""What each `model.task` predicts."""


@dataclass(frozen=True)
class Meaning:
    """What rows are encoded for.

    Attributes:
        task: The recipe's `model.task`.
        labels: The labels that the rows may have; None where they have none.
        tasks: The values that the column `task` may have; () where there is no such column.
    """

    task: str = "causal-lm"
    labels: Labels | None = None
    tasks: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """What the labels are; `single-label` where there are none."""
        return self.labels.kind if self.labels is not None else "single-label"

    @property
    def goal(self) -> Goal:
        """What is predicted."""
        return GOALS[self.task]

    def task_number(self, row: Row) -> int:
        """Returns the number of the row's task."""
        if not self.tasks:
            return 0
        name = task_name(row)
        if name not in self.tasks:
            raise BadRow(f'task is "{name}", which is not in the training data: {", ".join(self.tasks)}')
        return self.tasks.index(name)


LABELS_FILE = "labels.json"
"""The file of a run that says what its training data's labels and tasks were, by number."""


def write_meaning(folder: Path, meaning: Meaning) -> None:
    """Writes what was found in the training data into `folder`; nothing where there were neither labels nor tasks."""
    if meaning.labels is None and not meaning.tasks:
        return
    kind, names = (meaning.labels.kind, meaning.labels.names) if meaning.labels is not None else (None, ())
    facts = {"task": meaning.task, "kind": kind, "labels": list(names), "tasks": list(meaning.tasks)}
    files.write_json(folder / LABELS_FILE, facts)


def task_of(folder: Path) -> str | None:
    """Returns the recipe's `model.task` as `folder` has it beside its labels; None where it does not say."""
    path = _labels_file(folder)
    if path is None:
        return None
    task = _read(path).get("task")
    return task if task in GOALS else None


def read_meaning(folder: Path, task: str) -> Meaning:
    """Returns what a run found in its training data, from its `folder` or, for a checkpoint, the one above.

    Raises:
        ModelError: The task has labels and neither folder says which.
    """
    path = _labels_file(folder)
    if path is None:
        if task in ("causal-lm", "seq2seq-lm"):
            return Meaning(task)
        raise ModelError(
            f"{folder} has no {LABELS_FILE}, so the names of its labels are unknown",
            hint="name the folder of the run that trained it",
        )
    found = _read(path)
    try:
        labels = Labels(found["kind"], tuple(found["labels"])) if found["labels"] else None
        return Meaning(task, labels, tuple(found["tasks"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error


def _labels_file(folder: Path) -> Path | None:
    return next((one / LABELS_FILE for one in (folder, folder.parent) if (one / LABELS_FILE).is_file()), None)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} cannot be read: expected a JSON object")
    return found
