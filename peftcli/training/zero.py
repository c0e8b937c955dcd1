"""Spreads the frozen base over a run's processes with DeepSpeed's ZeRO-3.

    weight, any shape, on P processes: its n/P first numbers on the first, and so on; gathered for its module's passes

As with FSDP2, what trains is *not* handed over: it lies whole on each process, its gradients are added up by the run's
own `Processes`, and the recipe's optimizer steps. So methods, optimizers and checkpoints are what they are without
DeepSpeed, which sees a model that computes and never learns.

DeepSpeed takes every parameter that it finds. What trains is therefore taken out of the model while DeepSpeed looks at
it, whole modules at a time: one that holds trained and frozen parameters of its own is refused.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import nn

from peftcli import inject, sharding
from peftcli.errors import HostError, ModelError, Problem, RecipeError

if TYPE_CHECKING:
    from peftcli.training.zero_settings import ZeroSettings


def begin(settings: ZeroSettings, device: torch.device) -> None:
    """Makes DeepSpeed ready to compute on `device` among the run's processes, which are connected, and checks its file.

    Raises:
        HostError: It is not installed, or set up for another device.
        RecipeError: It does not understand the file.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for data
            import deepspeed
            from deepspeed import ops
            from deepspeed.accelerator import get_accelerator
            from deepspeed.utils import logger
    except ImportError as error:
        raise HostError(
            f"distributed.strategy: deepspeed needs the package deepspeed: {error}",
            hint="pip install 'peftcli[deepspeed]', or set distributed.strategy to fsdp2, which spreads the base too",
        ) from error
    for handler in logger.handlers:
        handler.setStream(sys.stderr)
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor", FutureWarning)  # torch's, about DeepSpeed's own calls
    if get_accelerator().device_name() != device.type:
        raise HostError(
            f"DeepSpeed is set up for {get_accelerator().device_name()}, and this run is on {device.type}",
            hint="unset DS_ACCELERATOR",
        )
    if device.type == "cpu":
        # It would compile, at its first start, an operation that serves inference alone.
        ops.__compatible_ops__ = defaultdict(bool)
    deepspeed.init_distributed()
    try:
        deepspeed.DeepSpeedConfig(settings.values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise RecipeError.of(Problem(f"DeepSpeed refuses {one}", str(settings.file)) for one in problems) from error
    except (ValueError, AssertionError) as error:
        raise RecipeError(f"DeepSpeed refuses this file: {error}", where=str(settings.file)) from error


def shard(model: nn.Module, settings: ZeroSettings, device: torch.device) -> str:
    """Spreads the base of `model`, grafted and on any device, and returns a sentence on what became of it.

    Every process must call it with the same model.

    Raises:
        ModelError: What trains cannot be told from what is spread.
    """
    import deepspeed

    trains = {parameter for parameter in model.parameters() if parameter.requires_grad}
    with _taken_out(model, trains), contextlib.redirect_stdout(sys.stderr):
        _refuse_mixed(model)
        for layer in sharding.layers(model):  # one by one, since all of them need not fit on the device
            layer.to(device)
            deepspeed.zero.Init(module=layer, config_dict_or_path=settings.values)
        _move_whole(model, device)
        deepspeed.initialize(model=model, config=settings.values)
    _move_whole(model, device)
    return _what_is_spread(model)


@contextlib.contextmanager
def _taken_out(model: nn.Module, trains: set[nn.Parameter]) -> Iterator[None]:
    """Holds the adapters, and the modules that train in full, out of `model` while entered."""
    apart = set(inject.parts(model).values())
    before = {module: dict(module._modules) for module in model.modules()}
    for parent, children in before.items():
        for name, child in children.items():
            own = set(child.parameters()) if child is not None else set()
            if child in apart or (own and own <= trains):
                del parent._modules[name]
    try:
        yield
    finally:
        for parent, children in before.items():
            parent._modules.clear()
            parent._modules.update(children)


def _refuse_mixed(model: nn.Module) -> None:
    """Raises a ModelError where something of `model`, from which adapters are taken out, trains or nothing is left."""
    mixed = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if mixed or not any(True for _ in model.parameters()):
        what = f"{mixed[0]} trains beside frozen weights of its module" if mixed else "no weight is frozen"
        raise ModelError(
            f"distributed.strategy: deepspeed spreads frozen modules, and {what}",
            hint="set distributed.strategy to fsdp2",
        )


def _move_whole(model: nn.Module, device: torch.device) -> None:
    """Moves to `device` what of `model` is not spread."""
    for parameter in model.parameters():
        if not _is_spread(parameter):
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        sharding.move_rest(module, device)


def _is_spread(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _what_is_spread(model: nn.Module) -> str:
    spread: list[Any] = [parameter for parameter in model.parameters() if _is_spread(parameter)]
    share = sum(parameter.ds_tensor.nbytes for parameter in spread)
    kept = sum(parameter.nbytes for parameter in model.parameters() if not _is_spread(parameter))
    small = sum(parameter.ds_numel * parameter.element_size() for parameter in spread if parameter.ds_persist)
    return (
        f"deepspeed: {len(spread)} tensors are spread, {share / 1e6:,.1f} MB of them on each process; "
        f"{kept / 1e6:,.1f} MB are not, and {small / 1e6:,.1f} MB are small tensors that stay once they are gathered"
    )
