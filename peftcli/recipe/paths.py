"""What a recipe's paths stand for: the current directory is where they start, `~` is the home folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peftcli.recipe.schema import Recipe, Source

_Change = Callable[[str], str]


def with_home(recipe: Recipe) -> Recipe:
    """Returns the recipe with the home folder's path in place of a leading `~`."""
    return _changed(recipe, expand_home, expand_home)


def resolve_paths(recipe: Recipe) -> Recipe:
    """Returns the recipe with absolute paths, so that it means the same from another directory.

    A model or data path is one where something of that name exists or where it is written as a path (`./x`); any
    other is a hub id, and stays.
    """
    return _changed(recipe, _absolute_if_local, lambda path: str(Path(expand_home(path)).absolute()))


def _changed(recipe: Recipe, inputs: _Change, output: _Change) -> Recipe:
    def sources(given: tuple[Source, ...]) -> tuple[Source, ...]:
        return tuple(source.model_copy(update={"path": inputs(source.path)}) for source in given)

    section, settings = recipe.distributed, recipe.distributed.deepspeed_config
    data = {"train": sources(recipe.data.train), "eval": recipe.data.eval and sources(recipe.data.eval)}
    changes = {
        "model": recipe.model.model_copy(update={"name": inputs(recipe.model.name)}),
        "data": recipe.data.model_copy(update=data),
        "distributed": section.model_copy(update={"deepspeed_config": settings and output(settings)}),
        "output_dir": recipe.output_dir and output(recipe.output_dir),
    }
    return recipe.model_copy(update=changes)


def expand_home(path: str) -> str:
    """Returns the path with the home folder in place of a leading `~`."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:  # no such user: a name that begins with ~ like any other
        return path


def _absolute_if_local(path: str) -> str:
    expanded = expand_home(path)
    try:
        is_local = expanded.startswith((".", "/")) or Path(expanded).exists()
    except (OSError, ValueError):  # too long, or with characters that no file name has
        is_local = False
    return str(Path(expanded).absolute()) if is_local else path
