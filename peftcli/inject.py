"""Puts adapters into a model and takes them out again.

An adapter is *grafted*: the module's class is swapped, in place, for one that derives from it and passes its forward
through the adapter. The module object, its `isinstance`, its `.weight` and its state-dict keys stay what they were, so
nothing in transformers, PEFT or a checkpoint notices. (FSDP2's `fully_shard` does the same, for the same reasons.)

The order is fixed: load → quantise → graft → prepare or shard → compile.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.errors import ModelError, Problem, RecipeError
from peftcli.methods._place import Site
from peftcli.methods._protocol import Method, MethodConfig, Part, Shared
from peftcli.ops.sharing import SharedInput
from peftcli.quantization import is_quantised
from peftcli.sites import as_base, original_class
from peftcli.targets import find_sites, is_under, task_heads

ADAPTER = "adapter"
"""The attribute, and so the state-dict prefix, under which a grafted module holds its adapter."""
SHARED = "shared_adapter"
"""The attribute of the model that holds what all adapters share."""


class Graft(nn.Module):
    """What a grafted module is beside its own class: one that goes through an adapter."""

    adapter: Method
    grafted_from: type[nn.Module]


@cache
def _grafted_class(original: Any) -> Any:
    """Returns the class whose forward goes through the adapter and which is `original` in all else.

    Its forward has the original's signature: transformers asks models for the names of their arguments.
    """

    @functools.wraps(original.forward)
    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        return self.adapter(as_base(self, partial(original.forward, self)), *arguments, **named)

    members = {"forward": forward, "grafted_from": original, "__module__": original.__module__}
    return type(f"Grafted{original.__name__}", (Graft, original), members)


def _swap_in(module: nn.Module) -> None:
    """Gives `module`, which holds its adapter already, the class whose forward goes through it."""
    module.__class__ = _grafted_class(type(module))  # type: ignore[arg-type]


def graft(
    model: nn.Module,
    method: type[Method],
    config: MethodConfig,
    seed: int,
    trained: Collection[str] = (),
    unchecked: Collection[str] = (),
) -> list[Site]:
    """Freezes `model`, grafts a new adapter of `method` at each site that `config` chooses, and returns the sites.

    Beside the adapters train the task's head, the base parameters that the method trains, and those in `trained`.

    Args:
        model: The base model.
        method: The method.
        config: Its checked fields.
        seed: Decides the adapters' random start.
        trained: Paths, or their ends, of further modules whose parameters train.
        unchecked: Fields that may be what no recipe should ask for, because a file has them so.

    Raises:
        RecipeError: The targets or the method's own checks fail.
        ModelError: A module is already grafted, or its forward has been replaced by something else.
    """
    sites = _sharing_inputs(find_sites(model, method, config))
    check(method, config, sites, model, unchecked)
    modules = [model.get_submodule(site.name) for site in sites]
    for site, module in zip(sites, modules, strict=True):
        _refuse_ungraftable(site.name, module)
    model.requires_grad_(False)
    shared = method.shared(config, sites, seed)
    for site, module in zip(sites, modules, strict=True):
        adapter = method(config, site, seed, shared)
        adapter.train(module.training)
        module.add_module(ADAPTER, adapter)
        _swap_in(module)
    _unfreeze(model, method, config, [*task_heads(model), *trained])
    if shared is not None:
        model.add_module(SHARED, shared)
    return sites


def _sharing_inputs(sites: list[Site]) -> list[Site]:
    """Returns `sites` with one `shared_input` for all of a parent module."""
    shared: defaultdict[str, SharedInput] = defaultdict(SharedInput)
    return [replace(site, shared_input=shared[site.name.rpartition(".")[0]]) for site in sites]


def _unfreeze(model: nn.Module, method: type[Method], config: MethodConfig, trained: Collection[str]) -> None:
    """Lets the base parameters train that the method, the task's head or `trained` names."""
    own = _part_parameters(model)
    for name, parameter, owner in _owned_parameters(model):
        if id(parameter) not in own and (
            any(is_under(name, one) for one in trained) or method.trains(config, name, owner)
        ):
            _refuse_packed(name, parameter, owner)
            parameter.requires_grad_(True)


def _refuse_packed(name: str, parameter: nn.Parameter, owner: nn.Module) -> None:
    """Raises a ModelError where `parameter` is packed: torch would let one train that is stored as floats."""
    if is_quantised(owner) and parameter is owner.weight:
        raise ModelError(
            f"{name} is packed, and what is packed cannot train",
            hint="keep its layer dense with quantization.skip_modules",
        )


def _owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """Yields every parameter with its full name and the module that holds it; a shared one once for each holder."""
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            yield f"{path}.{leaf}" if path else leaf, parameter, module


def _refuse_ungraftable(name: str, module: nn.Module) -> None:
    if isinstance(module, Graft):
        raise ModelError(f"{name or 'the model'} has an adapter already")
    if "forward" in vars(module):
        raise ModelError(
            f"{name or 'the model'}: its forward was replaced on the instance, so an adapter would have no effect",
            hint="load the model without device_map or other hooks before adapting it",
        )


def check(
    method: type[Method],
    config: MethodConfig,
    sites: list[Site],
    model: nn.Module,
    unchecked: Collection[str] = (),
) -> None:
    """Raises a RecipeError with all that is wrong with `config`, but for `unchecked` fields; needs no weights."""
    messages = [*method.check(config, sites), *method.check_model(config, model)]
    problems = [Problem(f"method.{message}") for message in messages if message.partition(":")[0] not in unchecked]
    if problems:
        raise RecipeError.of(problems)


def ungraft(model: nn.Module) -> None:
    """Takes every adapter out of `model`: classes and keys are again what they were before `graft`."""
    for _, module in list(grafted_modules(model)):
        module.__class__ = original_class(module)  # type: ignore[assignment]
        delattr(module, ADAPTER)
    if hasattr(model, SHARED):
        delattr(model, SHARED)


def grafted_modules(model: nn.Module) -> Iterator[tuple[str, Graft]]:
    """Yields the path and module of each grafted module, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, Graft):
            yield name, module


def adapters(model: nn.Module) -> dict[str, Method]:
    """Returns the adapters by the path of the module that each adapts."""
    return {name: module.adapter for name, module in grafted_modules(model)}


def shared_part(model: nn.Module) -> Shared | None:
    """Returns what all adapters of `model` share, or None where they share nothing."""
    return getattr(model, SHARED, None)


def see(model: nn.Module, task_ids: Tensor | None) -> None:
    """Tells the adapters of `model` which task each sample of the next forward pass is of; see `Shared.see`."""
    shared = shared_part(model)
    if shared is not None:
        shared.see(task_ids)


def parts(model: nn.Module) -> dict[str, Part]:
    """Returns all modules of adapter tensors, the shared one included, by their own path in the model."""
    found: dict[str, Part] = {
        f"{path}.{ADAPTER}" if path else ADAPTER: adapter for path, adapter in adapters(model).items()
    }
    shared = shared_part(model)
    return found if shared is None else {**found, SHARED: shared}


def _part_parameters(model: nn.Module) -> set[int]:
    return {id(parameter) for part in parts(model).values() for parameter in part.parameters()}


def trained_base(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the base's own parameters that train, by name: a task's head, and what the method says."""
    own = _part_parameters(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in own
    }


def trains_base(model: nn.Module, method: type[Method], config: MethodConfig) -> bool:
    """Returns whether parameters of the base itself train, which then must not be held in half precision."""
    return any(method.trains(config, name, owner) for name, _, owner in _owned_parameters(model))


def widen_trained(model: nn.Module) -> None:
    """Holds the base's parameters that train in float32 where they came in half precision, which rounds steps away."""
    for parameter in trained_base(model).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of the task's head, by name; none for a language model."""
    heads = task_heads(model)
    return {name: parameter for name, parameter in model.named_parameters() if any(is_under(name, h) for h in heads)}
