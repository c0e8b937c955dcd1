"""Reads adapter folders strictly, whoever wrote them, each for itself: no model is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from peftcli import headers, methods
from peftcli.checkpoint import seal as seals
from peftcli.checkpoint.adapter.format import (
    CONFIG_FILE,
    MISREAD,
    TASK_TYPES,
    TOGETHER,
    WEIGHTS_FILE,
    Adapter,
    has_targets,
)
from peftcli.errors import ModelError
from peftcli.methods._protocol import Method, MethodConfig

TARGET_FIELDS = {"target_modules", "exclude_modules", "layers_to_transform", "modules_to_save"}
FACT_FIELDS = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}
INERT_FIELDS = {"auto_mapping", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"}
"""Fields of PEFT's that change nothing about what an adapter computes once it is trained, whatever their value."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "eva_", "lora_ga", "mica")
"""Starts of `init_lora_weights` values whose adapters belong to a base that PEFT has altered, not to the one named."""
_AGAIN = "restore it from a backup or a checkpoint, or get the adapter's files again"


def read_adapter(folder: Path) -> Adapter:
    """Returns the adapter in `folder`, with what its seal says against it.

    Raises:
        ModelError: A file is missing, damaged or not what its run wrote, or asks for something that this version does
            not have.
    """
    fields = read_config(folder)
    seal, doubts = seals.examine(folder, fields)
    try:
        found = _adapter_of(folder, fields)
    except ModelError as error:
        raise seals.with_doubts(error, doubts) from error
    return replace(found, seal=seal, doubts=tuple(doubts))


def _adapter_of(folder: Path, fields: Mapping[str, Any]) -> Adapter:
    method = _method_of(fields, folder)
    config = _config_of(method, fields, folder)
    try:
        tensors = method.tensors_from_peft(_tensors_of(folder), fields)
    except (KeyError, *MISREAD) as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} does not fit its {CONFIG_FILE}: {error}", hint=TOGETHER) from error
    return Adapter(folder, method, config, _base_of(fields), _trained_of(fields, folder), tensors)


def _trained_of(fields: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """Returns the modules that were trained in full."""
    found = fields.get("modules_to_save") or ()
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
        raise ModelError(f"{folder / CONFIG_FILE}: modules_to_save is not a list of names", hint=_AGAIN)
    return tuple(found)


def task_of(folder: Path) -> str:
    """Returns the recipe's `model.task` of the adapter in `folder`: causal-lm where its file names none."""
    named = read_config(folder).get("task_type")
    return next((task for task, name in TASK_TYPES.items() if name == named), "causal-lm")


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the fields of the `adapter_config.json` in `folder`.

    Raises:
        ModelError: There is none, or it is not a JSON object.
    """
    path = folder / CONFIG_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = "there is no such folder" if not folder.is_dir() else f"it has no {CONFIG_FILE}"
        raise ModelError(
            f"{folder} is not an adapter: {what}", hint=f"an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint=_AGAIN) from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path} cannot be read: expected a JSON object", hint=_AGAIN)
    return fields


def _method_of(fields: Mapping[str, Any], folder: Path) -> type[Method]:
    """Returns the method whose file this is: `peft_type`, and for LORA the flag that makes it a DoRA."""
    peft_type = fields.get("peft_type")
    if peft_type == "LORA":
        return methods.load("dora" if fields.get("use_dora") else "lora")
    for name in methods.names():
        method = methods.load(name)
        if method.peft_type == peft_type:
            return method
    raise ModelError(
        f"{folder / CONFIG_FILE}: peft_type {peft_type} is not a method of this version",
        hint=f"it has {', '.join(methods.names())}",
    )


def _config_of(method: type[Method], fields: Mapping[str, Any], folder: Path) -> MethodConfig:
    path = folder / CONFIG_FILE
    unknown = _unsupported(method, fields)
    if unknown:
        raise ModelError(
            f"{path}: the adapter uses {', '.join(unknown)}, which this version does not have",
            hint="without them it would be another model; merge it with the tool that trained it",
        )
    try:
        config = method.config_from_peft(fields)
        targets = _targets_from_peft(fields) if has_targets(method) else {}
        checked: MethodConfig = config.model_validate({**config.model_dump(), **targets})
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}", hint=_AGAIN) from error
    except KeyError as error:
        raise ModelError(f"{path}: {error.args[0]} is missing", hint=_AGAIN) from error
    except MISREAD as error:
        raise ModelError(f"{path} cannot be read: {error}", hint=_AGAIN) from error
    return checked


def _targets_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    layers = fields.get("layers_to_transform")
    return {
        "target_modules": fields["target_modules"],
        "exclude_modules": fields.get("exclude_modules"),
        "layers": [layers] if isinstance(layers, int) else layers or None,  # to PEFT, no layers mean all
    }


def _unsupported(method: type[Method], fields: Mapping[str, Any]) -> list[str]:
    """Returns the settings in `fields` that would change the adapter and that `method` does not have."""
    read = set(method.peft_config(method.Config.model_validate({}))) | method.own_peft_fields
    read |= TARGET_FIELDS | FACT_FIELDS | INERT_FIELDS
    found = [f"{key} = {value}" for key, value in fields.items() if key not in read and value]
    if fields.get("bias", "none") != "none":
        found.append(f"bias = {fields['bias']}")
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        found.append(f"init_lora_weights = {init} (its base is not the one it names)")
    return found


def _base_of(fields: Mapping[str, Any]) -> str | None:
    base = fields.get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def _tensors_of(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        hint = f"{pickled[0]} is a pickle and is never read; convert it to safetensors" if pickled else _AGAIN
        raise ModelError(f"{folder} is not an adapter: it has no {WEIGHTS_FILE}", hint=hint)
    return read_tensors(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file.

    Raises:
        ModelError: It is damaged, or not what an honest program writes.
    """
    try:
        headers.read(path)
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{path} is damaged: {error}", hint=_AGAIN) from error
