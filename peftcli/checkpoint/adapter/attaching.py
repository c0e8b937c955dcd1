"""Puts an adapter that was read onto a model: every tensor has its place, and every place its tensor."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from peftcli import inject, sharding
from peftcli.checkpoint.adapter.format import (
    BASE_PREFIX,
    MISREAD,
    SHARED_PREFIX,
    TOGETHER,
    WEIGHTS_FILE,
    Adapter,
    adapter_tensors,
    base_prefix,
    is_finite,
)
from peftcli.errors import ModelError, PeftcliError, Problem
from peftcli.methods._place import Site
from peftcli.targets import is_under

PEFT_HEADS = {"classifier", "score"}
"""What PEFT lists in `modules_to_save` of every labelling model, whichever of them it has."""


def attach(model: nn.Module, adapter: Adapter) -> list[Site]:
    """Grafts `adapter` onto `model` with its tensors and returns the sites.

    Raises:
        ModelError: The adapter does not fit the model, or its tensors do not fit its configuration.
    """
    sites = _graft(model, adapter)
    where = str(adapter.folder / WEIGHTS_FILE)
    load_tensors(model, _without_base_copies(model, adapter.tensors, where), where)
    return sites


def require_fit(skeleton: nn.Module, adapter: Adapter) -> tuple[list[Site], list[str]]:
    """Returns the sites of `adapter` in `skeleton`, the base model on the meta device, once all its tensors fit.

    Returned with them: the names of the base's parameters that the adapter replaces.

    Raises:
        ModelError: As `attach`; but base weights in the adapter's file are not compared, as there are none here.
    """
    weights = dict(skeleton.named_parameters(remove_duplicate=False))
    sites = _graft(skeleton, adapter)
    expected = adapter_tensors(skeleton)
    own = {key: tensor for key, tensor in adapter.tensors.items() if key in expected or _base_name(key) not in weights}
    _require_same_shapes(expected, own, str(adapter.folder / WEIGHTS_FILE))
    trained = list(inject.trained_base(skeleton))
    inject.ungraft(skeleton)
    return sites, trained


def _graft(model: nn.Module, adapter: Adapter) -> list[Site]:
    where = f"{adapter.folder} does not fit this base model"
    lost = _unknown_modules(model, adapter.trained)
    if lost:
        raise ModelError(f"{where}: modules_to_save: no module matches {', '.join(lost)}", hint=TOGETHER)
    try:
        # A rank beyond a module's sides is wasteful, not wrong: PEFT trains them, and PiSSA's is stored twice as large.
        return inject.graft(model, adapter.method, adapter.config, 0, adapter.trained, unchecked=("r",))
    except PeftcliError as error:
        found = (Problem(f"{where}: {one.message}", hint=one.hint or TOGETHER) for one in error.problems)
        raise ModelError.of(found) from error
    except (RuntimeError, *MISREAD) as error:  # sizes that torch cannot make
        raise ModelError(f"{where}: {str(error).splitlines()[0]}", hint=TOGETHER) from error


def _unknown_modules(model: nn.Module, trained: Collection[str]) -> list[str]:
    """Returns those of `trained` that name nothing in `model`."""
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    known = {one for one in trained if any(is_under(name, one) for name in names)}
    return sorted({*trained} - known - (PEFT_HEADS if known & PEFT_HEADS else set()))


def _base_name(key: str) -> str:
    """Returns the base parameter that a key on file is of, if it is of one."""
    return key.removeprefix(BASE_PREFIX).replace(".base_layer.", ".")


def _without_base_copies(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns `tensors` less the frozen base weights that PEFT adds to a file whose adapters sit on embeddings.

    Raises:
        ModelError: Such a weight is not the base model's.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    expected = adapter_tensors(model)
    kept = {}
    for key, tensor in tensors.items():
        name = _base_name(key)
        if key in expected or name not in weights:
            kept[key] = tensor
        elif not torch.equal(tensor.to(weights[name]), weights[name]):
            raise ModelError(
                f"{where}: {key} holds base weights other than this base model's",
                hint="the adapter was trained on another base, or with these weights unfrozen",
            )
    return kept


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copies `tensors`, named by their keys on file, into the model's adapters; all of them must fit.

    Raises:
        ModelError: A tensor is missing, left over, of another shape or not finite; up to ten are named.
    """
    _require_same_shapes(adapter_tensors(model), tensors, where)
    for path, adapter in inject.adapters(model).items():
        adapter.load_peft_tensors({name: tensors[adapter.peft_key(path, name)] for name in adapter.peft_tensors()})
    shared = inject.shared_part(model)
    if shared is not None:
        shared.load_peft_tensors({name: tensors[SHARED_PREFIX + name] for name in shared.peft_tensors()})
    prefix = base_prefix(model)
    with torch.no_grad():
        for name, parameter in inject.trained_base(model).items():
            parameter.copy_(sharding.like(tensors[prefix + name], parameter))


def _require_same_shapes(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    wrong = [f"{key} is missing" for key in expected if key not in tensors]
    wrong += [f"{key} belongs to no adapted module" for key in tensors if key not in expected]
    for key in expected.keys() & tensors.keys():
        wrong += _misfit(key, expected[key], tensors[key])
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ModelError(
            f"{where}: {'; '.join(sorted(wrong)[:10])}{more}",
            hint=TOGETHER,
        )


def _misfit(key: str, expected: Tensor, found: Tensor) -> list[str]:
    if found.shape != expected.shape:
        return [f"{key} has shape {list(found.shape)}, not {list(expected.shape)}"]
    if not found.is_floating_point():
        return [f"{key} holds {found.dtype}, not floating-point numbers"]
    return [] if is_finite(found) else [f"{key} holds values that are not finite"]
