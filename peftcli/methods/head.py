"""Head only: a trained last layer on the frozen base's features, the classical linear probe.

    y = h Wᵀ + b        h [..., I], the frozen base's last hidden state   W [O, I], b [O], trained

For a labelling task that is the task's new head; for a language model, its output head.

Init: a task's head at random, as transformers makes it; an output head as it is.
Trainable per site: 0.
Merge: none needed; the head is a part of the model.

Deviates from the paper: there is none. BERT's pooler counts as the base's and stays frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from peftcli.methods._protocol import Method, MethodConfig

OUTPUT_HEADS = ("lm_head", "embed_out", "output_projection")
"""What transformers calls the output head of a language model: the first, but for a few old ones."""


class HeadConfig(MethodConfig):
    """The fields of `method:` when `type: head`."""

    type: Literal["head"] = "head"


class Head(Method):
    """Chooses the head; there are no adapters."""

    Config = HeadConfig
    default_learning_rate = 1e-3  # a linear layer on fixed features bears it
    default_head_learning_rate = 5e-3
    peft_type = "HEAD"
    place = "nowhere"

    @classmethod
    def trains(cls, config: HeadConfig, parameter: str, owner: nn.Module) -> bool:
        return parameter.rpartition(".")[0].rpartition(".")[2] in OUTPUT_HEADS

    @classmethod
    def check_model(cls, config: HeadConfig, model: nn.Module) -> list[str]:
        get = getattr(model, "get_output_embeddings", None)
        head = get() if callable(get) else None
        if head is None:
            return []  # the head is a task's, which trains with every method
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        if head.weight is embedding.weight:
            return [
                "type: this model's output head shares its weight with the input embedding, so it cannot be trained "
                "alone: use full or lora, or another model.task"
            ]
        name = next(name for name, module in model.named_modules() if module is head)
        known = name.rpartition(".")[2] in OUTPUT_HEADS
        return [] if known else [f"type: this model's output head {name} is none that head knows: use full or lora"]

    @classmethod
    def peft_config(cls, config: HeadConfig) -> dict[str, Any]:
        return {}

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> HeadConfig:
        return HeadConfig()
