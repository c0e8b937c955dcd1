"""How recipe keys and values are written in messages."""

from __future__ import annotations

from collections.abc import Mapping

KeyPath = tuple[str | int, ...]

_MAX_SHOWN = 60


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
