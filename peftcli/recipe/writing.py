"""A recipe back to YAML."""

from __future__ import annotations

import re
from typing import Any

import yaml

from peftcli.recipe.rules import EXCLUSIVE, given
from peftcli.recipe.scalars import resolve
from peftcli.recipe.schema import Recipe

# Line breaks and marks that only double quotes, which escape them, carry through a file.
_UNUSUAL = re.compile("[\\x00-\\x1f\\x7f-\\xa0\\u2028\\u2029\\ufeff]")


class _Dumper(yaml.SafeDumper):
    """Writes what `document.read` reads back: quotes the text that YAML 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if _needs_quotes(text) else None)


def _needs_quotes(text: str) -> bool:
    if _UNUSUAL.search(text):
        return True
    try:
        return not isinstance(resolve(text), str)
    except ValueError:
        return True


_Dumper.add_representer(str, _represent_text)


def dump(recipe: Recipe) -> str:
    """Returns the recipe as YAML with every value in it, defaults too; `load` reads an equal recipe from it."""
    values = recipe.model_dump(mode="python")
    values["method"] = {"type": recipe.method.get("type"), **recipe.method}
    for chosen, default in EXCLUSIVE:
        if given(values, chosen) is not None:
            del values[str(default[0])][str(default[1])]
    values = _with_lists(values)
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _with_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_lists(child) for key, child in value.items()}
    return [_with_lists(child) for child in value] if isinstance(value, (list, tuple)) else value
