"""What to say about a recipe file that cannot be read."""

from __future__ import annotations

import difflib
from itertools import islice
from pathlib import Path

from peftcli.errors import RecipeError
from peftcli.recipe.values import printable

_MAX_LISTED = 5
_LONGEST_PATH = 400  # whole, to be copied; longer ones are no mistake in typing
_MAX_SEEN = 500  # of a folder that is not a recipe folder at all


def unreadable(path: Path, name: str, error: Exception, where: str | None = None) -> RecipeError:
    """Returns the error for a recipe that `error` kept from being read.

    Args:
        path: The file.
        name: What to call it.
        error: What reading it raised.
        where: The place that names the file; None for the command line.
    """
    prefix, name = "extends: " if where else "", printable(name, _LONGEST_PATH)
    if isinstance(error, FileNotFoundError):
        return RecipeError(f"{prefix}there is no recipe {name}", where=where, hint=_nearby(path))
    if isinstance(error, IsADirectoryError):
        return RecipeError(f"{prefix}{name} is a folder, not a recipe", where=where, hint=_nearby(path / "recipe.yaml"))
    reason = (error.strerror or "") if isinstance(error, OSError) else ""
    message = f"{prefix}{name} cannot be read: {reason.lower() or 'this is not a usable path'}"
    return RecipeError(message, where=where, hint="check the file's permissions" if reason else None)


def _nearby(path: Path) -> str | None:
    """Returns the recipe that was probably meant, or those that are there."""
    found = sorted(set(_recipes_in(path.parent)) | set(_recipes_in(Path("recipes"))), key=str)
    if not found:
        return None
    stems = {recipe.stem: recipe for recipe in reversed(found)}
    close = difflib.get_close_matches(path.stem[:100], list(stems), n=1, cutoff=0.6)
    if close:
        return f"did you mean {stems[close[0]]}?"
    more = f" and {len(found) - _MAX_LISTED} more" if len(found) > _MAX_LISTED else ""
    return f"recipes here: {', '.join(str(recipe) for recipe in found[:_MAX_LISTED])}{more}"


def _recipes_in(folder: Path) -> list[Path]:
    try:
        return [path for path in islice(folder.iterdir(), _MAX_SEEN) if path.suffix in (".yaml", ".yml")]
    except (OSError, ValueError):
        return []
