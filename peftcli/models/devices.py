"""The device to compute on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftcli.errors import HostError, RecipeError

if TYPE_CHECKING:
    import torch


def pick_device(name: str | None = None) -> torch.device:
    """Returns the device to compute on: the one named, else CUDA, XPU or MPS where there is one, else the CPU.

    Raises:
        RecipeError: `name` is no device.
        HostError: This machine has no such device.
    """
    import torch

    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f'--device: "{name}" is no device', hint="cpu, cuda, cuda:1, xpu or mps") from error
    if device.type != "cpu" and not (torch.accelerator.is_available() and device.type == _accelerator_type()):
        raise HostError(f"--device: this machine has no {device.type} device", hint="leave the option out, or cpu")
    if device.type != "cpu" and (device.index or 0) >= (count := torch.accelerator.device_count()):
        raise HostError(f"--device: this machine has no {name}: it has {count}, counted from 0", hint="name another")
    return device


def _accelerator_type() -> str | None:
    import torch

    current = torch.accelerator.current_accelerator()
    return current.type if current is not None else None
