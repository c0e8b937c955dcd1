"""The low-rank update of LoRA: `y + s·(x Aᵀ) Bᵀ`.

Shapes: x [..., I], y [..., O], A [R, I], B [O, R].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, once_differentiable
from torch.nn import functional as F

from peftcli.ops.decomposition import Rescaling, magnitude_ratio, ratio_gradients, rescaled, rescaling_gradients
from peftcli.ops.precision import cast

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
            return (rows @ A).view(*du.shape[:-1], A.shape[1]), dA
        if not (dx.is_contiguous() and dx.dtype == A.dtype):
            return dx + (rows @ A).view(dx.shape), dA
        dx.view(-1, dx.shape[-1]).addmm_(rows, A)
        return dx, dA


def _product_of_tall(wide: Tensor, narrow: Tensor, scale: float = 1.0) -> Tensor:
    """Returns `s·wideᵀ narrow` [N, R] for `wide` [T, N] and `narrow` [T, R].

    Seen on a CPU: below a rank of 16 it takes two to six times as long as its transpose does, and from 16 on, for wide
    layers, two thirds of it.
    """
    as_it_is = narrow.shape[-1] >= 16
    left, right = (wide.t(), narrow) if as_it_is else (narrow.t(), wide)
    product = left @ right if scale == 1 else _scaled_product(left, right, scale)
    return product if as_it_is else product.t()


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Returns `s·left right` in one pass; with a beta of 0, what it is added to is not even read."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def add_low_rank(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns `y + s·(x Aᵀ) Bᵀ` in `y`'s dtype, written into `y` as `add_expanded` does."""
    return add_expanded(y, thin(x, A), B, scale)


class Layer(Protocol):
    """A frozen linear layer: `x Wᵀ + b`."""

    @property
    def forward(self) -> Callable[..., Any]:
        """From `x` [..., I] to a fresh [..., O]."""
        ...

    @property
    def weight(self) -> Tensor | None:
        """`W` [O, I] where the layer is that product and nothing else; None where it is packed, say."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """`b` [O], or None."""
        ...


def forward_low_rank(
    layer: Layer, x: Tensor, dropped: Tensor, A: Tensor, B: Tensor, scale: float, rescaling: Rescaling | None = None
) -> Tensor:
    """Returns `h = layer(x) + s·(dropped Aᵀ) Bᵀ` [..., O], or what `rescaling` makes of it.

    Where the layer is a plain product, that product and all the rest are one node of autograd: in a small step nodes
    take more time than what they compute.

    Args:
        layer: The frozen layer.
        x: Its input [..., I].
        dropped: The update's input: `x` itself where nothing is dropped and no dtype differs, which costs least.
        A: [R, I].
        B: [O, R].
        scale: s.
        rescaling: What is done to the rows of `h`, if anything.
    """
    m, n, kept = rescaling or (None, None, False)
    how = _as_one_node(layer, x, dropped, A, B, scale, kept)
    if how is not None:
        own = None if dropped is x else dropped
        adapted: Tensor = _Adapted.apply(how, x, own, A, B, m, n)  # type: ignore[no-untyped-call]
        return adapted
    if dropped is x:
        x, u = read(x, A)
    else:
        u = thin(dropped, A)
    h = add_expanded(layer.forward(x), u, B, scale)
    return h if rescaling is None else rescaling(h, layer.bias)


class _How(NamedTuple):
    """What `_Adapted` computes with beside what may want a gradient.

    Attributes:
        weight: W [O, I].
        bias: b [O], or None.
        scale: s.
        kept: Whether the rescaled rows are kept.
        dtype: What is computed in.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    kept: bool
    dtype: torch.dtype


def _as_one_node(
    layer: Layer, x: Tensor, dropped: Tensor, A: Tensor, B: Tensor, scale: float, kept: bool
) -> _How | None:
    """Returns how a node computes that has the layer's own product in it; None where there can be no such node."""
    weight, bias = layer.weight, layer.bias
    if weight is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        return _How(weight, bias, scale, kept, dtype) if weight.dtype == dtype else None
    fits = weight.dtype == x.dtype == dropped.dtype == A.dtype == B.dtype
    return _How(weight, bias, scale, kept, A.dtype) if fits else None


class _Adapted(torch.autograd.Function):
    """`forward_low_rank`: keeps `u`, the update's input if A trains, and of a rescaling one tensor as `rescale_rows`.

    Its inputs are x, what is left of it by dropout (None for all), A, B, and m and n (None where nothing is rescaled).
    """

    @staticmethod
    def forward(
        ctx: Any,
        how: _How,
        x: Tensor,
        dropped: Tensor | None,
        A: Tensor,
        B: Tensor,
        m: Tensor | None,
        n: Tensor | None,
    ) -> Tensor:
        ctx.dtypes, ctx.scale, ctx.kept = (x.dtype, None if dropped is None else dropped.dtype), how.scale, how.kept
        x = cast(x, how.dtype)
        source = x if dropped is None else cast(dropped, how.dtype)
        h = F.linear(x, how.weight, how.bias)
        u = F.linear(source, A)
        h.view(-1, h.shape[-1]).addmm_(u.view(-1, u.shape[-1]), cast(B, how.dtype).t(), alpha=how.scale)
        g = None if m is None or n is None else magnitude_ratio(m, n)
        y = h if g is None else rescaled(h, how.bias, g, written=how.kept)
        source_of_A = source if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(source_of_A, u, how.weight, how.bias, A, B, g, n, None if g is None else h)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        source, u, weight, bias, A, B, g, n, z = ctx.saved_tensors
        _, needs_x, needs_dropped, needs_A, needs_B, _, needs_n = ctx.needs_input_grad
        dtype_of_x, dtype_of_dropped = ctx.dtypes
        dh, dm, dn = dy, None, None
        if g is not None:
            dh, dg = rescaling_gradients(dy, z, bias, g, from_result=ctx.kept)
            dm, dn = ratio_gradients(dg, g, n, needs_n=needs_n)
        rows, u = dh.reshape(-1, dh.shape[-1]), u.view(-1, u.shape[-1])
        du = _scaled_product(rows, cast(B, rows.dtype), ctx.scale)
        dx = rows @ weight if needs_x else None
        ddropped = None
        if needs_dropped:
            ddropped = cast((du @ cast(A, du.dtype)).view(*dy.shape[:-1], A.shape[1]), dtype_of_dropped)
        elif dx is not None and dtype_of_dropped is None:
            dx.addmm_(du, cast(A, du.dtype))
        dx = None if dx is None else cast(dx.view(*dy.shape[:-1], A.shape[1]), dtype_of_x)
        dA = cast(_product_of_tall(source.reshape(-1, source.shape[-1]), du).t(), A.dtype) if needs_A else None
        dB = cast(_product_of_tall(rows, u, ctx.scale), B.dtype) if needs_B else None
        return None, dx, ddropped, dA, dB, dm, dn


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
        _, needs_u, needs_B, *_ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        du = _scaled_product(rows, B, ctx.scale).view(u.shape) if needs_u else None
        dB = _product_of_tall(rows, u.reshape(-1, u.shape[-1]), ctx.scale) if needs_B else None
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
