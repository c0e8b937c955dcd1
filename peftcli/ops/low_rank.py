"""The low-rank update of LoRA: `y + s·(x Aᵀ) Bᵀ`.

Shapes: x [..., I], y [..., O], A [R, I], B [O, R].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns `s·(x Aᵀ) Bᵀ` [..., O] in `A`'s dtype (autocast's where it is on).

    The scale is applied to the thin product, where it costs R multiplications a token instead of O.
    """
    return F.linear(F.linear(x.to(A.dtype), A) * scale, B)


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns `y + s·(x Aᵀ) Bᵀ` in `y`'s dtype, written into `y` where dtypes allow it.

    `y` must be a fresh result that nothing else reads, such as a linear layer's output: that saves a copy of [..., O]
    and a pass over it for each adapted layer.
    """
    u = F.linear(x.to(A.dtype), A)
    if y.dtype == u.dtype == B.dtype and y.is_contiguous():
        y.view(-1, y.shape[-1]).addmm_(u.reshape(-1, u.shape[-1]), B.t(), alpha=scale)
        return y
    return y + F.linear(u * scale, B).to(y.dtype)


def add_low_rank_reference(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns what `add_low_rank` must equal, written as the paper does."""
    return y + scale * (x @ A.T @ B.T)


def merged_low_rank(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns `W + s·B A` [O, I], computed and added in float32 (or wider) and rounded once to `weight`'s dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), B.to(wide), A.to(wide), alpha=scale).to(weight.dtype)
