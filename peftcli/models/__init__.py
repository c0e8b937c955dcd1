"""Base models and tokenizers, and plain words where one cannot be loaded.

source -> configuration -> weights; devices

Only safetensors (and GGUF, where the recipe names such a file) are read; code from a model's repository never runs.
"""

from peftcli.models.configuration import (
    LANGUAGE_TASKS,
    PROBLEM_TYPES,
    TASK_CLASSES,
    load_config,
    load_image_processor,
    load_tokenizer,
    max_positions,
    set_labels,
    skeleton,
    vocabulary_size,
)
from peftcli.models.devices import pick_device
from peftcli.models.source import ModelSource, locate, weight_files
from peftcli.models.weights import (
    load_model,
    names_in_model,
    plain_folder,
    resolve_dtype,
    stored_packed,
)

__all__ = [
    "LANGUAGE_TASKS",
    "PROBLEM_TYPES",
    "TASK_CLASSES",
    "ModelSource",
    "load_config",
    "load_image_processor",
    "load_model",
    "load_tokenizer",
    "locate",
    "max_positions",
    "names_in_model",
    "pick_device",
    "plain_folder",
    "resolve_dtype",
    "set_labels",
    "skeleton",
    "stored_packed",
    "vocabulary_size",
    "weight_files",
]
