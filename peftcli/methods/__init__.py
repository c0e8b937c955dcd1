"""The methods: one file each, whose name is the `method.type` of recipes. Nothing is registered.

This module only finds them; importing it does not import torch. Files that start with an underscore are shared parts.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftcli.methods._protocol import Method


def names() -> tuple[str, ...]:
    """Returns every method's name, sorted."""
    files = Path(__file__).parent.glob("*.py")
    return tuple(sorted(file.stem for file in files if not file.stem.startswith("_")))


def load(name: str) -> type[Method]:
    """Returns the method class of `methods/<name>.py`: the `Method` subclass that this file defines.

    Raises:
        KeyError: There is no such file.
    """
    if name not in names():
        raise KeyError(name)
    from peftcli.methods._protocol import Method

    module = importlib.import_module(f"peftcli.methods.{name}")
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    assert len(found) == 1, f"{module.__name__} must define exactly one Method"
    return found[0]
