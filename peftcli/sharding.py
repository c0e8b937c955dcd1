"""Spreads the frozen base over a run's processes, a share of every weight on each, with torch's FSDP2.

    weight [n, ...] on P processes: rows 0 … n/P − 1 on the first, and so on; gathered for a layer while it computes

Each decoder layer is a unit of its own, and what is left at the root another. What trains is *not* spread: adapters
are small, methods look at whole matrices of them (ranks, norms, penalties), and every optimizer works on plain tensors.
They are the same on each process, as in data-parallel training, and so are the tensors that all adapters share. The
exception is a method that trains the base's own weights and nothing else: these are spread like the rest, and torch
averages and scatters their gradients.

No dtype is changed on the way: a packed weight's bytes must arrive as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftcli import inject, quantization
from peftcli.errors import ModelError


def shard(model: nn.Module, device: torch.device, num_processes: int) -> int:
    """Spreads the base of `model`, grafted and on any device, over all processes; returns how many units it became.

    Every process must call it with the same model.

    Raises:
        ModelError: No layers can be found in the model.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    units = list(layers(model))
    if not units:
        raise ModelError(
            "distributed.strategy: fsdp2 cannot find this model's layers, which it spreads one by one",
            hint="set distributed.strategy to ddp",
        )
    mesh = init_device_mesh(device.type, (num_processes,))
    whole = _stays_whole(model)
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh, ignored_params=whole)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    for module in model.modules():
        move_rest(module, device)
    return len(units) + 1


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yields the modules that transformers says must not be split: a decoder's or encoder's layers."""
    names: Collection[str] = getattr(model, "_no_split_modules", None) or ()
    for module in model.modules():
        original: type[nn.Module] = getattr(type(module), "grafted_from", type(module))
        if original.__name__ in names and any(True for _ in module.parameters()):
            yield module


def _stays_whole(model: nn.Module) -> set[nn.Parameter]:
    """Returns the parameters that every process holds in full: the adapters', and what trains beside them."""
    own = {parameter for part in inject.parts(model).values() for parameter in part.parameters()}
    return own | set(inject.trained_base(model).values()) if own else own


def move_rest(module: nn.Module, device: torch.device) -> None:
    """Moves to `device` what of `module` is no parameter: buffers, and how a packed weight is to be read."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, buffer.to(device))
    if quantization.is_quantised(module):
        module.quant_state.to(device)


def reshard(model: Any) -> None:
    """Lets go of what a forward pass without a backward pass has left gathered: the weights at the root.

    Until then the model's parameters there are not those that the optimizer knows. Does nothing if none is spread.
    """
    if hasattr(model, "reshard"):
        model.reshard()


def is_spread(tensor: Tensor) -> bool:
    """Returns whether `tensor` is a DTensor; asked so that one process alone need not import what those are."""
    return hasattr(tensor, "full_tensor")


def set_gradient_sync(model: Any, *, on: bool) -> None:
    """Decides whether the next backward pass sums up the gradients of spread parameters: the last of a step does."""
    model.set_requires_gradient_sync(on)


def shares(model: nn.Module) -> tuple[int, int]:
    """Returns how many parameters of `model` are spread, and how many bytes of them lie on this process."""
    spread: list[Any] = [parameter for parameter in model.parameters() if is_spread(parameter)]
    return len(spread), sum(parameter.to_local().nbytes for parameter in spread)


def whole(tensor: Any) -> Tensor:
    """Returns `tensor` in full; where it is spread, every process must ask for it."""
    found: Tensor = tensor.full_tensor() if is_spread(tensor) else tensor
    return found


def like(tensor: Tensor, other: Any) -> Tensor:
    """Returns `tensor`, the same on every process, spread as `other` is, if it is and has the same shape."""
    if not is_spread(other) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed = tensor.to(other.device, other.dtype)
    return distribute_tensor(placed, other.device_mesh, other.placements, src_data_rank=None)
