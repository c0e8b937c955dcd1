"""A recipe's section `quantization` against a checkpoint that comes packed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from peftcli import quantization
from peftcli.errors import Problem, RecipeError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from peftcli.recipe import QuantizationSection
    from peftcli.reporting import Reporter


def held(section: QuantizationSection | None, config: PretrainedConfig, name: str) -> QuantizationSection | None:
    """Returns how a model's layers are packed: as `section` says, unless the checkpoint comes packed.

    What they compute in, and in whose guise their bytes are held, is for the section to say in either case.

    Raises:
        ModelError: The checkpoint is packed in a way that is not known here.
    """
    stored = quantization.stored_section(config, name)
    if stored is None or section is None:
        return stored or section
    return stored.model_copy(update={key: getattr(section, key) for key in ("compute_dtype", "storage_dtype")})


def check_stored(section: QuantizationSection | None, config: PretrainedConfig, name: str) -> None:
    """Raises a RecipeError, with each such field, where `section` is not how a checkpoint that comes packed is."""
    stored = quantization.stored_section(config, name)
    if stored is None or section is None:
        return
    keys = ("type", *(("outlier_threshold",) if stored.type == section.type == "int8" else ()))
    keys += ("double_quant",) if section.type != "int8" != stored.type else ()
    wanted, found = section.model_dump(mode="json"), stored.model_dump(mode="json")
    problems = [
        Problem(
            f"quantization.{key}: {json.dumps(wanted[key])} does not go with model.name: {name}, whose weights come "
            f"packed with {key}: {json.dumps(found[key])}",
            hint=f"set {key} to that, or remove the section",
        )
        for key in keys
        if wanted[key] != found[key]
    ]
    if problems:
        raise RecipeError.of(problems)


def note_stored(config: PretrainedConfig, name: str, reporter: Reporter) -> None:
    """Says so where a checkpoint comes packed; for commands that do not load it."""
    stored = quantization.stored_section(config, name)
    if stored is not None:
        reporter.note(f"{name} comes packed: its linear layers are held in {stored.type}")
