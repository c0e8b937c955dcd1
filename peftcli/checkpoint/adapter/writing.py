"""Writes adapter folders that PEFT and vLLM load as they are, and reads them again before it calls them written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peftcli import files, inject
from peftcli.checkpoint import seal as seals
from peftcli.checkpoint.adapter.format import (
    CONFIG_FILE,
    TASK_TYPES,
    WEIGHTS_FILE,
    Contents,
    Origin,
    adapter_tensors,
    has_targets,
    is_finite,
)
from peftcli.checkpoint.adapter.reading import read_config
from peftcli.errors import ModelError, NumericalError
from peftcli.targets import is_under, task_heads


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
    require_sound(tensors, "the adapter")
    if not resumable:  # of what is sound, where a tensor may well be empty: VB-LoRA's weights of its one best vector
        tensors = origin.method.tensors_to_peft(tensors, origin.config)
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
    wrong = [key for key, tensor in tensors.items() if not is_finite(tensor)]
    if wrong:
        others = f" and {len(wrong) - 1} other tensors hold" if len(wrong) > 1 else " holds"
        raise NumericalError(
            f"{what} cannot be saved: {wrong[0]}{others} values that are not finite",
            hint="lower training.learning_rate; the last checkpoint is intact",
        )


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
    _, doubts = seals.examine(folder, read_config(folder))
    if doubts:
        raise ModelError(f"{doubts[0].message}, a moment ago", hint="check the disk")


def _verify_saved(path: Path, tensors: Mapping[str, Tensor]) -> None:
    read = load_file(path)
    if set(read) != set(tensors) or not all(_is_same(read[key], tensors[key].cpu()) for key in tensors):
        raise ModelError(f"{path}: what was read back differs from the adapter in memory", hint="check the disk")


def _is_same(read: Tensor, tensor: Tensor) -> bool:
    return read.dtype == tensor.dtype and torch.equal(read, tensor)


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


def target_names(model: nn.Module, sites: Iterable[str]) -> list[str]:
    """Returns the shortest list of `target_modules` that chooses exactly `sites`: leaf names where they suffice.

    Leaf names are what vLLM and people expect; whole paths are the fallback.
    """
    wanted = set(sites)
    leaves = {name.rpartition(".")[2] for name in wanted}
    chosen = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    return sorted(leaves if chosen == wanted else wanted)
