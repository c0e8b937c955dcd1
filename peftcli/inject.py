"""Puts adapters into a model and takes them out again.

An adapter is *grafted*: the module's class is swapped, in place, for one that derives from it and passes its forward
through the adapter. The module object, its `isinstance`, its `.weight` and its state-dict keys stay what they were, so
nothing in transformers, PEFT or a checkpoint notices. (FSDP2's `fully_shard` does the same, for the same reasons.)

The order is fixed: load → quantise → graft → prepare or shard → compile.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.errors import ModelError, Problem, RecipeError, did_you_mean
from peftcli.methods._protocol import Base, Kind, Method, Site, Targets

ADAPTER = "adapter"
"""The attribute, and so the state-dict prefix, under which a grafted module holds its adapter."""


class Graft(nn.Module):
    """What a grafted module's class has beside its own: the forward that goes through the adapter."""

    adapter: Method

    def forward(self, x: Tensor) -> Tensor:
        """Returns the adapter's output; the frozen forward is the one of the module's own class."""
        y: Tensor = self.adapter(as_base(self, super().forward), x)
        return y


@cache
def _grafted_class(original: Any) -> Any:
    return type(f"Grafted{original.__name__}", (Graft, original), {})


def _swap_in(module: nn.Module) -> None:
    """Gives `module`, which holds its adapter already, the class whose forward goes through it."""
    module.__class__ = _grafted_class(type(module))  # type: ignore[arg-type]


def _swap_out(module: nn.Module) -> None:
    """Gives `module` its own class back; its adapter stays but is not called."""
    module.__class__ = original_class(module)


def original_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that `module` has when it is not grafted."""
    return type(module).__mro__[2] if isinstance(module, Graft) else type(module)


def kind_of(module: nn.Module) -> Kind | None:
    """Returns how `module` stores its weight, or None where it is nothing that a weight-space method can adapt.

    A subclass that computes something else in its forward (a scaled embedding, say) is none of the three: merging
    into its weight would not be what the adapter did.
    """
    own_class: Any = original_class(module)
    if own_class.forward is nn.Linear.forward:
        return "linear"
    if own_class.forward is nn.Embedding.forward and getattr(module, "max_norm", None) is None:
        return "embedding"
    if own_class.__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's; not imported, to keep this file torch-only
        return "conv1d"
    return None


def as_base(module: Any, forward: Callable[[Tensor], Tensor]) -> Base:
    """Returns `module` as its method sees it; `forward` is the frozen one."""
    kind = kind_of(module)
    assert kind is not None
    bias: Tensor | None = getattr(module, "bias", None)
    project = partial(_project_ids if kind == "embedding" else _project, module, forward)
    return Base(kind, forward, bias, project, partial(dense_weight, module, kind))


def _project(module: Any, forward: Callable[[Tensor], Tensor], A: Tensor) -> Tensor:
    """Returns `W Aᵀ` [O, R] by feeding A's rows [R, I] through the frozen layer, in its own precision."""
    with torch.autocast(A.device.type, enabled=False):
        y = forward(A.to(module.weight.dtype) if module.weight.is_floating_point() else A)
    projected: Tensor = y if module.bias is None else y - module.bias
    return projected.t()


def _project_ids(module: Any, forward: Callable[[Tensor], Tensor], A: Tensor) -> Tensor:
    """Returns `W Aᵀ` [O, R] for an embedding, whose `W` is `weightᵀ`: rows of A [R, V] are no ids to look up."""
    projected: Tensor = A.to(module.weight.dtype) @ module.weight
    return projected.t()


def dense_weight(module: Any, kind: Kind) -> Tensor:
    """Returns `W` [O, I] of a module in float32 (float64 stays), detached."""
    weight: Tensor = module.weight.detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight if kind == "linear" else weight.t()


def make_site(name: str, module: nn.Module) -> Site:
    """Returns `module`, which must be of a kind that can be adapted, as a method may know it."""
    kind = kind_of(module)
    assert kind is not None
    weight: Tensor = module.weight  # type: ignore[assignment]
    if kind == "linear":
        out_features, in_features = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    else:
        in_features, out_features = weight.shape
    has_bias = getattr(module, "bias", None) is not None
    return Site(name, kind, in_features, out_features, has_bias, weight.device, partial(dense_weight, module, kind))


def find_sites(model: nn.Module, targets: Targets) -> list[Site]:
    """Returns the sites that `targets` choose in `model`, in the model's order. Works on the meta device.

    Raises:
        RecipeError: A name, pattern or layer matches nothing, or matches what cannot be adapted; all are listed.
    """
    modules = dict(model.named_modules())
    head = output_head(model)
    adaptable = {name: module for name, module in modules.items() if kind_of(module) is not None}
    problems: list[Problem] = []
    if targets.target_modules == "all-linear":
        chosen = {name for name, module in adaptable.items() if kind_of(module) != "embedding" and module is not head}
    else:
        chosen = _matching(targets.target_modules, "target_modules", modules, adaptable, problems)
    if targets.exclude_modules is not None:
        chosen -= _matching(targets.exclude_modules, "exclude_modules", modules, adaptable, problems)
    if targets.layers is not None and chosen:
        chosen = _in_layers(chosen, targets.layers, problems)
    if not chosen and not problems:
        problems.append(Problem("method.target_modules: nothing is left to adapt", hint=_candidates(adaptable)))
    if problems:
        raise RecipeError.of(problems)
    return [make_site(name, adaptable[name]) for name in adaptable if name in chosen]


def output_head(model: nn.Module) -> nn.Module | None:
    """Returns the module that maps hidden states to the vocabulary, or None where the model has none."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _matching(
    wanted: str | list[str],
    field: str,
    modules: dict[str, nn.Module],
    adaptable: dict[str, nn.Module],
    problems: list[Problem],
) -> set[str]:
    """Returns the adaptable modules that each entry of `wanted` matches; notes every entry that matches none."""
    chosen: set[str] = set()
    for entry in [wanted] if isinstance(wanted, str) else wanted:
        # One string with a character that no module path has is a pattern for the whole path; else it is a name.
        is_pattern = isinstance(wanted, str) and re.search(r"[^\w.]", entry) is not None
        try:
            test = re.compile(entry if is_pattern else rf"(.*\.)?{re.escape(entry)}")
        except re.error as error:
            problems.append(Problem(f'method.{field}: "{entry}" is not a regular expression: {error}'))
            continue
        matched = {name for name in modules if name and test.fullmatch(name)}
        if not matched:
            leaves = sorted({name.rpartition(".")[2] for name in adaptable})
            hint = did_you_mean(entry, leaves)
            listing = _candidates(adaptable)
            problems.append(
                Problem(f'method.{field}: no module matches "{entry}"', hint=f"{hint} {listing}" if hint else listing)
            )
        elif not matched & set(adaptable):
            kinds = sorted({type(modules[name]).__name__ for name in matched})
            problems.append(
                Problem(
                    f'method.{field}: "{entry}" matches only {", ".join(kinds)}, which cannot be adapted',
                    hint="name linear layers or plain embeddings; " + _candidates(adaptable),
                )
            )
        chosen |= matched & set(adaptable)
    return chosen


def _candidates(adaptable: Iterable[str]) -> str:
    """Returns the leaf names that could be named, with how many modules each has."""
    counts = Counter(name.rpartition(".")[2] for name in adaptable)
    return "the model has " + ", ".join(f"{leaf} ({count})" for leaf, count in counts.items())


def _in_layers(chosen: set[str], layers: list[int], problems: list[Problem]) -> set[str]:
    """Returns the chosen modules whose path's first number is one of `layers`; notes each layer that there is not."""
    numbered = {name: int(found[1]) for name in chosen if (found := re.search(r"(?:^|\.)(\d+)(?:\.|$)", name))}
    present = set(numbered.values())
    for layer in layers:
        if layer not in present:
            span = f"the adapted modules are in layers {min(present)} to {max(present)}" if present else None
            problems.append(Problem(f"method.layers: there is no layer {layer}", hint=span))
    return {name for name, layer in numbered.items() if layer in layers}


def graft(model: nn.Module, method: type[Method], config: Targets, seed: int) -> list[Site]:
    """Freezes `model`, grafts a new adapter of `method` at each site that `config` chooses, and returns the sites.

    Raises:
        RecipeError: The targets or the method's own checks fail.
        ModelError: A module is already grafted, or its forward has been replaced by something else.
    """
    sites = find_sites(model, config)
    check(method, config, sites)
    modules = [model.get_submodule(site.name) for site in sites]
    for site, module in zip(sites, modules, strict=True):
        _refuse_ungraftable(site.name, module)
    model.requires_grad_(False)
    for site, module in zip(sites, modules, strict=True):
        adapter = method(config, site, seed)
        adapter.train(module.training)
        module.add_module(ADAPTER, adapter)
        _swap_in(module)
    return sites


def _refuse_ungraftable(name: str, module: nn.Module) -> None:
    if isinstance(module, Graft):
        raise ModelError(f"{name} has an adapter already")
    if "forward" in vars(module):
        raise ModelError(
            f"{name}: its forward was replaced on the instance, so an adapter would have no effect",
            hint="load the model without device_map or other hooks before adapting it",
        )


def check(method: type[Method], config: Targets, sites: list[Site]) -> None:
    """Raises a RecipeError with all that is wrong with `config` at `sites`; needs no weights."""
    problems = [Problem(f"method.{message}") for message in method.check(config, sites)]
    if problems:
        raise RecipeError.of(problems)


def ungraft(model: nn.Module) -> None:
    """Takes every adapter out of `model`: classes, keys and outputs are again what they were before `graft`."""
    for _, module in list(grafted_modules(model)):
        _swap_out(module)
        delattr(module, ADAPTER)


def grafted_modules(model: nn.Module) -> Iterator[tuple[str, Graft]]:
    """Yields the path and module of each grafted module, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, Graft):
            yield name, module


def adapters(model: nn.Module) -> dict[str, Method]:
    """Returns the adapters by the path of the module that each adapts."""
    return {name: module.adapter for name, module in grafted_modules(model)}


class disabled:  # noqa: N801 - used as a context manager, like torch.no_grad
    """While entered, the grafted modules of `model` run their frozen forward alone: the base model, without a copy."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for _, module in grafted_modules(model)]

    def __enter__(self) -> None:
        for module in self._modules:
            _swap_out(module)

    def __exit__(self, *_: object) -> None:
        for module in self._modules:
            _swap_in(module)
