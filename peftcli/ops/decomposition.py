"""The weight decomposition of DoRA: `W' = diag(m ⊘ n) V` with `V = W + s·B A` and `n` the norms of V's rows.

Shapes: W, V [O, I], A [R, I], B [O, R], `m`, `n`, and `c` (the squared row norms of W) [O].
"""

from __future__ import annotations

import torch
from torch import Tensor

CANCELLATION_LIMIT = 1e-3
"""Below this share of its terms' size, n² has lost so many digits that it is computed directly instead."""


def squared_row_norms(weight: Tensor) -> Tensor:
    """Returns `c` [O], the squared norm of every row of `weight` [O, I], in float32 or wider."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    squared: Tensor = torch.linalg.vecdot(wide, wide)
    return squared


def factored_row_norms(c: Tensor, WA: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns `n` [O] without anything of size O·I, and which rows lost too many digits to cancellation [O].

    n² = c + 2s·rowsum((W Aᵀ) ∘ B) + s²·rowsum((B (A Aᵀ)) ∘ B), where `WA` is `W Aᵀ` [O, R]. The error is that of the
    terms, not of the sum: a row whose update nearly cancels it needs `direct_row_norms`. (Liu et al. 2024, eq. 5 for
    n; the factored form follows from expanding the square.)
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    WA, A, B, c = WA.to(wide), A.to(wide), B.to(wide), c.to(wide)
    quadratic = scale**2 * torch.linalg.vecdot(B @ (A @ A.T), B)
    squared = c + 2 * scale * torch.linalg.vecdot(WA, B) + quadratic
    lost = squared < CANCELLATION_LIMIT * (c + quadratic)
    squared = squared.clamp_min(0)
    zero = squared == 0  # where the square root has no slope: left in, 0 · ∞ would make every gradient NaN
    return squared.masked_fill(zero, 1).sqrt().masked_fill(zero, 0), lost


def direct_row_norms(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns `n` [O] from the dense `V` [O, I]: the reference, and the accurate form where terms cancel."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(weight.to(wide) + scale * (B.to(wide) @ A.to(wide)), dim=1)
    return norms


def magnitude_ratio(m: Tensor, n: Tensor) -> Tensor:
    """Returns `g = m ⊘ n` [O]; 1 where the row is zero, so that such a row passes its V instead of NaN."""
    zero = n == 0
    return torch.where(zero, torch.ones_like(m), m / n.masked_fill(zero, 1))


def rescale_rows(h: Tensor, bias: Tensor | None, g: Tensor) -> Tensor:
    """Returns `g ⊙ (h − b) + b` [..., O] for `h = x Vᵀ + b`: the bias is never scaled.

    Written as `h + (g − 1) ⊙ (h − b)`: equal to `h` bit for bit where g is 1, and in half precision the rounding falls
    on a small term instead of on `g` itself.
    """
    return torch.addcmul(h, h if bias is None else h - bias, g - 1).to(h.dtype)


def rescale_rows_reference(h: Tensor, bias: Tensor | None, g: Tensor) -> Tensor:
    """Returns what `rescale_rows` must equal."""
    return g * h if bias is None else g * (h - bias) + bias


def merged_decomposition(weight: Tensor, delta: Tensor, m: Tensor) -> Tensor:
    """Returns `W' = diag(m ⊘ n)(W + ΔW)` [O, I], computed in float32 or wider and rounded once to `weight`'s dtype."""
    V = weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta
    g = magnitude_ratio(m.to(V.dtype), torch.linalg.vector_norm(V, dim=1))
    return V.mul_(g[:, None]).to(weight.dtype)
