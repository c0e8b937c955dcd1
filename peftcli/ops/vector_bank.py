"""The vectors of VB-LoRA: each a weighted mean of a few from a shared bank.

Shapes: bank [h, b], logits [..., h], k of the h vectors chosen for each mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOT_CHOSEN = -1e4
"""The logit of a vector that was not among the chosen, where a file has the chosen alone: below every log of a weight,
and finite, so that nothing downstream meets an infinity."""


def mixed_vectors(logits: Tensor, bank: Tensor, k: int) -> Tensor:
    """Returns [..., b]: the mean of the k vectors with the largest logits, weighted by the softmax over these k.

    Gathers k vectors instead of weighting all h. The softmax is computed in float32 or wider.
    """
    chosen, indices = logits.topk(k, dim=-1)
    weights = chosen.to(torch.promote_types(chosen.dtype, torch.float32)).softmax(-1)
    return (weights[..., None] * bank[indices]).sum(-2).to(bank.dtype)


def mixed_vectors_reference(logits: Tensor, bank: Tensor, k: int) -> Tensor:
    """Returns what `mixed_vectors` must equal: a softmax over all h, with no weight for those not chosen."""
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf).softmax(-1) @ bank


def only_chosen(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the indices [..., k] of the chosen vectors in the smallest fitting dtype, and their weights [..., k − 1].

    The last weight is what the others leave of 1.
    """
    chosen, indices = logits.topk(k, dim=-1)
    h = logits.shape[-1]
    dtype = torch.uint8 if h < 2**8 else torch.int16 if h < 2**15 else torch.int32
    return indices.to(dtype), chosen.softmax(-1)[..., :-1].contiguous()


def logits_of_chosen(indices: Tensor, weights: Tensor, h: int) -> Tensor:
    """Returns logits [..., h] whose chosen vectors and weights are those that `only_chosen` returned."""
    all_weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
    tiny = torch.finfo(weights.dtype).tiny  # rounding can leave the last weight at 0 or below
    logits = weights.new_full((*weights.shape[:-1], h), NOT_CHOSEN)
    return logits.scatter(-1, indices.long(), all_weights.clamp_min(tiny).log())
