"""The weight decomposition of DoRA: `W' = diag(m ⊘ n) V` with `V = W + s·B A` and `n` the norms of V's rows.

Shapes: W, V [O, I], A [R, I], B [O, R], `m`, `n`, and `c` (the squared row norms of W) [O].
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcli.ops.precision import cast

CANCELLATION_LIMIT = 2e-3
"""Below this share of c, n² has lost so many digits that it is computed directly instead. Only an update that is about
as long as its row can bring it there, so that c stands for the size of all terms."""


def squared_row_norms(weight: Tensor) -> Tensor:
    """Returns `c` [O], the squared norm of every row of `weight` [O, I], in float32 or wider."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    squared: Tensor = torch.linalg.vecdot(wide, wide)
    return squared


def factored_row_norms(c: Tensor, WA: Tensor, A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Returns `n` [O] without anything of size O·I, and which rows lost too many digits to cancellation [O].

    n² = c + rowsum((2s·W Aᵀ + s²·B (A Aᵀ)) ∘ B), where `WA` is `W Aᵀ` [O, R]. The error is that of the terms, not of
    the sum: a row whose update nearly cancels it needs `direct_row_norms`. (Liu et al. 2024, eq. 5 for n; the factored
    form follows from expanding the square.)
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    WA, A, B, c = cast(WA, wide), cast(A, wide), cast(B, wide), cast(c, wide)
    # On its side, as `Base.project` has computed it: seen that way, nothing is copied.
    terms = torch.addmm(WA.t(), A @ A.t(), B.t(), beta=2 * scale, alpha=scale**2)
    squared = c + (terms * B.t()).sum(dim=0)
    lost = squared < CANCELLATION_LIMIT * c
    if not squared.requires_grad:
        return squared.clamp_min_(0).sqrt_(), lost
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
    return torch.addcdiv(zero.to(m.dtype), m, n.masked_fill(zero, torch.inf))


def ratio_gradients(dg: Tensor, g: Tensor, n: Tensor, *, needs_n: bool) -> tuple[Tensor, Tensor | None]:
    """Returns the gradients of `magnitude_ratio`'s m and, where it is needed, n [O]; 0 where the row is zero."""
    dm = dg / n.masked_fill(n == 0, torch.inf)
    return dm, -dm * g if needs_n else None


def rescale_rows(h: Tensor, bias: Tensor | None, g: Tensor, *, kept: bool = False) -> Tensor:
    """Returns `g ⊙ (h − b) + b` [..., O] for `h = x Vᵀ + b`: the bias is never scaled.

    Written as `h + (g − 1) ⊙ (h − b)`: equal to `h` bit for bit where g is 1, and in half precision the rounding falls
    on a small term instead of on `g` itself.

    Args:
        h: A fresh result [..., O] that nothing else reads.
        bias: `b` [O], or None; it gets no gradient.
        g: The factors [O].
        kept: Whether what comes next keeps the result for its own backward pass, and does not write into it. Then the
            result is written into `h`, and the gradient of `g` comes from it, for which no factor may be small (see
            `has_small`). Otherwise `h` is kept beside it.
    """
    if torch.compiler.is_compiling():
        return rescaled(h, bias, g, written=False)
    if not torch.is_grad_enabled():
        return rescaled(h, bias, g, written=True)
    written: Tensor = _Rescale.apply(h, bias, g, kept)  # type: ignore[no-untyped-call]
    return written


class Rescaling(NamedTuple):
    """What `rescale_rows` needs to know beside what it rescales.

    The factors are `magnitude_ratio(m, n)`.

    Attributes:
        m: The magnitudes [O].
        n: The norms [O].
        kept: Whether what comes next keeps the result.
    """

    m: Tensor
    n: Tensor
    kept: bool

    def __call__(self, h: Tensor, bias: Tensor | None) -> Tensor:
        """Returns the rescaled rows of `h`, see `rescale_rows`."""
        return rescale_rows(h, bias, magnitude_ratio(self.m, self.n), kept=self.kept)


SMALLEST_RATIO = 1 / 64
"""A factor of less takes the digits of `h − b` away that its own gradient needs."""


def has_small(m: Tensor, n: Tensor) -> Tensor:
    """Returns whether a factor `m ⊘ n` is too small for its gradient to be told from what it has scaled []."""
    return (m.detach().abs() < SMALLEST_RATIO * n.detach()).any()


def rescaled(h: Tensor, bias: Tensor | None, g: Tensor, *, written: bool) -> Tensor:
    """Returns `rescale_rows` without a gradient, in `h`'s dtype, and in `h` itself if it is to be `written`."""
    centred = h if bias is None else h - bias
    return h.addcmul_(centred, g - 1) if written else cast(torch.addcmul(h, centred, g - 1), h.dtype)


def rescaling_gradients(
    dy: Tensor, z: Tensor, bias: Tensor | None, g: Tensor, *, from_result: bool
) -> tuple[Tensor, Tensor]:
    """Returns `∂L/∂h = g ⊙ dy` [..., O] and `∂L/∂g = Σ dy ⊙ (h − b)` [O], summed over all places.

    Args:
        dy: The gradient of the result [..., O].
        z: `h`; or the result y, of which `h − b = (y − b) ⊘ g`.
        bias: `b` [O], or None.
        g: The factors [O].
        from_result: Whether `z` is the result.
    """
    rows, wide = dy.reshape(-1, dy.shape[-1]), torch.promote_types(dy.dtype, g.dtype)
    product = cast(z.reshape(rows.shape), wide) * rows
    summed = product.sum(dim=0)
    if bias is not None:
        summed = summed - bias * rows.sum(dim=0, dtype=wide)
    # Where nothing is rounded, into the product, which has done its work: one tensor of [..., O] less.
    dh = torch.mul(rows, g, out=product) if wide == dy.dtype else (g * rows).to(dy.dtype)
    return dh.view(dy.shape), cast(summed / g if from_result else summed, g.dtype)


class _Rescale(torch.autograd.Function):
    """`rescale_rows`: into a new tensor, beside which `h` is kept; or into `h`, which alone is."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor | None, g: Tensor, kept: bool) -> Tensor:
        y = rescaled(h, bias, g, written=kept)
        if kept:
            ctx.mark_dirty(h)
        ctx.save_for_backward(h, bias, g)
        ctx.kept = kept
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, bias, g = ctx.saved_tensors
        dh, dg = rescaling_gradients(dy, z, bias, g, from_result=ctx.kept)
        return dh if ctx.needs_input_grad[0] else None, None, dg, None


def rescale_rows_reference(h: Tensor, bias: Tensor | None, g: Tensor) -> Tensor:
    """Returns what `rescale_rows` must equal."""
    return g * h if bias is None else g * (h - bias) + bias


def merged_decomposition(weight: Tensor, delta: Tensor, m: Tensor) -> Tensor:
    """Returns `W' = diag(m ⊘ n)(W + ΔW)` [O, I], computed in float32 or wider and rounded once to `weight`'s dtype."""
    V = weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta
    g = magnitude_ratio(m.to(V.dtype), torch.linalg.vector_norm(V, dim=1))
    return V.mul_(g[:, None]).to(weight.dtype)
