"""The rows of a table that are nearest to given ones by angle: which words a trained prompt is closest to.

Shapes: P [p, D], E [V, D]. A row's length does not count, so scaled and unscaled embeddings give the same answer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ROWS = 8192
"""Rows of E that are widened to float32 at a time: a table in half precision never doubles."""


@torch.no_grad()
def nearest_tokens(P: Tensor, E: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the cosine distances [p, k] of each row of `P` to its `k` nearest in `E`, and where these are [p, k].

    Nearest first. A row of zeros has no angle and is at distance 1 from everything. Candidates are ranked in float32
    and measured in float64: a distance is right to 1e-15, so that a row which is in `E` is at 0 from itself.
    """
    k = min(k, len(E))
    wanted = F.normalize(P.float(), dim=1)
    best = P.new_full((len(P), 0), 0, dtype=torch.float32)
    rows = torch.zeros(len(P), 0, dtype=torch.int64, device=P.device)
    for start in range(0, len(E), CHUNK_ROWS):
        similar = wanted @ F.normalize(E[start : start + CHUNK_ROWS].float(), dim=1).T
        found, at = similar.topk(min(k, similar.shape[1]), dim=1)
        best, kept = torch.cat([best, found], dim=1).topk(min(k, best.shape[1] + found.shape[1]), dim=1)
        rows = torch.cat([rows, at + start], dim=1).gather(1, kept)
    exact = torch.linalg.vecdot(F.normalize(P.double(), dim=1)[:, None], F.normalize(E[rows].double(), dim=2))
    distances, order = (1 - exact).clamp_min(0).sort(dim=1, stable=True)
    return distances, rows.gather(1, order)


def nearest_tokens_reference(P: Tensor, E: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns what `nearest_tokens` must equal, from all [p, V] distances at once."""
    distances, rows = (1 - F.cosine_similarity(P[:, None], E[None], dim=2)).topk(k, dim=1, largest=False)
    return distances, rows
