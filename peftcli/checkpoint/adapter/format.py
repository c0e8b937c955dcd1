"""The names, constants and content of an adapter folder in PEFT's format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcli import inject, sharding
from peftcli.checkpoint import seal as seals
from peftcli.checkpoint.seal import Seal
from peftcli.errors import Problem
from peftcli.methods._protocol import Method, MethodConfig, Targets

CONFIG_FILE = seals.CONFIG_FILE
WEIGHTS_FILE = seals.WEIGHTS_FILE
BASE_PREFIX = "base_model.model."
"""What comes before the name of a base parameter on file."""
SHARED_PREFIX = "base_model."
"""What comes before the name of a tensor that all adapters share."""
TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
}
"""PEFT's name of each `model.task` that it has a name for."""
TOGETHER = "adapter_model.safetensors, adapter_config.json and the base model must belong together"
MISREAD = (TypeError, ValueError, AttributeError, IndexError, OverflowError)
"""What comes of a value of another kind than a method's file has there."""


@dataclass(frozen=True)
class Origin:
    """What an adapter's files say beside its tensors.

    Attributes:
        method: The method's class.
        config: Its Config.
        base_model: The base's name.
        revision: The base's revision.
        task: The recipe's `model.task`.
        fingerprint: That of the base's files; None where it could not be taken.
    """

    method: type[Method]
    config: MethodConfig
    base_model: str
    revision: str | None
    task: str
    fingerprint: str | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter folder's content, read and checked for itself, not yet against a model.

    Attributes:
        folder: Where it was read.
        method: The method's class.
        config: The method's Config, targets included.
        base_model: The name or path of the base model it was trained on, if the file tells.
        trained: Paths, or their ends, of the base's modules that were trained in full and are in the file.
        tensors: The tensors by their key on file.
        seal: What its files were when peftcli wrote them; None where it did not, or the seal is damaged.
        doubts: In what they are no longer that. Who uses the adapter must refuse it for these, or say them.
    """

    folder: Path
    method: type[Method]
    config: MethodConfig
    base_model: str | None
    trained: tuple[str, ...]
    tensors: dict[str, Tensor]
    seal: Seal | None = None
    doubts: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Contents:
    """What an adapter's folder is to hold.

    Attributes:
        fields: Those of its `adapter_config.json`.
        tensors: Those of its `adapter_model.safetensors`.
        fingerprint: That of the base's files.
    """

    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    fingerprint: str | None = None


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns all that trains under its key on file: adapters, what they share, and parameters of the base."""
    found = {
        adapter.peft_key(path, name): tensor.detach()
        for path, adapter in inject.adapters(model).items()
        for name, tensor in adapter.peft_tensors().items()
    }
    found |= {SHARED_PREFIX + name: tensor.detach() for name, tensor in _shared_tensors(model).items()}
    prefix = base_prefix(model)
    trained = inject.trained_base(model).items()
    return found | {prefix + name: sharding.whole(tensor.detach()) for name, tensor in trained}


def base_prefix(model: nn.Module) -> str:
    """Returns what comes before the name of a base parameter in the file of the model's adapters.

    PEFT wraps the model once more where adapters sit in its modules than where something goes in front of its input.
    """
    in_front = any(adapter.place in ("input-embedding", "model") for adapter in inject.adapters(model).values())
    return SHARED_PREFIX if in_front else BASE_PREFIX


def _shared_tensors(model: nn.Module) -> dict[str, Tensor]:
    shared = inject.shared_part(model)
    return {} if shared is None else shared.peft_tensors()


def has_targets(method: type[Method]) -> bool:
    """Returns whether the method's recipes name the modules to adapt."""
    return issubclass(method.Config, Targets)


def is_finite(tensor: Tensor) -> bool:
    """Returns whether every number is finite, without a second tensor of its size."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:  # few operations know 8-bit floats
        tensor = tensor.half()
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())
