"""The headers of safetensors files, read strictly: one tensor a name, and limits on size, count and nesting.

The library refuses tensors that overlap, leave holes or end beyond the file, and headers above 100 MB. It accepts a
name that is given twice, of which its bindings and Python's JSON may keep different ones, and any number of tensors;
there is nothing that would make either, except to mislead or to exhaust.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

MAX_BYTES = 32_000_000
MAX_TENSORS = 500_000
"""Several times what the largest models take: 100,000 tensors of experts have a header of some 12 MB."""
MAX_NAME = 1_000
MAX_DIMENSIONS = 32
MAX_NUMBERS = 2**56
METADATA = "__metadata__"
SUFFIX = ".safetensors"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class HeaderError(ValueError):
    """A header that no honest program writes."""


def read(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Returns the tensors' facts (`dtype`, `shape`, `data_offsets`) by name, and where their bytes begin in the file.

    Offsets and sizes are for the library to check, which knows all dtypes: open the file with it as well.

    Raises:
        OSError: The file cannot be read.
        HeaderError: The header is not one, or is beyond a limit.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_BYTES:
            raise HeaderError(f"its header would take {length:,} bytes; at most {MAX_BYTES:,} are read")
        text = file.read(length)
    if len(text) < length:
        raise HeaderError("it ends within its header")
    try:
        found = json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError:
        raise HeaderError("its header is nested too deeply") from None
    except HeaderError:
        raise
    except ValueError as error:
        raise HeaderError(f"its header is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise HeaderError("its header is not a JSON object")
    found.pop(METADATA, None)
    if len(found) > MAX_TENSORS:
        raise HeaderError(f"it holds {len(found):,} tensors; at most {MAX_TENSORS:,} are read")
    for name, facts in found.items():
        _check_shape(name, facts)
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise HeaderError(f"it names a tensor {name[:40]!r}")
    return found, 8 + length


def checked(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Returns what `read` does, of a file that the library has opened: its dtypes, sizes and places are right.

    Raises:
        OSError: The file cannot be read.
        HeaderError: The header is not one, or is beyond a limit.
        SafetensorError: The library refuses it.
    """
    from safetensors import safe_open

    found = read(path)
    with safe_open(path, "numpy"):
        return found


def _check_shape(name: str, facts: Any) -> None:
    """Refuses sizes that the library takes for empty and torch cannot count with."""
    shape = facts.get("shape") if isinstance(facts, dict) else None
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise HeaderError(f"{name[:40]!r} has no shape")
    if len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) > MAX_NUMBERS:
        raise HeaderError(f"{name[:40]!r} has a shape that is too large")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise HeaderError(f"its header gives {repeated[:40]!r} twice")
    return found


def read_index(path: Path) -> dict[str, str]:
    """Returns the shard of each tensor, as an index such as `model.safetensors.index.json` has it.

    Loaders join these names to the folder's, and read what does not end in `.safetensors` as a pickle.

    Raises:
        OSError: The file cannot be read.
        HeaderError: It is no index, or names anything but safetensors files in its own folder.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
        shards: dict[str, str] = dict(found["weight_map"])
    except HeaderError:
        raise
    except RecursionError:
        raise HeaderError("it is nested too deeply") from None
    except (ValueError, KeyError, TypeError) as error:
        raise HeaderError(f"it is not an index: {error}") from None
    for name in dict.fromkeys(shards.values()):
        require_plain(name)
    return shards


def require_plain(name: object) -> None:
    """Raises a HeaderError where `name` is not that of a safetensors file beside the one that names it."""
    if not isinstance(name, str) or not name.endswith(SUFFIX) or not name.isprintable() or set(name) & set("/\\"):
        raise HeaderError(f"it names {str(name)[:80]!r}, which is not a safetensors file in its folder")
