"""Optimizers over an adapter's parameters, and what is worth knowing of them before a run.

- `adamw`: Loshchilov & Hutter 2019, arXiv 1711.05101.
- `adamw_8bit`: the same, each tensor's two moments quantised in blocks of 256 (Dettmers et al. 2022, arXiv 2110.02861).
- `paged_adamw_*`: the same again, moments in memory that a full GPU moves to the host (section 3 of arXiv 2305.14314).
- `lion_8bit`: Chen et al. 2023, arXiv 2302.06675. It steps by the sign of a mean of gradients and keeps one moment.
- `adafactor`: Shazeer & Stern 2018, arXiv 1804.04235; see `_adafactor` for what differs.
- `sgd`: without momentum.

Weight decay is decoupled in all of them; in SGD without momentum a penalty on the weights is the same.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcli import inject

if TYPE_CHECKING:
    from peftcli.recipe import TrainingSection

# What bitsandbytes does by itself: smaller tensors stay in 32 bits, and out of pages.
_MIN_8BIT_SIZE = 4096
_MIN_PAGED_SIZE = 100_000

_PAGED = ("paged_adamw_32bit", "paged_adamw_8bit")
_WITHOUT_8_BITS = {
    "adamw_8bit": "choose adamw",
    "paged_adamw_8bit": "choose adamw",
    "lion_8bit": "it is Lion in 32 bits; for less memory choose adafactor",
}

_UNSCALED = 2.0**20


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that train, by name, in the model's order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(
    model: nn.Module,
    settings: TrainingSection,
    learning_rate: float,
    head_learning_rate: float,
    heads: Collection[str] = (),
) -> torch.optim.Optimizer:
    """Returns the optimizer that the recipe names; `heads` are the parameters that learn at the head's rate.

    Parameters are grouped by their learning rate and by whether they decay. Vectors (DoRA's magnitude, biases) never
    do: decay pulls towards 0, and that is not where a length or an offset should go.
    """
    rates = {
        f"{path}.{name}": learning_rate * factor
        for path, part in inject.parts(model).items()
        for name, factor in part.learning_rate_factors().items()
    }
    rates |= dict.fromkeys(heads, head_learning_rate)
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in trainable_parameters(model).items():
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        groups[rates.get(name, learning_rate), decay].append(parameter)
    described: list[dict[str, Any]] = [
        {"params": parameters, "lr": rate, "peak_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
    if settings.optim == "sgd":
        return torch.optim.SGD(described, lr=learning_rate)
    if settings.optim == "adafactor":
        return _adafactor(described)
    betas = (settings.adam_beta1, settings.adam_beta2)
    if settings.optim == "adamw":
        # One fused kernel over all tensors: an adapter is hundreds of small ones, where a loop is mostly overhead.
        return torch.optim.AdamW(described, lr=learning_rate, betas=betas, eps=settings.adam_epsilon, fused=True)
    return _bitsandbytes(described, settings.optim, betas, settings.adam_epsilon)


def _adafactor(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Returns Adafactor, algorithms 4 and 5 of its paper, with the recipe's learning rate as its step size α.

        θ ← (1 - αλ) θ - α U / max(1, RMS(U))    U = G / √V    V = R C / mean(R)    β₂ = 1 - t^-0.8

    R [O, 1] and C [1, I] are running means of G² over columns and rows, which decay with β₂; a vector keeps V itself.

    Deviates from the paper, where α is max(RMS(θ), 1e-3) · min(1e-2, 1/√t), which hardly moves an adapter that starts
    at 0; where ε₁ is added to G², not the least that √V can be; and where there is no weight decay λ.
    """
    for group in groups:
        # torch's α is max(RMS(θ), ε₂) · min(lr, 1/√t). A power of two as ε₂ and lr over it make that lr to the bit.
        group["lr"] = group["peak_lr"] = group["lr"] / _UNSCALED
        group["weight_decay"] *= _UNSCALED
    # torch's own ε₁ of 1e-7 is a floor of √V, under which small gradients would no longer be told apart. 0 would make
    # 0 / 0 of a gradient of zeros, as LoRA's A gets first; the square of 1e-18 is still a normal float32.
    return torch.optim.Adafactor(groups, eps=(1e-18, _UNSCALED))


def _bitsandbytes(
    groups: list[dict[str, Any]], optim: str, betas: tuple[float, float], epsilon: float
) -> torch.optim.Optimizer:
    """Returns the optimizer of bitsandbytes that the recipe calls `optim`."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # of a kernel that is not used here
    from bitsandbytes.optim.adamw import AdamW
    from bitsandbytes.optim.lion import Lion

    if optim == "lion_8bit":
        lion: torch.optim.Optimizer = Lion(groups, betas=betas, optim_bits=8, min_8bit_size=_MIN_8BIT_SIZE)
        return lion
    adamw: torch.optim.Optimizer = AdamW(
        groups,
        betas=betas,
        eps=epsilon,
        optim_bits=32 if optim == "paged_adamw_32bit" else 8,
        min_8bit_size=_MIN_8BIT_SIZE,
        # Elsewhere it would warn, and do the same.
        is_paged=optim in _PAGED and groups[0]["params"][0].device.type == "cuda",
    )
    return adamw


def optimizer_facts(optim: str, parameters: Collection[Tensor]) -> list[str]:
    """Returns a sentence on each promise in the optimizer's name: for how much of `parameters` it is kept."""
    facts = []
    if optim in _WITHOUT_8_BITS:
        facts.append(_held_in_8_bits(optim, [parameter.numel() for parameter in parameters]))
    if optim in _PAGED:
        facts.append(_paged(optim, parameters))
    return facts


def _held_in_8_bits(optim: str, sizes: list[int]) -> str:
    large = [size for size in sizes if size >= _MIN_8BIT_SIZE]
    if not large:
        return (
            f"{optim} holds nothing in 8 bits here: none of the {len(sizes):,} tensors has {_MIN_8BIT_SIZE:,} numbers, "
            f"and the moments of smaller ones stay in 32 bits; {_WITHOUT_8_BITS[optim]}"
        )
    return (
        f"{optim}: the moments of {len(large):,} of {len(sizes):,} tensors, {sum(large) / sum(sizes):.1%} of the "
        f"trained numbers, are held in 8 bits; those of tensors below {_MIN_8BIT_SIZE:,} numbers stay in 32"
    )


def _paged(optim: str, parameters: Collection[Tensor]) -> str:
    any_8_bits = optim in _WITHOUT_8_BITS and any(parameter.numel() >= _MIN_8BIT_SIZE for parameter in parameters)
    same = f"; {'adamw_8bit' if any_8_bits else 'adamw'} does the same"
    if next(iter(parameters)).device.type != "cuda":
        return f"{optim} pages nothing here: that needs a CUDA GPU{same}"
    paged = sum(parameter.numel() >= _MIN_PAGED_SIZE for parameter in parameters)
    return (
        f"{optim}: the moments of {paged:,} of {len(parameters):,} tensors are paged; "
        f"tensors below {_MIN_PAGED_SIZE:,} numbers never are{'' if paged else same}"
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
