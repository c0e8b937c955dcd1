"""One level of Haar's wavelet transform, which is orthogonal: T_n [n, n] with `T_n T_nᵀ = 1`, for even n.

    (T_n x)[j] = (x[2j] + x[2j+1]) / √2        (T_n x)[j + n/2] = (x[2j] − x[2j+1]) / √2

A matrix's inverse transform is `T_mᵀ S̃ T_n`, where S̃ [m, n] is S with its upper right and its lower left quadrant
exchanged: by the convention of PyWavelets, which PEFT follows, the upper right one holds what is high-pass by rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF_POWER = 0.5
"""What two unnormalised transforms, one of each axis, are short of: 1/√2 each."""


def to_bands(x: Tensor) -> Tensor:
    """Returns `√2 · T_n x` [n, T] for `x` [n, T]: all sums of neighbours, then all differences."""
    even, odd = x[0::2], x[1::2]
    return torch.cat([even + odd, even - odd])


def from_bands(z: Tensor) -> Tensor:
    """Returns `√2 · T_nᵀ z` [n, T] for `z` [n, T]: neighbours from their sums and differences, doubled."""
    low, high = z.chunk(2)
    return torch.stack([low + high, low - high], dim=1).flatten(0, 1)


def exchanged(rows: Tensor, columns: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    """Returns the places in S̃ [m, n] of the places (`rows`, `columns`) in S."""
    lower, right = rows >= m // 2, columns >= n // 2
    step = right.long() - lower.long()  # 1 in the upper right quadrant, −1 in the lower left, else 0
    return rows + step * (m // 2), columns - step * (n // 2)


def inverse(S_exchanged: Tensor) -> Tensor:
    """Returns `T_mᵀ S̃ T_n` [m, n], the inverse transform of the S whose S̃ is given."""
    return HALF_POWER * from_bands(from_bands(S_exchanged).T).T


def inverse_reference(S: Tensor) -> Tensor:
    """Returns the inverse transform of S [m, n] itself, two by two: what `inverse` of S̃ must equal."""
    (a, h), (v, d) = (half.chunk(2, dim=1) for half in S.chunk(2))
    blocks = torch.stack([a + h + v + d, a + h - v - d, a - h + v - d, a - h - v + d], dim=-1) / 2
    whole: Tensor = blocks.unflatten(-1, (2, 2)).transpose(1, 2).reshape(S.shape)
    return whole
