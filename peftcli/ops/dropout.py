"""Inverted dropout that costs what it must on a CPU too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WORD_VALUES = 2**16


def dropout(x: Tensor, p: float) -> Tensor:
    """Returns `x` with each element zeroed with probability `p` and the others divided by `1 − p`.

    On a CPU the mask comes from 16-bit random words, four from each 64-bit draw: three times as fast as
    `F.dropout`'s Bernoulli draw, which costs more than the adapter that it protects. `p` is thereby rounded to a
    multiple of 2⁻¹⁶ strictly between 0 and 1, and the scale is that of the rounded value.
    """
    if p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped_values = min(max(round(p * WORD_VALUES), 1), WORD_VALUES - 1)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), 2**63 - 1)
    keep = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped_values - WORD_VALUES // 2
    # Chosen, not multiplied: so the backward pass keeps a byte an element instead of a number.
    return torch.where(keep, x * (WORD_VALUES / (WORD_VALUES - dropped_values)), 0)
