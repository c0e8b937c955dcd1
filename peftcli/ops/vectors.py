"""VeRA's update, trained vectors around a frozen matrix: `y + b ⊙ ((d ⊙ u) Bᵀ)`.

Shapes: u [..., R], y [..., O], B [O, R], b [O], d [R].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcli.ops.low_rank import add_expanded, may_be_written
from peftcli.ops.precision import cast


def scaled(b: Tensor, B: Tensor, d: Tensor) -> Tensor:
    """Returns `diag(b) B diag(d)` [O, R]: what is one matrix to the tokens, which are many more than R."""
    return b[:, None] * B * d


def add_scaled(y: Tensor, u: Tensor, b: Tensor, B: Tensor, d: Tensor) -> Tensor:
    """Returns `y + b ⊙ ((d ⊙ u) Bᵀ)` in `y`'s dtype, written into `y` as `add_expanded` does.

    Kept for the backward pass are `u` and the vectors: nothing of B's size, which is made anew, and nothing of y's.
    """
    plain = torch.compiler.is_compiling() or not torch.is_grad_enabled() or B.requires_grad
    if plain or y.dtype != u.dtype or not may_be_written(y):
        return add_expanded(y, u, scaled(b, B, d), 1.0)
    written: Tensor = _AddScaled.apply(y, u, b, B, d)  # type: ignore[no-untyped-call]
    return written


class _AddScaled(torch.autograd.Function):
    """`add_scaled`, in place, of a frozen B.

    With `G = dyᵀ u ∘ B` [O, R], the gradient of b is `G d` and that of d is `Gᵀ b`.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, u: Tensor, b: Tensor, B: Tensor, d: Tensor) -> Tensor:
        matrix = cast(scaled(b, B, d), y.dtype)
        y.view(-1, y.shape[-1]).addmm_(u.reshape(-1, u.shape[-1]), matrix.t())
        ctx.save_for_backward(u, b, B, d)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, b, B, d = ctx.saved_tensors
        _, needs_u, needs_b, _, needs_d = ctx.needs_input_grad
        rows, du, db, dd = dy.reshape(-1, dy.shape[-1]), None, None, None
        if needs_u:
            du = (rows @ cast(scaled(b, B, d), rows.dtype)).view(u.shape)
        if needs_b or needs_d:
            G = B * cast(rows.t() @ u.reshape(-1, u.shape[-1]), B.dtype)
            db, dd = G @ d, b @ G
        return dy, du, db, None, dd


def add_scaled_reference(y: Tensor, u: Tensor, b: Tensor, B: Tensor, d: Tensor) -> Tensor:
    """Returns what `add_scaled` must equal, written as the paper does."""
    return y + b * ((d * u) @ B.T)
