"""AdaLoRA's allocation of a rank budget: how much of it there is at a step, and which triplets are worth it.

A triplet is one rank's share of an update: a row of A [r, I], a value of E [r] and a column of B [O, r].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cubic_budget(step: int, warmup: int, end: int, initial: int, target: int) -> int:
    """Returns how many triplets may live after `step`: `initial` up to `warmup`, `target` from `end`, between a cubic.

    b(t) = ⌊b_T + (b_0 − b_T)(1 − (t − t_i) / (t_e − t_i))³⌋ (Zhang et al. 2023, eq. 12, with t_e = T − t_f).
    """
    if step <= warmup:
        return initial
    if step >= end:
        return target
    return int((initial - target) * (1 - (step - warmup) / (end - warmup)) ** 3 + target)


def smooth_(mean: Tensor, deviation: Tensor, sensitivity: Tensor, beta1: float, beta2: float) -> None:
    """Moves the running averages of a `sensitivity`, and of its distance from that average, by one step (eq. 9, 10)."""
    mean.lerp_(sensitivity, 1 - beta1)
    deviation.lerp_((sensitivity - mean).abs_(), 1 - beta2)


def smoothed_reference(
    mean: Tensor, deviation: Tensor, sensitivity: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor]:
    """Returns what `smooth_` must leave in `mean` and `deviation`, written as the paper does."""
    mean = beta1 * mean + (1 - beta1) * sensitivity
    return mean, beta2 * deviation + (1 - beta2) * (sensitivity - mean).abs()


def triplet_scores(A: Tensor, E: Tensor, B: Tensor) -> Tensor:
    """Returns the importance of each triplet [r] from that of the elements of A [r, I], E [r] and B [O, r] (eq. 7)."""
    return E + A.mean(1) + B.mean(0)


def score_to_beat(scores: Sequence[Tensor], budget: int) -> Tensor | None:
    """Returns the score that a triplet must exceed to be among the `budget` best of all `scores`; None where all are.

    Triplets of the same score as the worst one to go, go with it.
    """
    together = torch.cat(list(scores))
    surplus = len(together) - budget
    return together.kthvalue(surplus).values if surplus > 0 else None


def distance_from_orthogonal(rows: Tensor) -> Tensor:
    """Returns `‖R Rᵀ − 1‖`, in the Frobenius norm, for `rows` R [r, n]: 0 where they are orthonormal (eq. 4)."""
    distance: Tensor = torch.linalg.matrix_norm(rows @ rows.T - torch.eye(len(rows), device=rows.device))
    return distance


def with_gaps(tensor: Tensor, kept: Tensor, dim: int) -> Tensor:
    """Returns `tensor`, of as many rows along `dim` as are `kept` [r], with rows of zeros for the others."""
    shape = list(tensor.shape)
    shape[dim] = len(kept)
    return tensor.new_zeros(shape).index_copy_(dim, kept.nonzero().flatten(), tensor)
