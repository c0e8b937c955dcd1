"""Full fine-tuning: every parameter of the base trains, or every one of chosen layers.

    θ' = θ + Δθ        all of θ, no constraint; FT^Top2 (Li & Liang 2021, arXiv 2101.00190) trains the last two layers

Init: the base itself; nothing is added.
Trainable per site: 0.
Merge: none needed; the trained parameters are the base's own.

Deviates from the paper: there is none for the whole; of FT^Top2 only the count is checked. With AdamW in float32 it
takes 16 bytes a trained parameter, and saved is all that trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from torch import nn

from peftcli.methods._place import layer_of
from peftcli.methods._protocol import Method, MethodConfig


class FullConfig(MethodConfig):
    """The fields of `method:` when `type: full`."""

    type: Literal["full"] = "full"
    layers: list[int] | None = Field(
        None, min_length=1, description="Indices of the layers to train, and nothing else; everything when left out."
    )


class Full(Method):
    """Chooses the parameters; there are no adapters."""

    Config = FullConfig
    default_learning_rate = 2e-5
    default_head_learning_rate = None
    peft_type = "FULL"
    place = "nowhere"

    @classmethod
    def trains(cls, config: FullConfig, parameter: str, owner: nn.Module) -> bool:
        return config.layers is None or layer_of(parameter) in config.layers

    @classmethod
    def check_model(cls, config: FullConfig, model: nn.Module) -> list[str]:
        present = {layer for name, _ in model.named_parameters() if (layer := layer_of(name)) is not None}
        span = f"the model's are {min(present)} to {max(present)}" if present else "the model has none"
        return [f"layers: there is no layer {layer}; {span}" for layer in config.layers or () if layer not in present]

    @classmethod
    def peft_config(cls, config: FullConfig) -> dict[str, Any]:
        return {"layers": config.layers}

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> FullConfig:
        return FullConfig(layers=fields["layers"])
