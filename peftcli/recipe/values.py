"""How recipe keys and values are written in messages."""

from __future__ import annotations

import os
from collections.abc import Mapping

KeyPath = tuple[str | int, ...]

_MAX_SHOWN = 60
_MAX_PATH, _MAX_PART = 4095, 255  # bytes, on Linux


def dotted(path: KeyPath) -> str:
    """Returns a key path the way users write it: `data.train[1].path`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{printable(part)}"
    return text.removeprefix(".")


def show(value: object) -> str:
    """Returns a value in one short line, as YAML would write it; lists and mappings by their kind only."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return f'"{printable(value)}"'
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return "a list" if value else "an empty list"
        case _:
            return printable(str(value))


def printable(text: str, longest: int = _MAX_SHOWN) -> str:
    """Returns `text` cut to a readable length, with what could garble a terminal escaped."""
    shown = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in shown)


def checked_path(path: str | None) -> str | None:
    """Returns `path`, which must be one that a file can have: short enough, and of characters that can be shown.

    Raises:
        ValueError: It is none.
    """
    if path is None:
        return None
    if any(ord(char) < 0x20 or 0x7F <= ord(char) < 0xA0 for char in path):
        raise ValueError("holds a control character, which no file's name should have")
    if len(os.fsencode(path)) > _MAX_PATH or any(len(os.fsencode(part)) > _MAX_PART for part in path.split("/")):
        raise ValueError("is too long for a file's name")
    return path
