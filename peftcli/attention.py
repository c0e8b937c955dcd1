"""Attention over samples that lie end to end, sample by sample.

A mask that keeps T joined tokens apart has T² entries, and scaled dot-product attention computes every pair that it
hides: on a CPU, 2,048 tokens in 100 samples then cost more in attention than in all linear layers. Here each sample is
a causal attention of its own, without a mask: Σ L² pairs instead of (Σ L)².

It is an attention of transformers' own kind, registered beside `sdpa`, and used for what joined samples look like:
one row without padding, cache or anything else that a mask says. All else goes to `sdpa` with its mask, as does a row
with a sample that is longer than a layer's window.

Shapes: B batch, H heads, T tokens of a row, L tokens of a sample, S samples in the row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "sdpa_by_sample"
"""What a model's configuration calls this attention while it is used."""

_UNMASKED = ("position_bias", "softcap", "s_aux")
"""Arguments of an attention that is more than a product of queries and keys under a mask."""


def use(model: PreTrainedModel, device: torch.device) -> Callable[[], None] | None:
    """Makes a model that computes on a CPU with `sdpa` attend sample by sample; returns what undoes that.

    None, and nothing changed, for other models. Whether the layers can do with it is for a trial to say: those that
    cannot raise a ValueError.
    """
    if device.type != "cpu" or model.config._attn_implementation != "sdpa":
        return None
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lengths_or_mask)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:  # a model that has its attention written out
        return None
    return lambda: model.set_attn_implementation("sdpa")


def window(model: PreTrainedModel) -> int | None:
    """Returns how many tokens the narrowest of a model's layers sees, or None where all see everything before them."""
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds is not None and not any("sliding" in kind or "chunked" in kind or "local" in kind for kind in kinds):
        return None
    found = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size", "window_size")]
    return min((size for size in found if isinstance(size, int)), default=None)


def knows_samples(model: PreTrainedModel) -> bool:
    """Returns whether the model's attention costs nothing between joined samples: this one, or a flash attention."""
    name = str(model.config._attn_implementation)
    return name == NAME or "flash" in name


def lengths_or_mask(
    *,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **options: Any,
) -> Tensor | None:
    """Returns the lengths [1, 1, 1, S] of the samples in one row of joined samples, else the mask that `sdpa` gets.

    Args:
        mask_function: Says of (row, head, query, key), elementwise, whether the query sees the key. Two samples meet
            where a token does not see the one before.
        attention_mask: 1 for tokens, 0 for padding; None where there is none.
        local_size: Tokens that a layer with a window sees.
        options: What else `transformers.masking_utils.sdpa_mask` is given.
    """
    from transformers.masking_utils import sdpa_mask

    lies_joined = options["batch_size"] == 1 and options["q_length"] == options["kv_length"] and attention_mask is None
    # transformers insists on a mask for joined samples, and on vmap for masks that are not elementwise.
    if lies_joined and not options.get("allow_is_causal_skip", True) and not options.get("use_vmap"):
        lengths = _sample_lengths(mask_function, options["q_length"], options.get("device", "cpu"))
        if lengths is not None and (local_size is None or int(lengths.max()) <= local_size):
            return lengths.view(1, 1, 1, -1)
    mask: Tensor | None = sdpa_mask(
        mask_function=mask_function, attention_mask=attention_mask, local_size=local_size, **options
    )
    return mask


def _sample_lengths(mask_function: Callable[..., Tensor], num_tokens: int, device: torch.device | str) -> Tensor | None:
    """Returns the lengths [S] of a row's samples; None where a token sees the one after it."""
    later = torch.arange(1, num_tokens, device=device)
    first = torch.zeros_like(later)
    if bool(mask_function(first, first, later - 1, later).any()):
        return None
    starts = torch.nonzero(~mask_function(first, first, later, later - 1))[:, 0] + 1
    ends = torch.tensor([num_tokens], device=device)
    return torch.diff(torch.cat([first.new_zeros(1), starts, ends]))


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Returns the attention [B, T, H, D] of queries [B, H, T, D] to their own sample's keys and values.

    Args:
        module: The layer.
        query: Queries.
        key: Keys, perhaps of fewer heads, which groups of queries share.
        value: Values, of as many heads.
        attention_mask: What `lengths_or_mask` returned.
        options: What transformers passes its attentions.

    Raises:
        ValueError: The layer adds something to its attention that would have to be cut up, too.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype != torch.int64:
        whole: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return whole
    more = [name for name in _UNMASKED if options.get(name) is not None]
    if more or not getattr(module, "is_causal", True):
        raise ValueError(f"{NAME} attention is causal and has no {' or '.join(more or _UNMASKED)}")
    lengths, causal = attention_mask.flatten().tolist(), {**options, "is_causal": True}
    samples = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **causal)[0] for q, k, v in samples], dim=1), None
