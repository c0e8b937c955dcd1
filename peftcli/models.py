"""Loads base models and tokenizers, and says plainly why one cannot be loaded.

Only safetensors (and GGUF, where the recipe names such a file) are read, code from a model's repository is never run,
and a checkpoint that lacks a weight is an error: transformers would start that weight at random and go on.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli import headers, hub, vetting
from peftcli.errors import HostError, ModelError, RecipeError
from peftcli.quantization import packable, stored_fields
from peftcli.recipe.paths import expand_home

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from peftcli.recipe import ModelSection


TASK_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
}
"""The transformers class of each `model.task`."""
LANGUAGE_TASKS = ("causal-lm", "seq2seq-lm")
"""Tasks whose models come whole: their head is part of what was pretrained."""
PROBLEM_TYPES: dict[str, Any] = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
"""What transformers calls the kinds of labels."""


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
    path = Path(expand_home(section.name))
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
    vetting.check_config(config, section.name)
    if section.attn_implementation is not None:
        config._attn_implementation = section.attn_implementation
    return config


def load_tokenizer(section: ModelSection, source: ModelSource) -> PreTrainedTokenizerBase:
    """Returns the model's tokenizer, unchanged."""
    from transformers import AutoTokenizer

    with _explained(section, source, "tokenizer"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.name, **source.options)
    return tokenizer


def load_image_processor(section: ModelSection, source: ModelSource) -> BaseImageProcessor:
    """Returns the model's image processor, which works on Pillow's images alone wherever it runs."""
    from transformers import AutoImageProcessor

    with _explained(section, source, "image processor"):
        processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(source.name, backend="pil", **source.options)
    return processor


def set_labels(config: PretrainedConfig, names: Sequence[str], kind: str) -> None:
    """Makes `config` that of a model that answers with `names`, of a kind of `PROBLEM_TYPES`.

    Such a model generates nothing, so a decoder among them needs no cache.
    """
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = PROBLEM_TYPES[kind]
    config.use_cache = False


def _model_class(task: str) -> Any:
    """Returns the transformers class that makes a model for `task`."""
    import transformers

    return getattr(transformers, TASK_CLASSES[task])


def skeleton(config: PretrainedConfig, task: str = "causal-lm") -> PreTrainedModel:
    """Returns the model on the meta device: every module and shape, no weights, in a fraction of a second."""
    import torch

    try:
        with torch.device("meta"):
            model: PreTrainedModel = _model_class(task).from_config(config)
    except (ValueError, ImportError) as error:
        raise ModelError(
            f"model.name: {config.model_type} models cannot be used as {task}: {str(error).splitlines()[0]}"
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
    with _explained(section, source, "weights"), _quiet_loading():
        _check_weights(section, source)
        loaded: Any = _model_class(section.task).from_pretrained(source.name, output_loading_info=True, **options)
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


def _check_weights(section: ModelSection, source: ModelSource) -> None:
    """Checks the weights' files before a loader reads them; of a hub model their index, as they are not here yet.

    Raises:
        OSError: A file cannot be read.
        HeaderError: One is not what an honest program writes, or is no safetensors file.
    """
    if section.gguf_file is not None:
        return
    if source.is_local:
        headers.check_weights(Path(source.name))
        return
    from transformers.utils.hub import cached_file

    index = cached_file(
        source.name,
        headers.INDEX_FILE,
        revision=section.revision,
        local_files_only=bool(source.options.get("local_files_only")),
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if index is not None:
        headers.read_index(Path(index))


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

    from peftcli.methods._protocol import generator

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
            load_model(section, source, config, torch.device("cpu"))[0].save_pretrained(folder)
        yield Path(folder)


def weight_files(source: ModelSource) -> list[Path]:
    """Returns the files that hold the model's weights: fetched, if they are on the hub; none where they cannot be."""
    from transformers.utils.hub import cached_file

    def find(name: str) -> Path | None:
        if source.is_local:
            return path if (path := Path(source.name) / name).is_file() else None
        options = {name: value for name, value in source.options.items() if name in ("revision", "local_files_only")}
        quiet: Any = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        found = cached_file(source.name, name, **options, **quiet)
        return None if found is None else Path(found)

    single = find(source.options.get("gguf_file", "model.safetensors"))
    index = find("model.safetensors.index.json") if single is None else None
    if index is None:
        return [] if single is None else [single]
    shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found = [path for shard in shards if (path := find(shard)) is not None]
    return found if len(found) == len(shards) else []


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


def vocabulary_size(config: PretrainedConfig) -> int:
    """Returns how many token ids the model's input embedding has; 0 where it reads no tokens."""
    return int(getattr(config.get_text_config(), "vocab_size", 0))


POSITIONS_AFTER_PADDING = ("roberta", "camembert", "mpnet", "longformer", "esm", "data2vec-text", "xmod", "ibert")
"""Parts of the types of models that number positions from their padding token's id on, and so have fewer."""


def max_positions(config: PretrainedConfig) -> int | None:
    """Returns the longest sequence that the model was made for, or None where it states none."""
    text = config.get_text_config()
    value = getattr(text, "max_position_embeddings", None)
    if not value:
        return None
    after_padding = any(part in config.model_type for part in POSITIONS_AFTER_PADDING)
    return int(value) - (int(text.pad_token_id or 0) + 1 if after_padding else 0)


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
    if device.type != "cpu" and (device.index or 0) >= (count := torch.accelerator.device_count()):
        raise HostError(f"--device: this machine has no {name}: it has {count}, counted from 0", hint="name another")
    return device


def _accelerator_type() -> str | None:
    import torch

    current = torch.accelerator.current_accelerator()
    return current.type if current is not None else None
