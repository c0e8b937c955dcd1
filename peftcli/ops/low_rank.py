"""The low-rank update of LoRA: `y + s·(x Aᵀ) Bᵀ`.

Shapes: x [..., I], y [..., O], A [R, I], B [O, R].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

RIDGE = 1e-8
"""What is added to the diagonal of A Aᵀ before it is inverted; PEFT's value."""


def low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns `s·(x Aᵀ) Bᵀ` [..., O] in `A`'s dtype (autocast's where it is on).

    The scale is applied to the thin product, where it costs R multiplications a token instead of O.
    """
    return F.linear(F.linear(x.to(A.dtype), A) * scale, B)


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns `y + s·(x Aᵀ) Bᵀ` in `y`'s dtype, written into `y` as `add_expanded` does."""
    return add_expanded(y, F.linear(x.to(A.dtype), A), B, scale)


def add_expanded(y: Tensor, u: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns `y + s·u Bᵀ` for `u` [..., R] in `y`'s dtype, written into `y` where dtypes allow it.

    `y` must be a fresh result that nothing else reads, such as a linear layer's output: that saves a copy of [..., O]
    and a pass over it for each adapted layer.
    """
    if y.dtype == u.dtype == B.dtype and y.is_contiguous() and not _is_of_a_custom_function(y):
        y.view(-1, y.shape[-1]).addmm_(u.reshape(-1, u.shape[-1]), B.t(), alpha=scale)
        return y
    return y + F.linear(u * scale, B).to(y.dtype)


def _is_of_a_custom_function(y: Tensor) -> bool:
    """Returns whether `y` is what a custom autograd function returned, a packed layer's say: no view of it is written.

    Compiled code has neither views nor writes left by the time that autograd sees it.
    """
    return not torch.compiler.is_compiling() and isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction)


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
