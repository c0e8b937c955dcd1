"""A recipe's section `quantization` against its model and method: what is held in 4 bits, and what cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peftcli import models, quantization, targets
from peftcli.errors import RecipeError
from peftcli.quantization import Packing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from peftcli.methods._protocol import Method, MethodConfig
    from peftcli.recipe import QuantizationSection
    from peftcli.reporting import Reporter
    from peftcli.run.opening import Base


def check_quantization(
    section: QuantizationSection | None, model: PreTrainedModel, method: type[Method], config: MethodConfig
) -> None:
    """Raises a RecipeError where `model` has nothing to hold in 4 bits, or the method trains what would be."""
    if section is None:
        return
    paths = quantization.packable(model, targets.always_dense(model))
    if not paths:
        raise RecipeError(
            "quantization: this model has no linear layers to hold in 4 bits; GPT-2's, say, are of another kind",
            hint="remove the section, or choose another model",
        )
    trained = [path for path in paths if method.trains(config, f"{path}.weight", model.get_submodule(path))]
    if trained:
        name = type(config).model_fields["type"].default
        raise RecipeError(
            f"quantization: {name} trains weights, such as {trained[0]}'s, and weights of 4 bits cannot be trained: "
            "a step is far smaller than the distance between two of their values",
            hint="remove the section, or set method.type to lora, which trains beside them",
        )


def pack(
    model: PreTrainedModel, base: Base, fresh: Sequence[str], device: torch.device, reporter: Reporter | None
) -> PreTrainedModel:
    """Returns `model`, whose parameters `fresh` start anew, on `device` with its linear layers packed as `base` says.

    They are packed one by one as they go there: the device may have no room for all of them as they are.
    """
    section = base.quantization
    assert section is not None
    dense = targets.always_dense(model, [*base.dense, *(name.rpartition(".")[0] for name in fresh)])
    count = quantization.quantize(model, section, dense, device)
    if reporter is not None:
        computed = str(quantization.compute_dtype(section, device)).removeprefix("torch.")
        reporter.note(f"{count} linear layers are held in {section.type}, computed in {computed}")
    placed: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return placed


def packing_of(base: Base, model: PreTrainedModel) -> Packing | None:
    """Returns which layers of `model`, which needs no weights, are packed on a CPU; None where the base is dense."""
    if base.quantization is None:
        return None
    paths = quantization.packable(model, targets.always_dense(model, base.dense))
    dtype = models.resolve_dtype(base.section, base.config, torch.device("cpu"))
    return Packing(base.quantization, tuple(paths), dtype)
