"""The base's files: which holds what, and its tensors, read one at a time.

The library checks a file's header; the bytes are read here. It would map the whole file, and all of it that was ever
touched would count as the process's memory.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from peftcli import headers, models
from peftcli.checkpoint.adapter import is_finite
from peftcli.errors import ModelError
from peftcli.headers import INDEX_FILE, SINGLE_FILE
from peftcli.merge.tensor_file import PART_BYTES
from peftcli.targets import output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
            with self._at_start() as file:
                self._fill(file, bytes_of(tensor))
        return tensor

    def chunks(self, *, finite: bool = False) -> Iterator[memoryview]:
        """Yields the tensor's bytes, a few MB at a time.

        Args:
            finite: Whether its numbers must be.

        Raises:
            ModelError: They are not, or the file has changed.
        """
        left = self.nbytes
        with self._at_start() as file:
            while left:
                chunk = bytearray(min(left, PART_BYTES))
                self._fill(file, memoryview(chunk))
                left -= len(chunk)
                if finite:
                    self.require_finite(torch.frombuffer(chunk, dtype=DTYPES[self.dtype]))
                yield memoryview(chunk)

    def require_finite(self, numbers: Tensor) -> None:
        """Raises a ModelError where `numbers`, which are the tensor's or some of them, are not all finite."""
        if not is_finite(numbers):
            raise ModelError(
                f"{self.path}: {self.key} holds values that are not finite", hint="get the base model's files again"
            )

    @contextlib.contextmanager
    def _at_start(self) -> Iterator[Any]:
        with explained(self.path), self.path.open("rb") as file:
            file.seek(self.start)
            yield file

    def _fill(self, file: Any, view: memoryview) -> None:
        if file.readinto(view) != len(view):
            raise OSError(f"it ends before {self.key} does")


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a contiguous tensor with at least one number, in the tensor's own memory."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def entries(path: Path) -> dict[str, Entry]:
    """Returns the tensors of a safetensors file by key, in the order in which they lie in it.

    Raises:
        ModelError: The file is missing or damaged.
    """
    with explained(path):
        header, start_of_data = headers.checked(path)
    found = []
    for key, facts in header.items():
        start, end = facts["data_offsets"]
        found.append(Entry(path, key, facts["dtype"], tuple(facts["shape"]), start_of_data + start, end - start))
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
        shards = headers.read_index(base / INDEX_FILE)
    except (OSError, ValueError) as error:
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

    def require_whole(self, keys: Collection[str], beside: Collection[str]) -> None:
        """Raises a ModelError where a parameter of the model is neither stored under one of `keys` nor `beside` them.

        Where transformers makes parameters out of several stored tensors, what is missing cannot be told.
        """
        if len(self.names) < len(keys):
            return
        optional = [re.compile(one) for one in getattr(self.skeleton, "_keys_to_ignore_on_load_missing", None) or ()]
        groups: dict[int, list[str]] = {}
        for name, parameter in self.skeleton.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        lost = [
            names[0]
            for names in groups.values()
            if not any(name in beside or self.find(name) or any(one.search(name) for one in optional) for name in names)
        ]
        if lost:
            raise ModelError(
                f"the base model's files lack weights that the model needs: {', '.join(lost[:5])}",
                hint="get the base model's files again; do config.json and weights belong together?",
            )


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
