"""Adapter folders in PEFT's own format: `adapter_config.json` and `adapter_model.safetensors`.

Written so that PEFT and vLLM load them as they are; read strictly, whoever wrote them. A tensor that is missing, left
over, of another shape or not finite is an error, as is a setting that this version does not have: loaded halfway, an
adapter would be another model without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from peftcli import files, inject, methods
from peftcli.errors import ModelError, PeftcliError
from peftcli.methods._protocol import Method, Site, Targets

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY_PREFIX = "base_model.model."

TARGET_FIELDS = {"target_modules", "exclude_modules", "layers_to_transform"}
FACT_FIELDS = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}
INERT_FIELDS = {"auto_mapping", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"}
"""Fields of PEFT's that change nothing about what an adapter computes once it is trained, whatever their value."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "eva_", "lora_ga", "mica")
"""Starts of `init_lora_weights` values whose adapters belong to a base that PEFT has altered, not to the one named."""


@dataclass(frozen=True)
class Adapter:
    """An adapter folder's content, read and checked for itself, not yet against a model.

    Attributes:
        folder: Where it was read.
        method: The method's class.
        config: The method's Config, targets included.
        base_model: The name or path of the base model it was trained on, if the file tells.
        tensors: The tensors by their key on file.
    """

    folder: Path
    method: type[Method]
    config: Targets
    base_model: str | None
    tensors: dict[str, Tensor]


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns all adapters' tensors under their keys on file."""
    return {
        f"{KEY_PREFIX}{path}.{suffix}": tensor.detach()
        for path, adapter in inject.adapters(model).items()
        for suffix, tensor in adapter.peft_tensors().items()
    }


def save_adapter(folder: Path, model: nn.Module, config: Targets, base_model: str, revision: str | None) -> None:
    """Writes the model's adapters into the existing `folder`, reads them again and compares.

    Raises:
        HostError: The folder cannot be written.
        ModelError: What was read is not what was meant to be written.
    """
    tensors = adapter_tensors(model)
    sites = list(inject.adapters(model))
    method = type(next(iter(inject.adapters(model).values())))
    fields = {
        "peft_type": method.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "target_modules": target_names(model, sites),
        "modules_to_save": None,
        **method.peft_config(config),
    }
    files.write_safetensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    files.write_json(folder / CONFIG_FILE, fields)
    _verify_saved(folder / WEIGHTS_FILE, tensors)


def _verify_saved(path: Path, tensors: Mapping[str, Tensor]) -> None:
    read = load_file(path)
    if set(read) != set(tensors) or not all(torch.equal(read[key], tensors[key].cpu()) for key in tensors):
        raise ModelError(f"{path}: what was read back differs from the adapter in memory", hint="check the disk")


def target_names(model: nn.Module, sites: Iterable[str]) -> list[str]:
    """Returns the shortest list of `target_modules` that chooses exactly `sites`: leaf names where they suffice.

    Leaf names are what vLLM and people expect; whole paths are the fallback.
    """
    wanted = set(sites)
    leaves = {name.rpartition(".")[2] for name in wanted}
    chosen = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    return sorted(leaves if chosen == wanted else wanted)


def read_adapter(folder: Path) -> Adapter:
    """Returns the adapter in `folder`.

    Raises:
        ModelError: A file is missing or damaged, or asks for something that this version does not have.
    """
    fields = _read_config(folder)
    method = _method_of(fields, folder)
    return Adapter(folder, method, _config_of(method, fields, folder), _base_of(fields), _read_tensors(folder))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = "there is no such folder" if not folder.is_dir() else f"it has no {CONFIG_FILE}"
        raise ModelError(
            f"{folder} is not an adapter: {what}", hint=f"an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path} cannot be read: expected a JSON object")
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


def _config_of(method: type[Method], fields: Mapping[str, Any], folder: Path) -> Targets:
    path = folder / CONFIG_FILE
    unknown = _unsupported(method, fields)
    if unknown:
        raise ModelError(
            f"{path}: the adapter uses {', '.join(unknown)}, which this version does not have",
            hint="without them it would be another model; merge it with the tool that trained it",
        )
    try:
        config = method.config_from_peft(fields)
        layers = fields.get("layers_to_transform")
        targets = {
            "target_modules": fields["target_modules"],
            "exclude_modules": fields.get("exclude_modules"),
            "layers": [layers] if isinstance(layers, int) else layers or None,  # to PEFT, no layers mean all
        }
        checked: Targets = config.model_validate({**config.model_dump(), **targets})
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except KeyError as error:
        raise ModelError(f"{path}: {error.args[0]} is missing") from error
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    return checked


def _unsupported(method: type[Method], fields: Mapping[str, Any]) -> list[str]:
    """Returns the settings in `fields` that would change the adapter and that `method` does not have."""
    read = set(method.peft_config(method.Config.model_validate({}))) | TARGET_FIELDS | FACT_FIELDS | INERT_FIELDS
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


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        hint = f"{pickled[0]} is a pickle and is never read; convert it to safetensors" if pickled else None
        raise ModelError(f"{folder} is not an adapter: it has no {WEIGHTS_FILE}", hint=hint)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged: {error}", hint="restore it from a backup or a checkpoint") from error


def attach(model: nn.Module, adapter: Adapter) -> list[Site]:
    """Grafts `adapter` onto `model` with its tensors and returns the sites.

    Raises:
        ModelError: The adapter does not fit the model, or its tensors do not fit its configuration.
    """
    sites = _graft(model, adapter)
    where = str(adapter.folder / WEIGHTS_FILE)
    load_tensors(model, _without_base_copies(model, adapter.tensors, where), where)
    return sites


def require_fit(skeleton: nn.Module, adapter: Adapter) -> list[Site]:
    """Returns the sites of `adapter` in `skeleton`, the base model on the meta device, once all its tensors fit.

    Raises:
        ModelError: As `attach`; but base weights in the adapter's file are not compared, as there are none here.
    """
    weights = dict(skeleton.named_parameters(remove_duplicate=False))
    sites = _graft(skeleton, adapter)
    own = {key: tensor for key, tensor in adapter.tensors.items() if _base_name(key) not in weights}
    _require_same_shapes(adapter_tensors(skeleton), own, str(adapter.folder / WEIGHTS_FILE))
    inject.ungraft(skeleton)
    return sites


def _graft(model: nn.Module, adapter: Adapter) -> list[Site]:
    try:
        return inject.graft(model, adapter.method, adapter.config, seed=0)
    except PeftcliError as error:
        listing = "; ".join(problem.message for problem in error.problems)
        raise ModelError(f"{adapter.folder} does not fit this base model: {listing}") from error


def _base_name(key: str) -> str:
    """Returns the base parameter that a key on file is of, if it is of one."""
    return key.removeprefix(KEY_PREFIX).replace(".base_layer.", ".")


def _without_base_copies(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns `tensors` less the frozen base weights that PEFT adds to a file whose adapters sit on embeddings.

    Raises:
        ModelError: Such a weight is not the base model's.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    kept = {}
    for key, tensor in tensors.items():
        name = _base_name(key)
        if name not in weights:
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
        adapter.load_peft_tensors(
            {suffix: tensors[f"{KEY_PREFIX}{path}.{suffix}"] for suffix in adapter.peft_tensors()}
        )


def _require_same_shapes(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str) -> None:
    wrong = [f"{key} is missing" for key in expected if key not in tensors]
    wrong += [f"{key} belongs to no adapted module" for key in tensors if key not in expected]
    for key in expected.keys() & tensors.keys():
        wrong += _misfit(key, expected[key], tensors[key])
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ModelError(
            f"{where}: {'; '.join(sorted(wrong)[:10])}{more}",
            hint="the file, its adapter_config.json and the base model must belong together",
        )


def _misfit(key: str, expected: Tensor, found: Tensor) -> list[str]:
    if found.shape != expected.shape:
        return [f"{key} has shape {list(found.shape)}, not {list(expected.shape)}"]
    if not found.is_floating_point():
        return [f"{key} holds {found.dtype}, not floating-point numbers"]
    return [] if bool(torch.isfinite(found).all()) else [f"{key} holds values that are not finite"]
