"""Pydantic's validation errors as problems that a user can act on: plain English, the key, the place and a hint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from peftcli.errors import Problem
from peftcli.recipe import hints
from peftcli.recipe.fields import fields_at
from peftcli.recipe.values import KeyPath, dotted, printable, show

Locate = Callable[[KeyPath], str | None]

_WHOLE = re.compile(r"[-+]?\d+")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_TRUE = ("true", "yes", "on")
_FALSE = ("false", "no", "off")

MAX_PROBLEMS = 100  # more help nobody, and each costs a search for what was meant

# Pydantic's error types -> what was expected. A field that takes several types yields one error for each of them.
_EXPECTED = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "string_type": "text",
    **dict.fromkeys(("list_type", "tuple_type", "set_type"), "a list"),
    **dict.fromkeys(("dict_type", "mapping_type", "model_type", "model_attributes_type"), "`key: value` lines"),
    "none_required": "null",
}
_BOUNDS = {
    "greater_than": ("gt", "must be greater than"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be less than"),
    "less_than_equal": ("le", "must be at most"),
}


def problems_from_pydantic(error: ValidationError, path_prefix: KeyPath, locate: Locate) -> list[Problem]:
    """Returns the problems in a pydantic error, one for each key.

    Args:
        error: What validation raised.
        path_prefix: Key path of what was validated: () for a recipe, ("method",) for a method's fields.
        locate: Returns where the recipe gives the key at a path, or None where it does not.
    """
    by_path: dict[KeyPath, list[Mapping[str, Any]]] = {}
    for detail in error.errors(include_url=False)[: MAX_PROBLEMS + 1]:
        path = _recipe_path(path_prefix, detail["loc"], detail["type"] == "missing", locate)
        by_path.setdefault(path, []).append(detail)
    return [
        _problem(path, details, locate)
        for path, details in by_path.items()
        if not (_is_about_form(details) and any(path != other and path == other[: len(path)] for other in by_path))
    ]


def nearest(path: KeyPath, locate: Locate) -> str | None:
    """Returns where the recipe gives the key at `path`, or else the innermost section around it."""
    return next((where for end in range(len(path), -1, -1) if (where := locate(path[:end]))), None)


def _recipe_path(prefix: KeyPath, location: Iterable[str | int], missing: bool, locate: Locate) -> KeyPath:
    """Returns the key path of an error, without what pydantic adds: the tags of unions, positions in a short form."""
    path, parts = prefix, tuple(location)
    for index, part in enumerate(parts):
        if locate((*path, part)) is not None or (missing and index == len(parts) - 1):
            path = (*path, part)
    return path


def _is_about_form(details: list[Mapping[str, Any]]) -> bool:
    """Returns whether the errors at a key say nothing more than those inside it.

    Of the types that it can have, one went on to look at its items, and found fewer good ones than there have to be.
    """
    return all(detail["type"] in (*_EXPECTED, "literal_error", "too_short") for detail in details)


def _problem(path: KeyPath, details: list[Mapping[str, Any]], locate: Locate) -> Problem:
    # A field with several types: an error about the value says more than one about a type that it does not have.
    detail = next((detail for detail in details if not _is_about_form([detail])), details[-1])
    kind, value, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    where = nearest(path, locate)
    if kind == "missing":
        return Problem(f"{dotted(path)} is required", where, _what_is_missing(path))
    if kind == "extra_forbidden":
        return Problem(f"{dotted(path)}: unknown key", where, hints.for_unknown_key(path))
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return Problem(f"{dotted(path)}: {words} {context[bound]:g}, got {show(value)}", where)
    if kind in ("too_short", "string_too_short"):
        least = context["min_length"]
        return Problem(f"{dotted(path)}: must {'not be empty' if least == 1 else f'have at least {least}'}", where)
    if kind in _EXPECTED or kind == "literal_error":
        return _wrong_type(path, details, value, where)
    message = str(context["error"]) if kind in ("value_error", "assertion_error") else detail["msg"]
    field, _, rest = message.partition(": ")
    if isinstance(value, Mapping) and field in fields_at(path):  # said of a section, about one of its fields
        path, message = (*path, field), rest
        where = nearest(path, locate)
    got = "" if isinstance(value, Mapping) else f", got {show(value)}"
    return Problem(": ".join(part for part in (dotted(path), f"{message}{got}") if part), where)


def _wrong_type(path: KeyPath, details: list[Mapping[str, Any]], value: object, where: str | None) -> Problem:
    choices = [choice for detail in details for choice in _choices(detail)]
    types = list(dict.fromkeys(_EXPECTED[detail["type"]] for detail in details if detail["type"] in _EXPECTED))
    if types:
        expected = f"expected {' or '.join([*choices, *types])}"
    else:
        expected = f"must be one of {', '.join(choices)}" if len(choices) > 1 else f"must be {choices[0]}"
    hint = (choices and hints.for_wrong_value(path, value, choices)) or _rewritten(value, types)
    return Problem(f"{dotted(path)}: {expected}, got {show(value)}", where, hint or None)


def _choices(detail: Mapping[str, Any]) -> list[str]:
    if detail["type"] != "literal_error":
        return []
    return [choice.strip("'") for choice in re.split(", | or ", detail["ctx"]["expected"])]


def _rewritten(value: object, types: list[str]) -> str | None:
    """Returns how to write `value` so that it has one of `types`, where that is plain to see."""
    hint = None
    if isinstance(value, str):
        number = value.strip().replace("_", "").replace(",", "")
        numeric = _WHOLE if "a whole number" in types else _NUMBER if "a number" in types else None
        if numeric and numeric.fullmatch(number):
            hint = f"write {number}, without quotes"
        elif "true or false" in types and value.lower() in _TRUE + _FALSE:
            hint = f"write {'true' if value.lower() in _TRUE else 'false'}"
    elif isinstance(value, float) and "a whole number" in types and value.is_integer():
        hint = f"write {int(value)}"
    elif isinstance(value, bool | int | float) and "text" in types:
        hint = f'put it in quotes if it is meant as text: "{str(value).lower()}"'
    if hint is None and "a list" in types and not isinstance(value, Mapping | None):
        hint = f"write it as a list: [{printable(str(value))}]"
    return hint


def _what_is_missing(path: KeyPath) -> str | None:
    needs: dict[KeyPath, str] = {
        ("model",): "a section `model:` with at least `name:`, a hub id or a local folder",
        ("model", "name"): "a hub id or a local folder",
        ("data",): "a section `data:` with at least `train:`, a file or a hub id",
        ("data", "train"): "a file, a folder or a hub id",
        ("method",): "a section `method:` with at least `type:`",
    }
    section = fields_at(path[:-1])
    return needs.get(path) or (f"{dotted(path[:-1])} takes {', '.join(section)}" if section else None)
