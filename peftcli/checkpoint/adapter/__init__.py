"""Adapter folders in PEFT's own format: `adapter_config.json` and `adapter_model.safetensors`.

Written so that PEFT and vLLM load them as they are; read strictly, whoever wrote them. A tensor that is missing, left
over, of another shape or not finite is an error, as is a setting that this version does not have: loaded halfway, an
adapter would be another model without a word.

format -> writing; format -> reading -> attaching
"""

from peftcli.checkpoint.adapter.attaching import attach, load_tensors, require_fit
from peftcli.checkpoint.adapter.format import (
    BASE_PREFIX,
    CONFIG_FILE,
    SHARED_PREFIX,
    WEIGHTS_FILE,
    Adapter,
    Contents,
    Origin,
    adapter_tensors,
    is_finite,
)
from peftcli.checkpoint.adapter.reading import read_adapter, read_tensors, task_of
from peftcli.checkpoint.adapter.writing import contents, require_sound, save_adapter, trained_beside, write_contents

__all__ = [
    "BASE_PREFIX",
    "CONFIG_FILE",
    "SHARED_PREFIX",
    "WEIGHTS_FILE",
    "Adapter",
    "Contents",
    "Origin",
    "adapter_tensors",
    "attach",
    "contents",
    "is_finite",
    "load_tensors",
    "read_adapter",
    "read_tensors",
    "require_fit",
    "require_sound",
    "save_adapter",
    "task_of",
    "trained_beside",
    "write_contents",
]
