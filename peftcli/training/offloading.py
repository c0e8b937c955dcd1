"""`training.activation_offloading`: what the backward pass will need waits in the host's memory.

    forward:  device ──copy──▶ pinned host memory          backward:  pinned host memory ──copy──▶ device

The copies are asynchronous for the host and ordered for the device: they run on its own stream, between the operations
that write a tensor and those that read it. So nothing is waited for, and nothing overlaps either.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from peftcli.errors import HostError

MIN_BYTES = 2**16
"""Tensors below this stay: together they are little, and starting a copy takes longer than it."""


def require_device(device: torch.device) -> None:
    """Raises a HostError where `device` has no other memory to move activations to."""
    if device.type != "cuda":
        raise HostError(
            f"training.activation_offloading: this run is on the {device.type.upper()}, and there is no other device "
            "whose memory it could save",
            hint="set it to false; training.gradient_checkpointing saves memory on every device",
        )


class Policy:
    """Which saved tensors are moved: large ones of `device` that are no weights, which are there in any case."""

    def __init__(self, device: torch.device, held: Iterable[Tensor]) -> None:
        self.device = device
        self._held = {tensor.untyped_storage().data_ptr() for tensor in held}

    def moves(self, tensor: Tensor) -> bool:
        """Returns whether `tensor`, which autograd wants to keep, is to be moved.

        A spread weight is gathered into storage of its own; it is told from its class, and a view from its base's.
        """
        return (
            tensor.device.type == self.device.type
            and tensor.layout == torch.strided
            and tensor.nbytes >= MIN_BYTES
            and not isinstance(tensor, nn.Parameter)
            and not isinstance(tensor._base, nn.Parameter)
            and tensor.untyped_storage().data_ptr() not in self._held
        )


class Offloading(saved_tensors_hooks):
    """While entered, what `policy` moves is saved on the host, as `torch.autograd.graph.save_on_cpu` does with all.

    `count` and `num_bytes` say how much that has been.
    """

    def __init__(self, policy: Policy) -> None:
        self.count, self.num_bytes = 0, 0
        self._policy = policy
        super().__init__(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> tuple[torch.device | None, Tensor]:
        if not self._policy.moves(tensor):
            return None, tensor
        pinned = tensor.device.type == "cuda"
        # As dense as the original, in the same order of strides: kernels of the backward pass may count on it.
        kept = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
        kept.copy_(tensor, non_blocking=pinned)
        self.count += 1
        self.num_bytes += tensor.nbytes
        return tensor.device, kept


def _unpack(packed: tuple[torch.device | None, Tensor]) -> Tensor:
    device, tensor = packed
    return tensor if device is None else tensor.to(device, non_blocking=True)


def while_saving(policy: Policy | None) -> AbstractContextManager[Any]:
    """Returns what a forward pass is to run in, where activations are moved or not."""
    return nullcontext() if policy is None else Offloading(policy)


def policy_of(model: nn.Module, device: torch.device) -> Policy:
    """Returns the policy for `model`, whose parameters and buffers stay where they are."""
    return Policy(device, [*model.parameters(), *model.buffers()])
