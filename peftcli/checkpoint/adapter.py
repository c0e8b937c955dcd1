"""Adapter folders in PEFT's own format: `adapter_config.json` and `adapter_model.safetensors`.

Written so that PEFT and vLLM load them as they are; read strictly, whoever wrote them. A tensor that is missing, left
over, of another shape or not finite is an error, as is a setting that this version does not have: loaded halfway, an
adapter would be another model without a word.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from peftcli import files, headers, inject, methods, sharding
from peftcli.checkpoint import seal as seals
from peftcli.checkpoint.seal import Seal
from peftcli.errors import ModelError, NumericalError, PeftcliError, Problem
from peftcli.methods._protocol import Method, MethodConfig, Site, Targets
from peftcli.targets import is_under, task_heads

CONFIG_FILE = seals.CONFIG_FILE
WEIGHTS_FILE = seals.WEIGHTS_FILE
BASE_PREFIX = "base_model.model."
"""What comes before the name of a base parameter on file."""
SHARED_PREFIX = "base_model."
"""What comes before the name of a tensor that all adapters share."""
TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
}
"""PEFT's name of each `model.task` that it has a name for."""

TARGET_FIELDS = {"target_modules", "exclude_modules", "layers_to_transform", "modules_to_save"}
FACT_FIELDS = {"peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"}
INERT_FIELDS = {"auto_mapping", "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"}
"""Fields of PEFT's that change nothing about what an adapter computes once it is trained, whatever their value."""
PEFT_HEADS = {"classifier", "score"}
"""What PEFT lists in `modules_to_save` of every labelling model, whichever of them it has."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "eva_", "lora_ga", "mica")
"""Starts of `init_lora_weights` values whose adapters belong to a base that PEFT has altered, not to the one named."""

_AGAIN = "restore it from a backup or a checkpoint, or get the adapter's files again"
_TOGETHER = "adapter_model.safetensors, adapter_config.json and the base model must belong together"


# What comes of a value of another kind than a method's file has there.
_MISREAD = (TypeError, ValueError, AttributeError, IndexError, OverflowError)


@dataclass(frozen=True)
class Origin:
    """What an adapter's files say beside its tensors.

    Attributes:
        method: The method's class.
        config: Its Config.
        base_model: The base's name.
        revision: The base's revision.
        task: The recipe's `model.task`.
        fingerprint: That of the base's files; None where it could not be taken.
    """

    method: type[Method]
    config: MethodConfig
    base_model: str
    revision: str | None
    task: str
    fingerprint: str | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter folder's content, read and checked for itself, not yet against a model.

    Attributes:
        folder: Where it was read.
        method: The method's class.
        config: The method's Config, targets included.
        base_model: The name or path of the base model it was trained on, if the file tells.
        trained: Paths, or their ends, of the base's modules that were trained in full and are in the file.
        tensors: The tensors by their key on file.
        seal: What its files were when peftcli wrote them; None where it did not, or the seal is damaged.
        doubts: In what they are no longer that. Who uses the adapter must refuse it for these, or say them.
    """

    folder: Path
    method: type[Method]
    config: MethodConfig
    base_model: str | None
    trained: tuple[str, ...]
    tensors: dict[str, Tensor]
    seal: Seal | None = None
    doubts: tuple[Problem, ...] = ()


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns all that trains under its key on file: adapters, what they share, and parameters of the base."""
    found = {
        adapter.peft_key(path, name): tensor.detach()
        for path, adapter in inject.adapters(model).items()
        for name, tensor in adapter.peft_tensors().items()
    }
    found |= {SHARED_PREFIX + name: tensor.detach() for name, tensor in _shared_tensors(model).items()}
    prefix = base_prefix(model)
    trained = inject.trained_base(model).items()
    return found | {prefix + name: sharding.whole(tensor.detach()) for name, tensor in trained}


def base_prefix(model: nn.Module) -> str:
    """Returns what comes before the name of a base parameter in the file of the model's adapters.

    PEFT wraps the model once more where adapters sit in its modules than where something goes in front of its input.
    """
    in_front = any(adapter.place in ("input-embedding", "model") for adapter in inject.adapters(model).values())
    return SHARED_PREFIX if in_front else BASE_PREFIX


def _shared_tensors(model: nn.Module) -> dict[str, Tensor]:
    shared = inject.shared_part(model)
    return {} if shared is None else shared.peft_tensors()


@dataclass(frozen=True)
class Contents:
    """What an adapter's folder is to hold.

    Attributes:
        fields: Those of its `adapter_config.json`.
        tensors: Those of its `adapter_model.safetensors`.
        fingerprint: That of the base's files.
    """

    fields: dict[str, Any]
    tensors: dict[str, Tensor]
    fingerprint: str | None = None


def save_adapter(folder: Path, model: nn.Module, origin: Origin, *, resumable: bool = False) -> None:
    """Writes the model's adapters into the existing `folder`, reads them again and compares; see `contents`.

    Raises:
        HostError: The folder cannot be written.
        ModelError: What was read is not what was meant to be written.
        NumericalError: The adapter holds values that are not finite.
    """
    write_contents(folder, contents(model, origin, resumable=resumable))


def contents(model: nn.Module, origin: Origin, *, resumable: bool = False) -> Contents:
    """Returns what the folder of the model's adapters holds. With several processes, each must ask for it.

    Args:
        model: The model with its adapters.
        origin: What the files say beside the tensors.
        resumable: Hold tensors that training can go on from, where the method would save less of a finished adapter.

    Raises:
        NumericalError: A tensor holds values that are not finite.
        ModelError: A tensor is empty, as those are whose numbers are on other processes.
    """
    tensors = adapter_tensors(model)
    if not resumable:
        tensors = origin.method.tensors_to_peft(tensors, origin.config)
    require_sound(tensors, "the adapter")
    fields = {
        "peft_type": origin.method.peft_type_of(origin.config),
        "task_type": TASK_TYPES.get(origin.task),
        "base_model_name_or_path": origin.base_model,
        "revision": origin.revision,
        "inference_mode": True,
        **({"target_modules": target_names(model, inject.adapters(model))} if has_targets(origin.method) else {}),
        "modules_to_save": trained_modules(model, origin) or None,
        **origin.method.peft_config(origin.config),
        **origin.method.peft_fields(inject.adapters(model)),
    }
    return Contents(fields, tensors, origin.fingerprint)


def require_sound(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises an error where `tensors`, which are `what` a file is to hold, are empty or not finite.

    Raises:
        ModelError: One is empty.
        NumericalError: One holds values that are not finite.
    """
    empty = [key for key, tensor in tensors.items() if not tensor.numel()]
    if empty:
        raise ModelError(
            f"{what} cannot be saved: {empty[0]} is empty", hint="this is a bug in peftcli: please report it"
        )
    wrong = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not _is_finite(tensor)]
    if wrong:
        others = f" and {len(wrong) - 1} other tensors hold" if len(wrong) > 1 else " holds"
        raise NumericalError(
            f"{what} cannot be saved: {wrong[0]}{others} values that are not finite",
            hint="lower training.learning_rate; the last checkpoint is intact",
        )


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def write_contents(folder: Path, adapter: Contents) -> None:
    """Writes an adapter's files and their seal into the existing `folder`, reads them again and compares.

    `adapter_config.json` comes last: without it a folder is no adapter.

    Raises:
        HostError: The folder cannot be written.
        ModelError: What was read is not what was meant to be written.
    """
    files.write_safetensors(folder / WEIGHTS_FILE, adapter.tensors, {"format": "pt"})
    _verify_saved(folder / WEIGHTS_FILE, adapter.tensors)
    seals.write(folder, adapter.fields, adapter.fingerprint)
    files.write_json(folder / CONFIG_FILE, adapter.fields)
    _, doubts = seals.examine(folder, _read_config(folder))
    if doubts:
        raise ModelError(f"{doubts[0].message}, a moment ago", hint="check the disk")


def has_targets(method: type[Method]) -> bool:
    """Returns whether the method's recipes name the modules to adapt."""
    return issubclass(method.Config, Targets)


def trained_modules(model: nn.Module, origin: Origin) -> list[str]:
    """Returns the modules that train in full beside what the method trains: task heads, and what started anew."""
    heads = task_heads(model)
    paths = (name.rpartition(".")[0] for name in trained_beside(model, origin))
    return sorted({next((head for head in heads if is_under(path, head)), path) for path in paths})


def trained_beside(model: nn.Module, origin: Origin) -> list[str]:
    """Returns the base's parameters that train though the method does not say so, because they started at random."""
    return [
        name
        for name in inject.trained_base(model)
        if not origin.method.trains(origin.config, name, model.get_submodule(name.rpartition(".")[0]))
    ]


def _verify_saved(path: Path, tensors: Mapping[str, Tensor]) -> None:
    read = load_file(path)
    if set(read) != set(tensors) or not all(_is_same(read[key], tensors[key].cpu()) for key in tensors):
        raise ModelError(f"{path}: what was read back differs from the adapter in memory", hint="check the disk")


def _is_same(read: Tensor, tensor: Tensor) -> bool:
    return read.dtype == tensor.dtype and torch.equal(read, tensor)


def target_names(model: nn.Module, sites: Iterable[str]) -> list[str]:
    """Returns the shortest list of `target_modules` that chooses exactly `sites`: leaf names where they suffice.

    Leaf names are what vLLM and people expect; whole paths are the fallback.
    """
    wanted = set(sites)
    leaves = {name.rpartition(".")[2] for name in wanted}
    chosen = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    return sorted(leaves if chosen == wanted else wanted)


def read_adapter(folder: Path) -> Adapter:
    """Returns the adapter in `folder`, with what its seal says against it.

    Raises:
        ModelError: A file is missing, damaged or not what its run wrote, or asks for something that this version does
            not have.
    """
    fields = _read_config(folder)
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
    except (KeyError, *_MISREAD) as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} does not fit its {CONFIG_FILE}: {error}", hint=_TOGETHER) from error
    return Adapter(folder, method, config, _base_of(fields), _trained_of(fields, folder), tensors)


def _trained_of(fields: Mapping[str, Any], folder: Path) -> tuple[str, ...]:
    """Returns the modules that were trained in full."""
    found = fields.get("modules_to_save") or ()
    if not isinstance(found, (list, tuple)) or not all(isinstance(name, str) for name in found):
        raise ModelError(f"{folder / CONFIG_FILE}: modules_to_save is not a list of names", hint=_AGAIN)
    return tuple(found)


def task_of(folder: Path) -> str:
    """Returns the recipe's `model.task` of the adapter in `folder`: causal-lm where its file names none."""
    named = _read_config(folder).get("task_type")
    return next((task for task, name in TASK_TYPES.items() if name == named), "causal-lm")


def _read_config(folder: Path) -> dict[str, Any]:
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
    except _MISREAD as error:
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
        raise ModelError(f"{where}: modules_to_save: no module matches {', '.join(lost)}", hint=_TOGETHER)
    try:
        # A rank beyond a module's sides is wasteful, not wrong: PEFT trains them, and PiSSA's is stored twice as large.
        return inject.graft(model, adapter.method, adapter.config, 0, adapter.trained, unchecked=("r",))
    except PeftcliError as error:
        found = (Problem(f"{where}: {one.message}", hint=one.hint or _TOGETHER) for one in error.problems)
        raise ModelError.of(found) from error
    except (RuntimeError, *_MISREAD) as error:  # sizes that torch cannot make
        raise ModelError(f"{where}: {str(error).splitlines()[0]}", hint=_TOGETHER) from error


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
            hint=_TOGETHER,
        )


def _misfit(key: str, expected: Tensor, found: Tensor) -> list[str]:
    if found.shape != expected.shape:
        return [f"{key} has shape {list(found.shape)}, not {list(expected.shape)}"]
    if not found.is_floating_point():
        return [f"{key} holds {found.dtype}, not floating-point numbers"]
    return [] if _is_finite(found) else [f"{key} holds values that are not finite"]
