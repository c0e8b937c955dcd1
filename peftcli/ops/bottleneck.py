"""The bottleneck of adapters: `s·(σ(h Dᵀ + b_D) Uᵀ + b_U)`.

Shapes: h [..., I], D [M, I], b_D [M], U [O, M], b_U [O]; M is the length of the thin side.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {"gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh, "swish": F.silu}
"""The elementwise functions σ by their names in recipes."""


def bottleneck(
    h: Tensor, D: Tensor, b_D: Tensor | None, U: Tensor, b_U: Tensor | None, sigma: Activation, scale: float
) -> Tensor:
    """Returns `s·(σ(h Dᵀ + b_D) Uᵀ + b_U)` [..., O] in `D`'s dtype (autocast's where it is on).

    The scale is applied to the thin activations, where it costs M multiplications a token instead of O.
    """
    a = sigma(F.linear(h.to(D.dtype), D, b_D))
    if scale == 1:
        return F.linear(a, U, b_U)
    return F.linear(a * scale, U, None if b_U is None else b_U * scale)


def bottleneck_reference(
    h: Tensor, D: Tensor, b_D: Tensor, U: Tensor, b_U: Tensor, sigma: Activation, scale: float
) -> Tensor:
    """Returns what `bottleneck` must equal, written as the papers do."""
    return scale * (sigma(h @ D.T + b_D) @ U.T + b_U)
