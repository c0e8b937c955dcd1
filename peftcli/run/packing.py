"""A recipe's section `quantization` against its model and method: what is packed, and what cannot be."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from peftcli import models, quantization, targets
from peftcli.errors import HostError, ModelError, Problem, RecipeError, did_you_mean
from peftcli.quantization import Packing
from peftcli.run.prepacked import check_stored, held

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedModel

    from peftcli.methods._protocol import Method, MethodConfig
    from peftcli.recipe import ModelSection, QuantizationSection
    from peftcli.reporting import Reporter
    from peftcli.run.opening import Base


def check_quantization(
    section: QuantizationSection | None, model: PreTrainedModel, method: type[Method], config: MethodConfig
) -> None:
    """Raises a RecipeError where the recipe's section does not suit `model`, which may come packed, or the method.

    Raises:
        RecipeError: As said.
        ModelError: The model comes packed in a way that is not known here.
    """
    name = str(model.config.name_or_path)
    check_stored(section, model.config, name)
    how = held(section, model.config, name)
    if how is None:
        return
    paths = packed_paths(model, how)
    if quantization.stored_fields(model.config):
        _check_layers(section, model, paths)
    elif not paths:
        raise RecipeError(
            f"quantization: this model has no linear layers to hold in {how.type}"
            + (" beside those of skip_modules" if how.skip_modules else "; GPT-2's, say, are of another kind"),
            hint="remove the section, or choose another model",
        )
    trained = [path for path in paths if method.trains(config, f"{path}.weight", model.get_submodule(path))]
    if trained:
        method_name = type(config).model_fields["type"].default
        raise RecipeError(
            f"quantization: {method_name} trains weights, such as {trained[0]}'s, and weights in {how.type} cannot be "
            "trained: a step is far smaller than the distance between two of their values",
            hint="train a base that is not quantised, or set method.type to lora, which trains beside its weights",
        )


def _check_layers(section: QuantizationSection | None, model: PreTrainedModel, packed: list[str]) -> None:
    """Raises a PeftcliError where a model comes packed without linear layers, or with one that is to be skipped."""
    name = model.config.name_or_path
    if not packed:
        raise ModelError(
            f"model.name: {name} comes packed, but not its linear layers; GPT-2's, say, are of another kind",
            hint="name the model that it was made from",
        )
    wanted = sorted(_skipped_in(model, section) & set(packed)) if section is not None else []
    if wanted:
        raise RecipeError(
            f"quantization.skip_modules: {wanted[0]} comes packed with model.name: {name}",
            hint="remove it, or name the model that this one was made from",
        )


def packed_paths(model: PreTrainedModel, section: QuantizationSection, dense: Collection[str] = ()) -> list[str]:
    """Returns the paths of the layers that are packed; works on the meta device.

    Args:
        model: The base model.
        section: What the recipe says.
        dense: Paths, or their ends, of modules that stay dense beside those of the section and the heads.

    Raises:
        RecipeError: `skip_modules` names what is no linear layer; all such names are listed.
    """
    if quantization.stored_fields(model.config):
        heads = targets.task_heads(model)
        return [path for path in models.stored_packed(model) if not any(targets.is_under(path, one) for one in heads)]
    return quantization.packable(model, _kept(model, section, dense))


def _kept(model: nn.Module, section: QuantizationSection, dense: Collection[str]) -> set[str]:
    """Returns the paths of modules that stay dense."""
    return _skipped_in(model, section) | targets.always_dense(model, dense)


def _skipped_in(model: nn.Module, section: QuantizationSection) -> set[str]:
    """Returns the paths of the linear layers in the modules that `section` skips."""
    problems: list[Problem] = []
    found = set(_skipped(model, section.skip_modules, problems))
    if problems:
        raise RecipeError.of(problems)
    return found


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
    model: PreTrainedModel,
    base: Base,
    fresh: Sequence[str],
    device: torch.device,
    reporter: Reporter | None,
    home: torch.device,
) -> PreTrainedModel:
    """Returns `model`, whose parameters `fresh` start anew, on `home` with its linear layers packed as `base` says.

    They are packed one by one on `device`, where they will compute: it may have no room for all of them as they are.
    """
    section = base.quantization
    assert section is not None
    dense = [*base.dense, *(name.rpartition(".")[0] for name in fresh)]
    kept = _kept(model, section, dense)
    count = quantization.quantize(model, section, kept, device, home if home != device else None)
    left = quantization.packable(model, kept)
    if left:
        raise HostError(
            f"quantization: {len(left)} linear layers were to be held in {section.type} and are not, such as {left[0]}",
            hint="the installed bitsandbytes does not do what this version expects: see configs/constraints.txt",
        )
    if home.type == "cpu":
        _leave_the_file(model)
    if reporter is not None:
        reporter.note(_said(model, count, section, device))
    placed: PreTrainedModel = model.to(home)  # type: ignore[arg-type]
    return placed


def _leave_the_file(model: nn.Module) -> None:
    """Gives what stayed dense memory of its own.

    Weights are read by mapping their file, and as long as one tensor lies there, all of the file that was ever touched
    counts as the process's memory: each dense weight that was packed, beside its packed form.
    """
    packed = {id(module.weight) for module in model.modules() if quantization.is_quantised(module)}
    for parameter in model.parameters():
        if id(parameter) not in packed:
            parameter.data = parameter.data.clone()


def load_packed(
    base: Base,
    wanted: ModelSection,
    device: torch.device,
    seed: int,
    reporter: Reporter | None,
    home: torch.device,
) -> tuple[PreTrainedModel, list[str]]:
    """Returns a model that comes packed, on `home`, and the names of the parameters that start anew.

    Args:
        base: The model, opened.
        wanted: Its section, with the dtype of what is not packed.
        device: Where it will compute.
        seed: Decides the start of what starts anew.
        reporter: Where the note goes that says so.
        home: Where it lies for now.
    """
    section = base.quantization
    assert section is not None
    skeleton = models.skeleton(base.config, wanted.task)
    paths = packed_paths(skeleton, section)
    dense = set(quantization.packable(skeleton)) - set(paths)
    quantization.bitsandbytes()  # before transformers imports it, and lets it warn
    model, fresh = models.load_model(wanted, base.source, base.config, home, seed, dense)
    dtype = models.resolve_dtype(wanted, base.config, device)
    quantization.adopt(model, section, paths, dtype, device)
    if reporter is not None:
        reporter.note(f"{wanted.name} comes packed: {_said(model, len(paths), section, device)}")
    return model, fresh


def _said(model: nn.Module, count: int, section: QuantizationSection, device: torch.device) -> str:
    """Returns what is packed, in a sentence: experts, say, may be no linear layers, and most of the weights."""
    share = f"{100 * quantization.packed_share(model):.0f} % of the base's weights"
    how = f"computed in {str(quantization.compute_dtype(section, device)).removeprefix('torch.')}"
    if section.type == "int8":
        how = "which rounds their inputs too" + (", but in training on a CPU" if device.type == "cpu" else "")
    return f"{count} linear layers, {share}, are held in {section.type}, {how}"


def packing_of(base: Base, model: PreTrainedModel) -> Packing | None:
    """Returns which layers of `model`, which needs no weights, are packed on a CPU; None where the base is dense."""
    if base.quantization is None or base.comes_packed:
        return None
    dtype = models.resolve_dtype(base.section, base.config, torch.device("cpu"))
    return Packing(base.quantization, tuple(packed_paths(model, base.quantization, base.dense)), dtype)
