"""Bytes and JSON values broken at random: what a slip, a bad disk or somebody with intent makes of a file."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from random import Random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        7,
        2**31,
        2**63,
        2**64,
        -(2**63),
        10**400,
        1e308,
        1e-320,
        float("nan"),
        float("inf"),
    ),
    *("", " ", "x" * 3000, "\x00", "\x1b[31m", "\ud800", "\U0001f600", "../../x", "/dev/zero", "~", "[bold]", "%s{0}"),
    *([], [[]], [None], ["a", 1], list(range(300)), {}, {"": 1}, {"a": {"b": {}}}),
)
"""Values of every kind, most of them at or beyond a limit of something."""
ODD_BYTES = (
    *(b"", b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b"\t", b'"', b"\\", b"'"),
    *(b"{", b"}", b"[", b"]", b",", b":", b"NaN", b"1e999", b"null", b"true", b"[" * 300, b'{"a":' * 300, b"9" * 5000),
    *(b"\xe2\x80\xa8", b"\\ud800", b"\\u0000", b"-0", b"<|im_end|>", b"</s>"),
)


def bytes_mutant(data: bytes, random: Random, pieces: Sequence[bytes] = ODD_BYTES) -> bytes:
    """Returns `data` with one to six places cut out, copied, flipped, shuffled or filled with one of `pieces`."""
    for _ in range(random.choice((1, 1, 1, 2, 6))):
        start = random.randrange(len(data) + 1)
        end = min(len(data), start + random.choice((1, 4, 30, 1000)))
        match random.randrange(7):
            case 0:
                data = data[:start] + random.choice(pieces) + data[start:]
            case 1:
                data = data[:start] + data[end:]
            case 2:
                data = data[:start] + bytes([random.randrange(256)]) + data[start + 1 :]
            case 3:
                data = (
                    data[:start]
                    + bytes(byte ^ 1 << random.randrange(8) for byte in data[start : start + 1])
                    + data[start + 1 :]
                )
            case 4:
                data = data[:end] + data[start:end] + data[end:]
            case 5:
                data = _lines_mutant(data, random)
            case _:
                data = data[:start]
    return data


def _lines_mutant(data: bytes, random: Random) -> bytes:
    """Returns `data` with two of its lines exchanged, or one of them twice."""
    lines = data.splitlines(keepends=True) or [b""]
    one, other = random.randrange(len(lines)), random.randrange(len(lines))
    if random.random() < 0.5:
        lines[one], lines[other] = lines[other], lines[one]
    else:
        lines.insert(one, lines[other])
    return b"".join(lines)


def value_mutant(value: Any, random: Random, values: Sequence[Any] = ODD_VALUES) -> Any:
    """Returns a JSON value with one to three of its parts left out, renamed, moved, or replaced by one of `values`."""
    changed = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 2, 3))):
        holders = list(_holders(changed))
        if not holders:
            return copy.deepcopy(random.choice(values))
        holder = random.choice(holders)
        key = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        match random.randrange(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[str(random.choice((*holder, "x", "", "__class__", "type")))] = holder.pop(key)
            case 2:
                holder[key] = copy.deepcopy(random.choice(list(_values(changed))))
            case 3:
                holder[key] = [holder[key]]
            case _:
                holder[key] = copy.deepcopy(random.choice(values))
    return changed


def _holders(value: Any) -> list[Any]:
    """Returns the lists and mappings in `value` that hold something."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    found = [one for child in inner for one in _holders(child)]
    return [value, *found] if inner else found


def _values(value: Any) -> list[Any]:
    """Returns `value` and all that is in it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value, *(one for child in inner for one in _values(child))]


def json_mutant(data: bytes, random: Random) -> bytes:
    """Returns a JSON text with its values changed, or its bytes."""
    if random.random() < 0.5:
        return bytes_mutant(data, random)
    return json.dumps(value_mutant(json.loads(data), random)).encode("utf-8", "surrogatepass")
