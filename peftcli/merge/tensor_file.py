"""A safetensors file that is written one tensor at a time.

The library writes a file from tensors that are all in memory. A header states dtypes, shapes and places alone, which
are known before the first tensor is computed; so it is written first.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from peftcli.files import explained

PART_BYTES = 1 << 23
"""How much is read, written and read back at a time."""


RANKED = (
    *("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"),
    *("I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64"),
)
"""Dtypes in the order in which the library lists them, of widths that rise."""


@dataclass(frozen=True)
class TensorForm:
    """What a safetensors header says of a tensor, less its place.

    Attributes:
        dtype: Its dtype as the header calls it, such as `BF16`.
        shape: Its shape.
        nbytes: How many bytes it takes.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


class TensorFile:
    """A safetensors file under way: its header stands, and its tensors come one by one, in any order."""

    def __init__(
        self, path: Path, descriptor: int, forms: Mapping[str, TensorForm], metadata: Mapping[str, str]
    ) -> None:
        self._path, self._descriptor = path, descriptor
        self._left = dict(forms)
        # As the library lays them out: the widest numbers first, so that each tensor begins at a multiple of its own.
        order = sorted(forms, key=lambda name: (-_rank(forms[name].dtype), name))
        starts = dict(zip(order, accumulate((forms[name].nbytes for name in order), initial=0), strict=False))
        facts = {
            name: {
                "dtype": forms[name].dtype,
                "shape": forms[name].shape,
                "data_offsets": (starts[name], starts[name] + forms[name].nbytes),
            }
            for name in order
        }
        text = json.dumps({"__metadata__": dict(metadata), **facts}, ensure_ascii=False, separators=(",", ":"))
        header = text.encode()
        header += b" " * (-len(header) % 8)
        self._starts = {name: 8 + len(header) + start for name, start in starts.items()}
        self._put(0, len(header).to_bytes(8, "little") + header)

    def write(self, name: str, data: Iterable[bytes | memoryview]) -> None:
        """Writes the tensor `name`, whose bytes are `data`, and reads each part of it again.

        Raises:
            HostError: It cannot be written, or what was read is not what was written.
        """
        start = place = self._starts[name]
        for part in data:
            self._put(place, part)
            place += len(part)
        assert place - start == self._left.pop(name).nbytes, name

    def _put(self, place: int, data: bytes | memoryview) -> None:
        for at in range(0, len(data), PART_BYTES):
            part = bytes(data[at : at + PART_BYTES])
            with explained(self._path):
                done = 0
                while done < len(part):
                    done += os.pwrite(self._descriptor, part[done:] if done else part, place + at + done)
                if os.pread(self._descriptor, len(part), place + at) != part:
                    raise OSError(errno.EIO, "what was read back differs from what was written")

    def close(self) -> None:
        """Waits until the file, which must be whole, is on the disk."""
        assert not self._left, sorted(self._left)
        with explained(self._path):
            os.fsync(self._descriptor)


def _rank(dtype: str) -> int:
    """Returns how late the library's list of dtypes has this one; one that is not known takes a byte or less."""
    return RANKED.index(dtype) if dtype in RANKED else -1


@contextlib.contextmanager
def tensor_file(path: Path, forms: Mapping[str, TensorForm], metadata: Mapping[str, str]) -> Iterator[TensorFile]:
    """Yields a new safetensors file whose tensors, of these `forms`, can be written one at a time.

    It takes no more memory than a part of one tensor, and the bytes are those that the library would write. A failure
    leaves an unfinished file: for a folder that appears as a whole.
    """
    with explained(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        new = TensorFile(path, descriptor, forms, metadata)
        yield new
        new.close()
    finally:
        os.close(descriptor)
