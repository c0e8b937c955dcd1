"""Optimizers over an adapter's parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftcli import inject

if TYPE_CHECKING:
    from peftcli.recipe import TrainingSection


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
    # One fused kernel over all tensors: an adapter is hundreds of small ones, where a loop is mostly overhead.
    return torch.optim.AdamW(
        described,
        lr=learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_epsilon,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
