"""What an optimizer, and a method beside its adapter, remember from step to step, as tensors for a file.

    <parameter>|<entry>     the optimizer's, such as `exp_avg`
    <name>|state            the method's, such as AdaLoRA's averages

Loading is strict both ways: an entry that is missing or foreign would make another run of the same checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftcli import inject, sharding
from peftcli.errors import ModelError

METHOD_STATE = "state"
_RESUME_HINT = "resume with the run's own recipe, and the versions in its manifest.json"


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the optimizer's state as `<parameter>|<entry>` → tensor, and the method's as `<name>|state`.

    No two of them share memory: bitsandbytes has one table of 8-bit values for all parameters, and safetensors
    refuses such tensors.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for parameter, state in optimizer.state.items():
        for entry, value in _entries(state).items():
            tensor = sharding.whole(torch.as_tensor(value))
            found[f"{names[parameter]}|{entry}"] = tensor.clone() if tensor.data_ptr() in taken else tensor
            taken.add(tensor.data_ptr())
    return found | {f"{name}|{METHOD_STATE}": tensor.detach() for name, tensor in method_state(model).items()}


def _entries(state: dict[str, Any]) -> dict[str, Any]:
    """Returns what an optimizer keeps for one parameter; SGD without momentum has an entry for it that is None."""
    return {entry: value for entry, value in state.items() if value is not None}


def method_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns what adapters need to go on training and do not save with themselves, by name in the model.

    That is their persistent buffers, such as AdaLoRA's averages, and parameters behind the saved ones, such as the
    network that makes a reparametrised prefix.
    """
    found = {}
    for path, part in inject.parts(model).items():
        saved = {tensor.data_ptr() for tensor in part.peft_tensors().values()}
        for name, tensor in part.state_dict(keep_vars=True).items():
            if tensor.data_ptr() not in saved:
                found[f"{path}.{name}"] = tensor
    return found


def load_optimizer_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    where: str,
    *,
    may_be_new: bool = False,
) -> None:
    """Puts back what `optimizer_tensors` returned.

    Args:
        model: The model.
        optimizer: An optimizer like the one that the tensors are from, over the same parameters.
        tensors: The tensors.
        where: The file that they are from, for messages.
        may_be_new: Whether there may be none of the optimizer's: it is then left as it is.

    Raises:
        ModelError: A tensor belongs to no parameter that trains, one is missing, or one is not of the kind that
            this optimizer keeps.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    own_state = method_state(model)
    found: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, tensor in tensors.items():
        name, _, entry = key.partition("|")
        if entry == METHOD_STATE and name in own_state:
            with torch.no_grad():
                own_state.pop(name).copy_(tensor)
        elif name in parameters:
            found[name][entry] = tensor
        else:
            raise ModelError(f"{where}: {name} is not a parameter that trains", hint=_RESUME_HINT)
    if own_state:
        raise ModelError(f"{where}: {next(iter(own_state))} is missing", hint=_RESUME_HINT)
    if may_be_new and not any(found.values()):
        return
    names = {parameter: name for name, parameter in parameters.items()}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            name = names[parameter]
            kept = _filled(_fresh_state(optimizer, group_index, index), found[name], f"{where}: {name}")
            if kept:  # SGD keeps nothing
                optimizer.state[parameter] = kept


def _fresh_state(optimizer: torch.optim.Optimizer, group_index: int, index: int) -> dict[str, Any]:
    """Returns the state that `optimizer` starts with for one of its parameters: right entries, shapes and places.

    torch's optimizers make theirs within a step, so one is done on a stand-in of zeros. bitsandbytes' have a function
    for it, whose pages only the optimizer itself may ask for.
    """
    group = optimizer.param_groups[group_index]
    parameter = group["params"][index]
    if hasattr(optimizer, "init_state"):
        optimizer.init_state(group, parameter, group_index, index)
        return _entries(optimizer.state[parameter])
    stand_in = nn.Parameter(torch.zeros_like(parameter))
    stand_in.grad = torch.zeros_like(stand_in)
    probe = type(optimizer)([{**group, "params": [stand_in]}])  # type: ignore[call-arg]  # the base class asks for more
    probe.step()
    return _entries(probe.state[stand_in])


def _filled(fresh: dict[str, Any], tensors: dict[str, Tensor], where: str) -> dict[str, Any]:
    """Returns `fresh` with the values of `tensors` in it.

    Raises:
        ModelError: They are not the same entries, of the same shapes and dtypes.
    """
    if fresh.keys() != tensors.keys():
        odd = sorted(fresh.keys() ^ tensors.keys())
        fault = "is missing" if odd[0] in fresh else "is not what this optimizer keeps"
        raise ModelError(f"{where}: the optimizer's {odd[0]} {fault}", hint=_RESUME_HINT)
    for entry, tensor in tensors.items():
        kept = torch.as_tensor(fresh[entry])
        if (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            theirs, ours = (f"{one.dtype} {list(one.shape)}" for one in (tensor, kept))
            raise ModelError(f"{where}: the optimizer's {entry} is {theirs}, not {ours}", hint=_RESUME_HINT)
        if isinstance(fresh[entry], Tensor):
            kept.copy_(sharding.like(tensor, kept))
        else:  # bitsandbytes counts its steps in a plain number
            fresh[entry] = tensor.item()
    return fresh
