"""Which evaluation belongs to which task."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from peftcli.evaluation import labelling, language
from peftcli.training import loss

Evaluate: TypeAlias = Callable[..., dict[str, Any]]
"""Takes model, batcher, batch size, device and progress, as `language.evaluate` does; returns the metrics."""


def evaluator(task: str, kind: str = "single-label") -> Evaluate:
    """Returns what measures models of a task.

    Args:
        task: The recipe's `model.task`.
        kind: What the labels are, as in `data.labels.Labels.kind`.
    """
    if task == "causal-lm":
        return language.evaluate
    if task == "seq2seq-lm":
        return partial(language.evaluate, score=loss.score_answers)
    return partial(labelling.evaluate, kind=kind)
