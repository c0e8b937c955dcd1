"""Several low-rank heads on one input: `y + s·Σ_i ω_i B_i u_i`, with gates `ω` that may differ from token to token.

Shapes: N heads of rank r; x [..., I], y [..., O], u [..., N, r] (or [..., 1, r], the same for all heads), ω [..., N],
R [N, I], and the heads side by side in B = [B_1 … B_N] [O, N·r].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcli.ops.low_rank import add_expanded
from peftcli.ops.precision import without_autocast


def gates(x: Tensor, R: Tensor) -> Tensor:
    """Returns `ω = softmax(x Rᵀ)` [..., N] in float32 or wider, under autocast too.

    Logits rounded to half precision would send like tokens to unlike mixtures.
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, R.dtype), torch.float32)
    with without_autocast(x.device.type):
        return F.linear(x.to(wide), R.to(wide)).softmax(dim=-1)


def add_heads(y: Tensor, u: Tensor, omega: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns `y + s·Σ_i ω_i B_i u_i` in `y`'s dtype, written into `y` as `add_expanded` does.

    The gates scale the thin side, so that one product serves all heads and the backward pass keeps N·r numbers of a
    token where a sum over heads would keep N·O.
    """
    z = (omega[..., None] * u).flatten(-2)
    return add_expanded(y, z.to(u.dtype), B, scale)


def add_heads_reference(y: Tensor, u: Tensor, omega: Tensor, B: Tensor, scale: float) -> Tensor:
    """Returns what `add_heads` must equal, head by head."""
    heads = B.chunk(omega.shape[-1], dim=1)
    u = u.expand(*omega.shape, u.shape[-1])
    return y + scale * sum(omega[..., i, None] * (u[..., i, :] @ B_i.T) for i, B_i in enumerate(heads))
