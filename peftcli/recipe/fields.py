"""Which keys a recipe can have, read off the schema."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from peftcli.recipe.schema import Recipe, Source
from peftcli.recipe.shipped import method_fields
from peftcli.recipe.values import KeyPath, dotted

EXTENDS = "extends"


def fields_at(section: KeyPath) -> tuple[str, ...]:
    """Returns the keys that the section at a path can have, () where there is no such section; `method` has all."""
    if section == ("method",):
        return tuple(dict.fromkeys(name for fields in method_fields().values() for name in fields))
    if not section:
        return (*Recipe.model_fields, EXTENDS)
    model = _model_at(section)
    return tuple(model.model_fields) if model else ()


@cache
def all_fields() -> tuple[tuple[str, ...], ...]:
    """Returns the path of every section and field, `data.train.path` among them."""
    return tuple(_below(()))


def accepts_text(path: KeyPath) -> bool:
    """Returns whether the field at a path can be written as any text: a dataset can, as its path."""
    annotation = _annotation_at(path)
    return str in (annotation, *get_args(annotation)) or _model_in(annotation) is Source


def is_section(path: KeyPath) -> bool:
    """Returns whether the key at a path is a section of the recipe: a mapping whose keys the schema fixes."""
    annotation = _annotation_at(path)
    return path == ("method",) or (isinstance(annotation, type) and issubclass(annotation, BaseModel))


def default_of(path: KeyPath) -> Any:
    """Returns the default of the field at a path."""
    model = _model_at(path[:-1])
    assert model is not None, f"no field {dotted(path)}"
    return model.model_fields[str(path[-1])].default


def _below(section: tuple[str, ...]) -> list[tuple[str, ...]]:
    paths: list[tuple[str, ...]] = []
    for name in fields_at(section):
        paths += [(*section, name), *_below((*section, name))]
    return paths


def _annotation_at(path: KeyPath) -> Any:
    """Returns the type of the field at a path; None where there is no such field."""
    names = [part for part in path if isinstance(part, str)]
    if not names:
        return Recipe
    parent = _annotation_at(tuple(names[:-1]))
    model = _model_in(parent)
    if model is not None:
        field = model.model_fields.get(names[-1])
        return field.annotation if field else None
    return get_args(parent)[1] if get_origin(parent) is dict else None


def _model_at(path: KeyPath) -> type[BaseModel] | None:
    return _model_in(_annotation_at(path))


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Returns the section that a type is or holds: `Source` for `tuple[Source, ...] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part))), None)
