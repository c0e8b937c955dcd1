"""A recipe's section `quantization` against its model and method: what is packed, and what cannot be."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from peftcli import models, quantization, targets
from peftcli.errors import Problem, RecipeError, did_you_mean
from peftcli.quantization import Packing

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from peftcli.methods._protocol import Method, MethodConfig
    from peftcli.recipe import QuantizationSection
    from peftcli.reporting import Reporter
    from peftcli.run.opening import Base


def check_quantization(
    section: QuantizationSection | None, model: PreTrainedModel, method: type[Method], config: MethodConfig
) -> None:
    """Raises a RecipeError where `model` has nothing to pack or to skip, or the method trains what would be packed."""
    if section is None:
        return
    paths = packed_paths(model, section)
    if not paths:
        raise RecipeError(
            f"quantization: this model has no linear layers to hold in {section.type}; GPT-2's, say, are of another "
            "kind",
            hint="remove the section, or choose another model",
        )
    trained = [path for path in paths if method.trains(config, f"{path}.weight", model.get_submodule(path))]
    if trained:
        name = type(config).model_fields["type"].default
        raise RecipeError(
            f"quantization: {name} trains weights, such as {trained[0]}'s, and weights in {section.type} cannot be "
            "trained: a step is far smaller than the distance between two of their values",
            hint="remove the section, or set method.type to lora, which trains beside them",
        )


def packed_paths(model: nn.Module, section: QuantizationSection, dense: Collection[str] = ()) -> list[str]:
    """Returns the paths of the layers that are packed; works on the meta device.

    Args:
        model: The base model.
        section: What the recipe says.
        dense: Paths, or their ends, of modules that stay dense beside those of the section and the heads.

    Raises:
        RecipeError: `skip_modules` names what is no linear layer; all such names are listed.
    """
    return quantization.packable(model, _kept(model, section, dense))


def _kept(model: nn.Module, section: QuantizationSection, dense: Collection[str]) -> set[str]:
    """Returns the paths of modules that stay dense."""
    problems: list[Problem] = []
    skipped = set(_skipped(model, section.skip_modules, problems))
    if problems:
        raise RecipeError.of(problems)
    return skipped | targets.always_dense(model, dense)


def _skipped(model: nn.Module, wanted: str | list[str] | None, problems: list[Problem]) -> Iterator[str]:
    """Yields the linear layers in the modules that `wanted` names; notes each name that has none."""
    linear = quantization.packable(model)
    modules = [name for name, _ in model.named_modules() if name]
    for entry in [wanted] if isinstance(wanted, str) else wanted or ():
        try:
            test = targets.path_test(entry, is_pattern=isinstance(wanted, str) and targets.is_path_pattern(entry))
        except re.error as error:
            problems.append(Problem(f'quantization.skip_modules: "{entry}" is not a regular expression: {error}'))
            continue
        named = [name for name in modules if test.fullmatch(name)]
        found = [path for path in linear if any(f"{path}.".startswith(f"{name}.") for name in named)]
        if not found:
            message = f'quantization.skip_modules: no linear layer matches "{entry}"'
            leaves = sorted({path.rpartition(".")[2] for path in linear})
            guess = did_you_mean(entry, leaves)
            listing = f"the model's linear layers are {', '.join(leaves)}"
            problems.append(Problem(message, hint=f"{guess} {listing}" if guess else listing))
        yield from found


def pack(
    model: PreTrainedModel, base: Base, fresh: Sequence[str], device: torch.device, reporter: Reporter | None
) -> PreTrainedModel:
    """Returns `model`, whose parameters `fresh` start anew, on `device` with its linear layers packed as `base` says.

    They are packed one by one as they go there: the device may have no room for all of them as they are.
    """
    section = base.quantization
    assert section is not None
    dense = [*base.dense, *(name.rpartition(".")[0] for name in fresh)]
    count = quantization.quantize(model, section, _kept(model, section, dense), device)
    if reporter is not None:
        reporter.note(_said(model, count, section, device))
    placed: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return placed


def _said(model: nn.Module, count: int, section: QuantizationSection, device: torch.device) -> str:
    """Returns what is packed, in a sentence: experts, say, may be no linear layers, and most of the weights."""
    share = f"{100 * quantization.packed_share(model):.0f} % of the base's weights"
    how = f"computed in {str(quantization.compute_dtype(section, device)).removeprefix('torch.')}"
    if section.type == "int8":
        how = "which rounds their inputs too" + (", but in training on a CPU" if device.type == "cpu" else "")
    return f"{count} linear layers, {share}, are held in {section.type}, {how}"


def packing_of(base: Base, model: PreTrainedModel) -> Packing | None:
    """Returns which layers of `model`, which needs no weights, are packed on a CPU; None where the base is dense."""
    if base.quantization is None:
        return None
    dtype = models.resolve_dtype(base.section, base.config, torch.device("cpu"))
    return Packing(base.quantization, tuple(packed_paths(model, base.quantization, base.dense)), dtype)
