"""Loads a model's weights, all of them: one that its checkpoint lacks is an error.

transformers would start that weight at random and go on.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.errors import ModelError
from peftcli.models.configuration import LANGUAGE_TASKS, load_config, model_class
from peftcli.models.source import ModelSource, check_weights, explained, snapshot
from peftcli.quantization import packable, stored_fields

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from peftcli.recipe import ModelSection


def resolve_dtype(section: ModelSection, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    """Returns the dtype in which the base's weights are held.

    `auto` is the checkpoint's own, but float32 on a CPU: half-precision products are up to 80 times slower there.
    """
    import torch

    if section.dtype != "auto":
        chosen: torch.dtype = getattr(torch, section.dtype)
        return chosen
    if device.type == "cpu":
        return torch.float32
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def load_model(
    section: ModelSection,
    source: ModelSource,
    config: PretrainedConfig,
    device: torch.device,
    seed: int = 0,
    stored_dense: Collection[str] = (),
) -> tuple[PreTrainedModel, list[str]]:
    """Returns the base model with its weights, on `device`, frozen parts and all as transformers loads it.

    `stored_dense` are the linear layers that a checkpoint holds as they are though it comes packed.

    Returned with it: the names of the parameters of a task head or pooler that the checkpoint does not have, or has
    for other labels. They start from random numbers that depend on `seed` and their names alone.

    Raises:
        ModelError: A file is missing or damaged, or any other weight is missing or of another shape.
    """
    options: dict[str, Any] = {**source.options, "dtype": resolve_dtype(section, config, device)}
    if section.gguf_file is not None:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        # Weights of another shape are listed in the report instead of raised without their names.
        options |= {"config": config, "use_safetensors": True, "ignore_mismatched_sizes": True}
        if stored_fields(config):
            options |= {"config": _with_dense(config, stored_dense), "device_map": {"": device}}
    with explained(section, source, "weights"), _quiet_loading():
        check_weights(source)
        loaded: Any = model_class(section.task).from_pretrained(source.name, output_loading_info=True, **options)
    model, report = loaded
    misfits = {key: f"{key} {list(found)}, not {list(wanted)}" for key, found, wanted in report["mismatched_keys"]}
    fresh = [key for key in sorted({*report["missing_keys"], *misfits}) if _may_be_fresh(key, model, section.task)]
    misfits = {key: said for key, said in misfits.items() if key not in fresh}
    missing = [key for key in report["missing_keys"] if key not in misfits and key not in fresh]
    for names, what in ((missing, "lacks weights that the model needs"), (misfits.values(), "has weights that misfit")):
        if names:
            raise ModelError(
                f"model.name: the checkpoint of {section.name} {what}: {', '.join(sorted(names)[:5])}",
                hint="the model would start from random numbers there; do config.json and weights belong together?",
            )
    _start(model, fresh, seed)
    placed: PreTrainedModel = model.to(device)
    return placed, fresh


def _may_be_fresh(key: str, model: PreTrainedModel, task: str) -> bool:
    """Returns whether a parameter is of a labelling model's head, or of the pooler, which feeds nothing but the head.

    Any other that is missing would leave a hole in what was pretrained.
    """
    if task in LANGUAGE_TASKS or key not in dict(model.named_parameters()):
        return False
    prefix = f"{model.base_model_prefix}."
    return not key.startswith(prefix) or "pooler" in key.removeprefix(prefix).split(".")[0]


def _start(model: PreTrainedModel, fresh: list[str], seed: int) -> None:
    """Gives fresh parameters their start: biases 0, norms 1, weights normal with the model's own deviation."""
    import torch

    from peftcli.methods._place import generator

    deviation = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    for name in fresh:
        module, _, leaf = name.rpartition(".")
        parameter = model.get_parameter(name)
        with torch.no_grad():
            if leaf == "bias":
                parameter.zero_()
            elif "Norm" in type(model.get_submodule(module)).__name__:
                parameter.fill_(1.0)
            else:
                noise = torch.randn(parameter.shape, generator=generator(seed, name))
                parameter.copy_(deviation * noise)


def stored_packed(skeleton: PreTrainedModel) -> list[str]:
    """Returns the linear layers that are packed in a checkpoint with the configuration of `skeleton`."""
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    wide = list(skeleton._keep_in_fp32_modules or ())
    named = stored_fields(skeleton.config).get("llm_int8_skip_modules")
    skipped = HfQuantizer.get_modules_to_not_convert(skeleton, named, wide)
    return [path for path in packable(skeleton) if should_convert_module(path, skipped)]


def _with_dense(config: PretrainedConfig, paths: Collection[str]) -> PretrainedConfig:
    """Returns a packed checkpoint's configuration in which exactly the linear layers `paths` are left dense.

    Left to itself, transformers would expect the head of another task to be packed as well.
    """
    changed = copy.deepcopy(config)
    changed.quantization_config = {
        **stored_fields(config),
        "llm_int8_skip_modules": [re.escape(path) for path in paths],
    }
    return changed


def names_in_model(skeleton: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Returns the parameter of `skeleton` that each key of a checkpoint becomes, for those that are stored as they are.

    transformers renames older checkpoints' keys as it loads them, and leaves out or adds the inner model's name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    changes = get_model_conversion_mapping(skeleton)
    renamings = [one for one in changes if isinstance(one, WeightRenaming)]
    converters = [one for one in changes if isinstance(one, WeightConverter)]
    own = skeleton.state_dict()
    found = {}
    for key in stored:
        name, converted = rename_source_key(key, renamings, converters, skeleton.base_model_prefix, own)
        if converted is None:
            found[key] = name
    return found


@contextmanager
def plain_folder(section: ModelSection, source: ModelSource) -> Iterator[Path]:
    """Yields a folder that holds the base model as transformers saves it: config.json and safetensors.

    A local folder or the hub's cache is used where it lies; a GGUF file is converted beside the system's temporary
    files first.
    """
    if section.gguf_file is None:
        yield Path(source.name) if source.is_local else snapshot(section, source)
        return
    import tempfile

    import torch

    with tempfile.TemporaryDirectory(prefix="peftcli-") as folder:
        config = load_config(section, source)
        with _quiet_loading():
            load_model(section, source, config, torch.device("cpu"))[0].save_pretrained(folder)
        yield Path(folder)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silences transformers' own progress bars and load report: what they say is checked instead."""
    from transformers.utils import logging as transformers_logging

    bars = transformers_logging.is_progress_bar_enabled()
    level = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
