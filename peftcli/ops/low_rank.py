"""The low-rank update of LoRA: `y + s·(x Aᵀ) Bᵀ`.

Shapes: x [..., I], y [..., O], A [R, I], B [O, R].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.nn import functional as F

RIDGE = 1e-8
"""What is added to the diagonal of A Aᵀ before it is inverted; PEFT's value."""


def low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns `s·(x Aᵀ) Bᵀ` [..., O] in `A`'s dtype (autocast's where it is on).

    The scale is applied to the thin product, where it costs R multiplications a token instead of O.
    """
    return F.linear(thin(x, A) * scale, B)


def thin(x: Tensor, A: Tensor) -> Tensor:
    """Returns `x Aᵀ` [..., R] in `A`'s dtype (autocast's where it is on)."""
    return F.linear(as_input(x, A), A)


def as_input(x: Tensor, A: Tensor) -> Tensor:
    """Returns `x` in `A`'s dtype; as it is under autocast, which would only turn it back."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(A.dtype)


def read(x: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `x`, for the frozen layer to read, and `u = x Aᵀ` [..., R] in `A`'s dtype (autocast's where it is on).

    Both go through one node of autograd, which so has the layer's gradient of `x` in hand when it comes to its own
    share `du A`, and writes the one into the other: that saves a tensor of `x`'s size and two passes over it for each
    adapted layer. So what is returned as `x` must go to one linear layer and nowhere else: a linear layer's gradient
    is a fresh product, which may be written into.
    """
    plain = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
    if plain or x.dtype != A.dtype or not (x.requires_grad and torch.is_grad_enabled()):
        return x, thin(x, A)
    passed, u = _Read.apply(x, A)  # type: ignore[no-untyped-call]
    return passed, u


class _Read(torch.autograd.Function):
    """`read`: keeps x only if A trains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, A)
        ctx.set_materialize_grads(False)
        return x, F.linear(x, A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor | None, du: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        x, A = ctx.saved_tensors
        if du is None:
            return dx, None
        rows = du.reshape(-1, du.shape[-1])
        dA = None if x is None else _product_of_tall(x.reshape(-1, x.shape[-1]), rows).t()
        if dx is None:
            return (rows @ A).view(*du.shape[:-1], -1), dA
        if not (dx.is_contiguous() and dx.dtype == A.dtype):
            return dx + (rows @ A).view(dx.shape), dA
        dx.view(-1, dx.shape[-1]).addmm_(rows, A)
        return dx, dA


def _product_of_tall(wide: Tensor, narrow: Tensor) -> Tensor:
    """Returns `wideᵀ narrow` [N, R] for `wide` [T, N] and `narrow` [T, R].

    Seen on a CPU: below a rank of 16 it takes two to six times as long as its transpose does, and from 16 on, for wide
    layers, two thirds of it.
    """
    return wide.t() @ narrow if narrow.shape[-1] >= 16 else (narrow.t() @ wide).t()


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns `y + s·(x Aᵀ) Bᵀ` in `y`'s dtype, written into `y` as `add_expanded` does."""
    return add_expanded(y, thin(x, A), B, scale)


def forward_low_rank(
    layer: Callable[[Tensor], Tensor], x: Tensor, dropped: Tensor, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """Returns `layer(x) + s·(dropped Aᵀ) Bᵀ`, written into what the linear `layer` returns where possible.

    Args:
        layer: The frozen layer, from x [..., I] to a fresh [..., O].
        x: Its input.
        dropped: The update's input: `x` itself where nothing is dropped and no dtype differs, which costs least.
        A: [R, I].
        B: [O, R].
        scale: s.
    """
    if dropped is x:
        x, u = read(x, A)
    else:
        u = thin(dropped, A)
    return add_expanded(layer(x), u, B, scale)


def add_expanded(y: Tensor, u: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns `y + s·u Bᵀ` for `u` [..., R] in `y`'s dtype, written into `y` where dtypes allow it.

    `y` must be a fresh result that nothing else reads, such as a linear layer's output: that saves a copy of [..., O]
    and a pass over it for each adapted layer. Kept for the backward pass are `u` and `B`, nothing of y's size.
    """
    if torch.is_autocast_enabled(y.device.type) and u.dtype == y.dtype:
        B = B.to(y.dtype)  # which autocast would do, too, but only to a product that is then rounded before it is added
    if not (y.dtype == u.dtype == B.dtype and may_be_written(y)):
        return y + F.linear(u * scale, B).to(y.dtype)
    if torch.compiler.is_compiling():  # which writes where it can by itself, and may not into a packed layer's output
        return torch.addmm(y.view(-1, y.shape[-1]), u.reshape(-1, u.shape[-1]), B.t(), alpha=scale).view(y.shape)
    if not torch.is_grad_enabled():
        y.view(-1, y.shape[-1]).addmm_(u.reshape(-1, u.shape[-1]), B.t(), alpha=scale)
        return y
    written: Tensor = _AddExpanded.apply(y, u, B, scale)  # type: ignore[no-untyped-call]
    return written


class _AddExpanded(torch.autograd.Function):
    """`y + s·u Bᵀ`, in place.

    Written as a view's `addmm_`, autograd would copy the gradient of `y` twice on its way through that view.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, u: Tensor, B: Tensor, scale: float) -> Tensor:
        y.view(-1, y.shape[-1]).addmm_(u.reshape(-1, u.shape[-1]), B.t(), alpha=scale)
        ctx.save_for_backward(u, B)
        ctx.scale = scale
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, B = ctx.saved_tensors
        _, needs_u, needs_B, _ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        du = (rows @ B).mul_(ctx.scale).view(u.shape) if needs_u else None
        dB = _product_of_tall(rows, u.reshape(-1, u.shape[-1])).mul_(ctx.scale) if needs_B else None
        return dy, du, dB, None


def may_be_written(y: Tensor) -> bool:
    """Returns whether the result `y` of a base layer may be written into.

    Not where a custom autograd function returned it, a packed layer's say: it may be a view that was made unseen.
    Compiled code has neither views nor writes left by the time that autograd sees it.
    """
    return y.is_contiguous() and (torch.compiler.is_compiling() or not isinstance(y.grad_fn, BackwardCFunction))


def add_low_rank_reference(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns what `add_low_rank` must equal, written as the paper does."""
    return y + scale * (x @ A.T @ B.T)


def merged_low_rank(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns `W + s·B A` [O, I], computed and added in float32 (or wider) and rounded once to `weight`'s dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), B.to(wide), A.to(wide), alpha=scale).to(weight.dtype)


def projected_gradient(gradient: Tensor, A: Tensor, scale: float) -> Tensor:
    """Returns `G (A Aᵀ + 1e-8)⁻¹ / s²` for B's gradient `G` [O, R].

    A step along it moves `s·B A` by the step of `W` itself, projected on the rows of A: G is `s·∂L/∂W Aᵀ`, so that
    `s·ΔB A = −∂L/∂W Aᵀ (A Aᵀ)⁻¹ A`. Solved without a check, which would make a GPU wait; an A that has lost its rank
    gives numbers that are not finite.
    """
    gram = (A @ A.T).detach()
    gram.diagonal().add_(RIDGE)
    step: Tensor = torch.linalg.solve_ex(gram, gradient, left=False).result / scale**2
    return step


def projected_gradient_reference(gradient: Tensor, A: Tensor, scale: float) -> Tensor:
    """Returns what `projected_gradient` must equal."""
    inverse: Tensor = torch.linalg.inv(A @ A.T + RIDGE * torch.eye(len(A), dtype=A.dtype))
    return gradient @ inverse / scale**2
