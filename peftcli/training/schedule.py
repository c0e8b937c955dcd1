"""The learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftcli.recipe import TrainingSection


def total_steps(settings: TrainingSection, steps_per_epoch: int) -> int:
    """Returns how many optimizer steps the run takes."""
    return settings.max_steps or max(1, math.ceil(settings.num_train_epochs * steps_per_epoch))


def learning_rate_schedule(settings: TrainingSection, total: int) -> Callable[[int], float]:
    """Returns the factor on the peak learning rate at optimizer step 0 … `total` − 1.

    As transformers counts: it rises in a line from 0 over the warm-up, then falls towards 0, which it would reach at
    step `total`.
    """
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = math.ceil(total * settings.warmup_ratio)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        done = (step - warmup) / max(1, total - warmup)
        if settings.lr_scheduler_type == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1 - done if settings.lr_scheduler_type == "linear" else 1.0

    return factor
