"""BitFit: the biases of the base model train, and nothing else.

Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
arXiv 2106.10199, section 3:

    y = x Wᵀ + b        x [..., I]   W [O, I], frozen   b [O], trained; as are the biases of LayerNorms

Init: the base itself; nothing is added.
Trainable per site: 0.
Merge: none needed; the trained biases are the base's own.

Deviates from the paper: a bias is trained wherever the model has one, embeddings' LayerNorm and output head included.
Models without biases (Llama's family) are refused: biases that start at 0 would be another method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from peftcli.methods._place import ends_in
from peftcli.methods._protocol import Method, MethodConfig


class BitFitConfig(MethodConfig):
    """The fields of `method:` when `type: bitfit`."""

    type: Literal["bitfit"] = "bitfit"
    biases: Literal["all"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all",
        description="Biases to train: all, or those of the modules whose path ends so, such as [query, "
        "intermediate.dense] (half of them, nearly as good in the paper).",
    )


class BitFit(Method):
    """Chooses the biases; there are no adapters."""

    Config = BitFitConfig
    default_learning_rate = 1e-3  # of the authors' code: so few parameters take a far higher one than all of them
    default_head_learning_rate = None
    peft_type = "BITFIT"
    place = "nowhere"

    @classmethod
    def trains(cls, config: BitFitConfig, parameter: str, owner: nn.Module) -> bool:
        path, named = parameter.rpartition(".")[0], config.biases
        return _is_bias(parameter) and (named == "all" or any(ends_in(path, entry) for entry in named))

    @classmethod
    def check_model(cls, config: BitFitConfig, model: nn.Module) -> list[str]:
        base = getattr(model, "base_model", model)  # what a task's head has is trained with every method
        paths = [name.rpartition(".")[0] for name, _ in base.named_parameters() if _is_bias(name)]
        if not paths:
            return ["type: this model has no biases, so bitfit has nothing to train; ia3 or lora can adapt it"]
        leaves = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        return [
            f'biases: no module called "{entry}" has a bias; those that have are {leaves}'
            for entry in ([] if config.biases == "all" else config.biases)
            if not any(ends_in(path, entry) for path in paths)
        ]

    @classmethod
    def peft_config(cls, config: BitFitConfig) -> dict[str, Any]:
        return {"biases": config.biases}

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> BitFitConfig:
        return BitFitConfig(biases=fields["biases"])


def _is_bias(parameter: str) -> bool:
    leaf = parameter.rpartition(".")[2]
    return leaf == "bias" or leaf.endswith("_bias")
