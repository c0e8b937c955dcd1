"""Loads base models and tokenizers, and says plainly why one cannot be loaded.

Only safetensors (and GGUF, where the recipe names such a file) are read, code from a model's repository is never run,
and a checkpoint that lacks a weight is an error: transformers would start that weight at random and go on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli import hub
from peftcli.errors import HostError, ModelError, RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from peftcli.recipe import ModelSection


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files come from.

    Attributes:
        name: A local folder, or a hub id.
        is_local: Whether `name` is a folder on this machine.
        options: Keyword arguments for every `from_pretrained` call that reads from it.
    """

    name: str
    is_local: bool
    options: dict[str, Any]


def locate(section: ModelSection) -> ModelSource:
    """Returns where the recipe's model is to be read from.

    A hub id whose hub cannot be reached is read from the local cache at once, instead of after the hub client's half
    minute of retries.

    Raises:
        ModelError: `model.name` looks like a path and there is no such folder, or it lacks a config.json.
    """
    path = Path(section.name).expanduser()
    options: dict[str, Any] = {"trust_remote_code": False}
    if section.gguf_file is not None:
        options["gguf_file"] = section.gguf_file
    if path.is_dir():
        wanted = section.gguf_file or "config.json"
        if not (path / wanted).is_file():
            raise ModelError(f"model.name: {section.name} has no {wanted}", hint=_folder_listing(path))
        return ModelSource(str(path), True, options)
    if path.exists() or section.name.startswith((".", "/", "~")) or section.name.count("/") > 1:
        what = "is a file, not a model folder" if path.exists() else "there is no such folder"
        raise ModelError(
            f"model.name: {section.name}: {what}",
            hint="name a folder with config.json and *.safetensors, or a hub id such as org/model; "
            "the recipe's header may say how to make it",
        )
    if section.revision is not None:
        options["revision"] = section.revision
    if not hub.reachable():
        options["local_files_only"] = True
    return ModelSource(section.name, False, options)


def _folder_listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())[:8]
    return f"it has {', '.join(names)}" if names else "the folder is empty"


@contextmanager
def _explained(section: ModelSection, source: ModelSource, what: str) -> Iterator[None]:
    """Turns the loaders' many exceptions into one ModelError that names the model and the cause."""
    try:
        yield
    except Exception as error:  # a damaged file decides which: tokenizers raise no class but this
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = None
        if not source.is_local:
            if source.options.get("local_files_only"):
                reason = "it is not in the local cache, and the model hub cannot be reached"
                hint = "check the network and HF_HUB_OFFLINE, or name a local folder: model.name=PATH"
            elif "gated" in str(error) or "401" in str(error):
                hint = "accept the model's licence on its hub page and set HF_TOKEN (or run `hf auth login`)"
            else:
                hint = "check the id's spelling and `model.revision`, or name a local folder: model.name=PATH"
        raise ModelError(f"model.name: cannot load the {what} of {section.name}: {reason}", hint=hint) from error


def load_config(section: ModelSection, source: ModelSource) -> PretrainedConfig:
    """Returns the model's configuration; reads no weights."""
    from transformers import AutoConfig

    with _explained(section, source, "configuration"):
        config: PretrainedConfig = AutoConfig.from_pretrained(source.name, **source.options)
    if section.attn_implementation is not None:
        config._attn_implementation = section.attn_implementation
    return config


def load_tokenizer(section: ModelSection, source: ModelSource) -> PreTrainedTokenizerBase:
    """Returns the model's tokenizer, unchanged."""
    from transformers import AutoTokenizer

    with _explained(section, source, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.name, **source.options)
    return tokenizer


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Returns the model on the meta device: every module and shape, no weights, in a fraction of a second."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError) as error:
        raise ModelError(
            f"model.name: {config.model_type} models cannot be used as causal-lm: {str(error).splitlines()[0]}"
        ) from error
    return model


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
    section: ModelSection, source: ModelSource, config: PretrainedConfig, device: torch.device
) -> PreTrainedModel:
    """Returns the base model with its weights, on `device`, frozen parts and all as transformers loads it.

    Raises:
        ModelError: A file is missing or damaged, or a weight is missing or of another shape.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {**source.options, "dtype": resolve_dtype(section, config, device)}
    if section.gguf_file is not None:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(dequantize=True)
    else:
        # Weights of another shape are listed in the report instead of raised without their names.
        options |= {"config": config, "use_safetensors": True, "ignore_mismatched_sizes": True}
    with _explained(section, source, "weights"), _quiet_loading():
        loaded: Any = AutoModelForCausalLM.from_pretrained(source.name, output_loading_info=True, **options)
    model, report = loaded
    misfits = {key: f"{key} {list(found)}, not {list(wanted)}" for key, found, wanted in report["mismatched_keys"]}
    missing = [key for key in report["missing_keys"] if key not in misfits]
    for names, what in ((missing, "lacks weights that the model needs"), (misfits.values(), "has weights that misfit")):
        if names:
            raise ModelError(
                f"model.name: the checkpoint of {section.name} {what}: {', '.join(sorted(names)[:5])}",
                hint="the model would start from random numbers there; do config.json and weights belong together?",
            )
    placed: PreTrainedModel = model.to(device)
    return placed


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


@contextmanager
def plain_folder(section: ModelSection, source: ModelSource) -> Iterator[Path]:
    """Yields a folder that holds the base model as transformers saves it: config.json and safetensors.

    A local folder or the hub's cache is used where it lies; a GGUF file is converted beside the system's temporary
    files first.
    """
    if section.gguf_file is None:
        yield Path(source.name) if source.is_local else _snapshot(section, source)
        return
    import tempfile

    import torch

    with tempfile.TemporaryDirectory(prefix="peftcli-") as folder:
        config = load_config(section, source)
        with _quiet_loading():
            load_model(section, source, config, torch.device("cpu")).save_pretrained(folder)
        yield Path(folder)


def _snapshot(section: ModelSection, source: ModelSource) -> Path:
    from huggingface_hub import snapshot_download

    with _explained(section, source, "files"):
        return Path(
            snapshot_download(
                section.name,
                revision=section.revision,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"],
                local_files_only=bool(source.options.get("local_files_only")),
            )
        )


def vocabulary_size(config: PretrainedConfig) -> int:
    """Returns how many token ids the model's input embedding has."""
    return int(config.get_text_config().vocab_size)


def max_positions(config: PretrainedConfig) -> int | None:
    """Returns the longest sequence that the model was made for, or None where it states none."""
    value = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(value) if value else None


def pick_device(name: str | None = None) -> torch.device:
    """Returns the device to compute on: the one named, else CUDA, XPU or MPS where there is one, else the CPU.

    Raises:
        RecipeError: `name` is no device.
        HostError: This machine has no such device.
    """
    import torch

    if name is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f'--device: "{name}" is no device', hint="cpu, cuda, cuda:1, xpu or mps") from error
    if device.type != "cpu" and not (torch.accelerator.is_available() and device.type == _accelerator_type()):
        raise HostError(f"--device: this machine has no {device.type} device", hint="leave the option out, or cpu")
    return device


def _accelerator_type() -> str | None:
    import torch

    current = torch.accelerator.current_accelerator()
    return current.type if current is not None else None
