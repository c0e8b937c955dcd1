"""The base's files: which holds what, and its tensors, read one at a time.

The library checks a file's header; the bytes are read here. It would map the whole file, and all of it that was ever
touched would count as the process's memory.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peftcli import models
from peftcli.errors import ModelError
from peftcli.merge.tensor_file import PART_BYTES
from peftcli.targets import output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""What is computed on, by its name in a file's header. Any other tensor can only be copied."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor in a file.

    Attributes:
        path: The file.
        key: The tensor's name in it.
        dtype: Its dtype, as the header calls it.
        shape: Its shape.
        start: Where its bytes begin in the file.
        nbytes: How many they are.
    """

    path: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self) -> Tensor:
        """Returns the tensor, in memory of its own.

        Raises:
            ModelError: It is of a dtype that is not computed on, or the file has changed.
        """
        if self.dtype not in DTYPES:
            raise ModelError(f"{self.key} is stored as {self.dtype}, which is not computed on")
        tensor = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        if self.nbytes:
            view = bytes_of(tensor)
            done = 0
            with self._at_start() as file:
                while done < self.nbytes:
                    done += self._whole(file.readinto(view[done:]))
        return tensor

    def chunks(self) -> Iterator[bytes]:
        """Yields the tensor's bytes, a few MB at a time."""
        left = self.nbytes
        with self._at_start() as file:
            while left:
                chunk = file.read(min(left, PART_BYTES))
                left -= self._whole(len(chunk))
                yield chunk

    @contextlib.contextmanager
    def _at_start(self) -> Iterator[Any]:
        with explained(self.path), self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            yield file

    def _whole(self, count: int | None) -> int:
        if not count:
            raise OSError(f"it ends before {self.key} does")
        return count


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a contiguous tensor with at least one number, in the tensor's own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def entries(path: Path) -> dict[str, Entry]:
    """Returns the tensors of a safetensors file by key, in the order in which they lie in it.

    Raises:
        ModelError: The file is missing or damaged.
    """
    with explained(path), safe_open(path, "pt"), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = []
    for key, facts in header.items():
        start, end = facts["data_offsets"]
        found.append(Entry(path, key, facts["dtype"], tuple(facts["shape"]), 8 + length + start, end - start))
    return {entry.key: entry for entry in sorted(found, key=lambda one: one.start)}


def base_entries(base: Path) -> dict[str, Entry]:
    """Returns the tensors in a model's folder by key; like transformers, one file goes before many.

    Raises:
        ModelError: There are no safetensors, or a file is missing or damaged.
    """
    if (base / SINGLE_FILE).is_file():
        return entries(base / SINGLE_FILE)
    if not (base / INDEX_FILE).is_file():
        raise ModelError(f"{base} has no {SINGLE_FILE} to merge into", hint="only safetensors are read")
    try:
        shards: dict[str, str] = dict(json.loads((base / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{base / INDEX_FILE} cannot be read: {error}") from error
    found: dict[str, Entry] = {}
    for shard in sorted(set(shards.values())):
        found |= {key: entry for key, entry in entries(base / shard).items() if shards.get(key) == shard}
    lost = sorted(shards.keys() - found.keys())
    if lost:
        raise ModelError(f"{base / shards[lost[0]]} lacks {lost[0]}, which {INDEX_FILE} says is there")
    return found


def stored_dtype(folder: Path) -> torch.dtype:
    """Returns the dtype of the first floating-point weight in a model's folder."""
    dtypes = (DTYPES.get(entry.dtype) for entry in base_entries(folder).values())
    return next((one for one in dtypes if one is not None and one.is_floating_point), torch.float32)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns a failure to read `path` into a ModelError."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is missing or damaged: {error}", hint="get the base model's files again") from error


class Stored:
    """Where files keep the parameters of a model.

    Attributes:
        skeleton: The model on the meta device.
        names: The parameter that each key becomes, for those that are stored as they are.
    """

    def __init__(self, skeleton: PreTrainedModel, keys: Collection[str]) -> None:
        self.skeleton = skeleton
        self.names = models.names_in_model(skeleton, keys)
        self._keys = {name: key for key, name in self.names.items()}

    def find(self, name: str) -> str | None:
        """Returns the key under which the parameter `name` is stored; None where it is not.

        A tied head is stored as the embedding that it shares its weight with.
        """
        module, _, leaf = name.rpartition(".")
        if name not in self._keys and is_tied(self.skeleton) and leaf == "weight":
            embedding = self.skeleton.get_input_embeddings()
            if self.skeleton.get_submodule(module) is output_head(self.skeleton):
                path = next(path for path, found in self.skeleton.named_modules() if found is embedding)
                return self._keys.get(f"{path}.weight")
        return self._keys.get(name)

    def require(self, name: str) -> str:
        """Returns the key under which the parameter `name` is stored, or raises a ModelError."""
        key = self.find(name)
        if key is None:
            raise ModelError(
                f"{name} is in none of the base model's files as it is",
                hint="this checkpoint's weights are laid out otherwise than its model's",
            )
        return key


def is_tied(skeleton: PreTrainedModel) -> bool:
    """Returns whether the model's output head shares the weight of its input embedding."""
    tied = getattr(skeleton.config.get_text_config(), "tie_word_embeddings", False)
    return bool(tied) and output_head(skeleton) is not None


def require_all(found: Mapping[str, Entry], skeleton: PreTrainedModel, expected: Collection[str]) -> None:
    """Raises a ModelError where transformers would not find each parameter in files that hold `found`.

    Args:
        found: What they hold.
        skeleton: The model on the meta device.
        expected: The parameters, or the keys that they are stored under.
    """
    names = {name: key for key, name in models.names_in_model(skeleton, found).items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    lost = sorted(set(expected) - names.keys() - found.keys())
    other = sorted(name for name, key in names.items() if name in shapes and found[key].shape != shapes[name])
    if lost or other:
        what = f"lacks {lost[0]}" if lost else f"holds {other[0]} in another shape than the model's"
        raise ModelError(
            f"what was written {what}; nothing was kept", hint="this is a bug in peftcli: please report it"
        )
