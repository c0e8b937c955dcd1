"""How far two models' answers are apart, and how far rounding explains."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftcli.errors import ModelError
from peftcli.quantization import unrounded_inputs

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far merged logits may be from the adapted model's, relative to the largest: the rounding of the stored dtype."""


@dataclass(frozen=True)
class Agreement:
    """How far two models' logits are from each other on the same prompts.

    Attributes:
        max_difference: The largest difference of two logits, relative to the largest logit.
        mean_divergence: The mean KL divergence of the next-token distributions, in nats.
        same_choice: The share of positions where both choose the same token.
        positions: How many positions were compared.
    """

    max_difference: float
    mean_divergence: float
    same_choice: float
    positions: int


@torch.no_grad()
def logits_of(
    model: nn.Module, inputs: list[dict[str, Tensor]], device: torch.device, *, rounded: bool = False
) -> list[Tensor]:
    """Returns the logits of each of `inputs`, the forward's arguments for one sample, in float32 on the CPU.

    They are [L, V] of a text's tokens, and [1, K] of a whole sample's labels. Layers in int8 do not round their inputs
    for it unless `rounded` asks for the model as it runs: it is weights that are compared.
    """
    model.eval()
    with contextlib.nullcontext() if rounded else unrounded_inputs(model):
        outputs = (model(**{name: one.to(device) for name, one in given.items()}).logits[0] for given in inputs)
        return [logits.reshape(-1, logits.shape[-1]).float().cpu() for logits in outputs]


def compare(expected: list[Tensor], found: list[Tensor]) -> Agreement:
    """Returns how far `found` is from `expected`, prompt by prompt [L, V]."""
    positions = sum(len(logits) for logits in expected)
    largest = max(float(logits.abs().max()) for logits in expected)
    pairs = list(zip(expected, found, strict=True))
    kl = sum(
        float(nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum"))
        for a, b in pairs
    )
    return Agreement(
        max(float((a - b).abs().max()) for a, b in pairs) / largest,
        max(0.0, kl / positions),  # rounding can leave it a hair below
        sum(float((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs) / positions,
        positions,
    )


def require_agreement(agreement: Agreement, *dtypes: torch.dtype) -> None:
    """Raises a ModelError where the merged model is further from the adapted one than rounding explains.

    Args:
        agreement: How far they are apart.
        dtypes: What the merged weights are rounded to, and what the adapted model computes in.
    """
    dtype = max(dtypes, key=lambda one: TOLERANCE.get(one, 0))
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
    if not agreement.max_difference <= tolerance:  # NaN fails too
        raise ModelError(
            f"the merged model differs from base and adapter by {agreement.max_difference:.2e} of the largest logit, "
            f"more than the {tolerance:.0e} that {str(dtype).removeprefix('torch.')} allows; nothing was written",
            hint="merge with --dtype float32, or check that the adapter belongs to this base",
        )
