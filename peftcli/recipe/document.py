"""Strict reading of YAML files: YAML 1.2 scalars, no duplicate keys, no tags, and limits on everything."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from peftcli.errors import Problem, RecipeError
from peftcli.recipe.nodes import Builder, Node
from peftcli.recipe.syntax import explain
from peftcli.recipe.values import show

MAX_BYTES = 1_000_000

# libyaml's parser where PyYAML was built with it: a hundred times faster, which matters near the limits.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NOT_PRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def read_bytes(path: Path) -> bytes:
    """Returns the file's bytes, or its first `MAX_BYTES` and one more.

    Raises:
        OSError: The file cannot be read.
        ValueError: The path holds a null byte.
    """
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def parse_file(raw: bytes, name: str) -> tuple[Node, list[Problem]]:
    """Returns the mapping that a YAML file holds, and what was wrong with it that did not stop the reading.

    Args:
        raw: The file's bytes.
        name: What to call it in messages.

    Raises:
        RecipeError: The file is not UTF-8, not YAML, not a mapping, or beyond a limit.
    """
    if len(raw) > MAX_BYTES:
        raise RecipeError(
            "the file is larger than 1 MB", where=name, hint="a recipe is a short YAML file: is this one?"
        )

    def place(line: int) -> str:
        return f"{name}:{line + 1}"

    root, problems = parse(_decode(raw, place), place)
    if root is None:
        hint = "a recipe has the sections model, data and method"
        raise RecipeError.of(problems or [Problem("the file is empty", name, hint)])
    if not isinstance(root.value, dict):
        colon = "put a space after each colon, as in `key: value`" if isinstance(root.value, str) else None
        raise RecipeError(f"expected lines of `key: value`, got {show(root.data())}", where=root.where, hint=colon)
    return root, problems


def parse(text: str, place: Callable[[int], str]) -> tuple[Node | None, list[Problem]]:
    """Returns the value of one YAML document (None where there is none), and the problems that did not stop it.

    Args:
        text: The document.
        place: Names a line, counted from 0, in messages.

    Raises:
        RecipeError: The text is not YAML, holds a second document, or is beyond a limit.
    """
    builder = Builder(place)
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            builder.feed(event)
    except yaml.YAMLError as error:
        raise RecipeError.of([*builder.problems, explain(error, text, place)]) from error
    return builder.root, builder.problems


def _decode(raw: bytes, place: Callable[[int], str]) -> str:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n")
        raise RecipeError("this line is not UTF-8 text", where=place(line), hint="save the file as UTF-8") from error
    if found := _NOT_PRINTABLE.search(text):
        line = text[: found.start()].count("\n")
        message = f"the character U+{ord(found.group()):04X} cannot be in a recipe"
        raise RecipeError(message, where=place(line), hint="remove it, or write it as an escape in double quotes")
    return text
