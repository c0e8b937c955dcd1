"""What each task learns to make small: a sum over what is supervised, in float32 whatever the model computes in.

A sum, not a mean: the loop divides by the count of the whole optimizer step. Divided by the batch's own count, each
equals the loss that transformers computes for the same batch.

Shapes: B batch, L length, K labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F

from peftcli.data.dataset import IGNORED
from peftcli.training import loss
from peftcli.training.head import Finish

Objective: TypeAlias = Callable[[nn.Module, Any], Tensor]
"""Takes the model, perhaps wrapped for distributed training, and a batch; returns the summed loss with its gradient."""


def objective(task: str, kind: str = "single-label", finish: Finish | None = None) -> Objective:
    """Returns the objective of a task.

    Args:
        task: The recipe's `model.task`.
        kind: What the labels are, as in `data.labels.Labels.kind`.
        finish: What a language model does to its head's logits; None where that is not known.
    """
    if task == "causal-lm":
        return lambda model, batch: loss.score(model, batch, finish=finish).loss
    if task == "seq2seq-lm":
        return lambda model, batch: loss.score_answers(model, batch, finish=finish).loss
    of_logits = cross_entropy if task != "sequence-classification" else OF_KIND[kind]
    return lambda model, batch: of_logits(label_logits(model, batch), batch.labels)


def label_logits(model: nn.Module, batch: Any) -> Tensor:
    """Returns the logits of the labels: of each sample [B, K] or of each token [B, L, K], in float32."""
    return loss.logits_of(model, batch).float()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the summed negative log-likelihood in nats of the labels [...] that are not -100, by logits [..., K]."""
    flat = logits.reshape(-1, logits.shape[-1])
    return F.cross_entropy(flat, labels.reshape(-1), ignore_index=IGNORED, reduction="sum")


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the sum over samples of the mean squared error over their K numbers; logits and labels [B, K]."""
    if logits.shape != labels.shape:  # the stand-in of a batch without samples
        return logits.sum() * 0
    return F.mse_loss(logits, labels, reduction="none").mean(dim=1).sum()


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the sum over samples of the mean over the K labels of each one's loss; logits and labels [B, K]."""
    if logits.shape != labels.shape:
        return logits.sum() * 0
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=1).sum()


OF_KIND: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "single-label": cross_entropy,
    "multi-label": binary_cross_entropy,
    "regression": squared_error,
}
"""The loss of each kind of label, from logits and labels."""
