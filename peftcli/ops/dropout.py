"""Inverted dropout that costs what it must on a CPU too."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

WORD_VALUES = 2**16
RARE = 0.15
"""Up to this share, it takes less time to draw where the dropped elements are than whether each one is dropped."""


def dropout(x: Tensor, p: float) -> Tensor:
    """Returns `x` with each element zeroed with probability `p` and the others divided by `1 − p`.

    On a CPU, `F.dropout` draws a Bernoulli number for each element, which costs more than the adapter that it protects.
    Where few elements are dropped, the distances from one to the next are drawn instead, for the backward pass too.
    Else the mask comes from 16-bit random words, four from each 64-bit draw: `p` is thereby rounded to a multiple of
    2⁻¹⁶ strictly between 0 and 1, and the scale is that of the rounded value.
    """
    if p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    if p <= RARE:
        dropped: Tensor = _RareDropout.apply(x, p)  # type: ignore[no-untyped-call]
        return dropped
    dropped_values = min(max(round(p * WORD_VALUES), 1), WORD_VALUES - 1)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), 2**63 - 1)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped_values - WORD_VALUES // 2
    # Chosen, not multiplied: so the backward pass keeps a byte an element instead of a number.
    return torch.where(keep, x * (WORD_VALUES / (WORD_VALUES - dropped_values)), 0)


def rare_places(count: int, p: float) -> Tensor:
    """Returns the indices, of `count`, of those that independent draws of probability `p` hit; in order, as int64.

    From one hit to the next it is `1 + ⌊log U / log(1 − p)⌋` places, for a uniform U: the geometric distribution.
    """
    last, pieces = 0.0, []
    while last <= count:  # once, as a rule: two standard deviations more than are expected
        left = count - last
        num = int(left * p + 2 * math.sqrt(left * p)) + 2
        gaps = torch.empty(num, dtype=torch.float64).uniform_().log_().mul_(1 / math.log1p(-p)).floor_().add_(1)
        gaps[0] += last
        pieces.append(gaps.cumsum_(0))
        last = float(gaps[-1])
    places = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return places[: int(torch.searchsorted(places, float(count), right=True))].sub_(1).to(torch.int64)


class _RareDropout(torch.autograd.Function):
    """`dropout` of few elements: keeps their indices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        places = rare_places(x.numel(), p)
        ctx.save_for_backward(places)
        ctx.p = p
        return _without(x, places, p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return _without(dy, places, ctx.p), None


def _without(x: Tensor, places: Tensor, p: float) -> Tensor:
    """Returns `x / (1 − p)` with zeros at `places`, indices into its elements."""
    scaled = (x * (1 / (1 - p))).contiguous()
    scaled.view(-1).index_fill_(0, places, 0)
    return scaled
