"""One answer from several: a sample is read once with each of N prompts, and what comes out is combined.

Shapes: N prompts, B samples, C choices. Scores are log-probabilities, so that a mean is a geometric one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Answer = TypeVar("Answer", bound=Hashable)


def mean_log_probability(logits_NBC: Tensor) -> Tensor:
    """Returns the mean over the prompts of each choice's log-probability [B, C], in float32 or wider.

    Not a distribution: its exponentials sum to less than 1 wherever the prompts disagree.
    """
    wide = torch.promote_types(logits_NBC.dtype, torch.float32)
    return logits_NBC.to(wide).log_softmax(dim=-1).mean(dim=0)


def majority_vote(logits_NBC: Tensor) -> Tensor:
    """Returns the choice [B] that is the likeliest with most prompts; of equals, the one with the highest mean score.

    The mean is that of `mean_log_probability`, over all prompts (Lester et al. 2021, section 6, leaves ties open).
    """
    votes = torch.nn.functional.one_hot(logits_NBC.argmax(dim=-1), logits_NBC.shape[-1]).sum(dim=0)
    leads = votes == votes.amax(dim=-1, keepdim=True)
    return mean_log_probability(logits_NBC).masked_fill(~leads, -torch.inf).argmax(dim=-1)


def majority_answer(answers: Sequence[Answer], scores: Sequence[float]) -> Answer:
    """Returns the answer that was given most often; of equals, the one whose givers scored it highest on average.

    Args:
        answers: What each prompt's model wrote, one or more.
        scores: How likely each found its own answer.
    """
    given: dict[Answer, list[float]] = {}
    for answer, score in zip(answers, scores, strict=True):
        given.setdefault(answer, []).append(score)
    return max(given, key=lambda answer: (len(given[answer]), sum(given[answer]) / len(given[answer])))
