"""Which evaluation belongs to which task."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from peftcli.evaluation import labelling, language
from peftcli.training import loss
from peftcli.training.head import Finish

Evaluate: TypeAlias = Callable[..., dict[str, Any]]
"""Takes model, batcher, batch size, device and progress, as `language.evaluate` does; returns the metrics."""


def evaluator(task: str, kind: str = "single-label", finish: Finish | None = None) -> Evaluate:
    """Returns what measures models of a task.

    Args:
        task: The recipe's `model.task`.
        kind: What the labels are, as in `data.labels.Labels.kind`.
        finish: What a language model does to its head's logits; None where that is not known.
    """
    if task in ("causal-lm", "seq2seq-lm"):
        score = loss.score if task == "causal-lm" else loss.score_answers
        return partial(language.evaluate, score=partial(score, finish=finish))
    return partial(labelling.evaluate, kind=kind)
