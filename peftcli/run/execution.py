"""How a run computes: in which precision, what it recomputes, moves away, compiles and spreads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peftcli import sharding
from peftcli.errors import HostError, ModelError
from peftcli.models import liger
from peftcli.training import checks, compiling, offloading, zero

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcli.recipe import TrainingSection
    from peftcli.training.distributed import Processes
    from peftcli.training.zero_settings import ZeroSettings


def mixed_precision(wanted: str, device: torch.device) -> str:
    """Returns `no`, `bf16` or `fp16`: what was asked for, or bf16 for `auto` where the device has it in hardware.

    Raises:
        HostError: The device cannot do what was asked for; the libraries would compute in float32 without a word.
    """
    if wanted == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if wanted == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise HostError(
            f"training.mixed_precision: {torch.cuda.get_device_name(device)} has no bf16, and would imitate it slowly",
            hint="set training.mixed_precision to fp16, or to auto",
        )
    if wanted == "fp16" and device.type == "cpu":
        raise HostError(
            "training.mixed_precision: fp16 needs a GPU, and this run is on the CPU",
            hint="set training.mixed_precision to no (fastest on a CPU), or to auto",
        )
    return wanted


def require(settings: TrainingSection, device: torch.device) -> None:
    """Raises a HostError where this machine cannot do what `settings` ask for; before anything is loaded."""
    if settings.torch_compile:
        compiling.require_compiler(device)
    if settings.activation_offloading:
        offloading.require_device(device)
    if settings.use_liger_kernel:
        liger.require(device)


def set_up(model: PreTrainedModel, settings: TrainingSection, device: torch.device, *, fills_cache: bool) -> None:
    """Has the layers of `model`, grafted and not yet spread, recomputed and compiled as `settings` say.

    Args:
        model: The model.
        settings: The recipe's training section.
        device: Where it will run.
        fills_cache: Whether the method puts keys and values into the model's cache.

    Raises:
        ModelError: The model cannot do it.
    """
    if settings.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ModelError(f"training.gradient_checkpointing: {model.config.model_type} models cannot do it")
        # The reentrant form drops the gradients of adapters behind a frozen embedding.
        model.activation_checkpointing_enable({"use_reentrant": False})
    if settings.torch_compile:
        compiling.compile_layers(model, device, alike=not fills_cache)


def spread(model: PreTrainedModel, settings: ZeroSettings | None, group: Processes) -> str:
    """Spreads the model's base over the processes, and returns a sentence on what of it lies here."""
    if settings is not None:
        return zero.shard(model, settings, group.device)
    sharding.shard(model, group.device, group.count)
    return checks.what_is_spread(model)
