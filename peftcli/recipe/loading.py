"""A recipe file and overrides, to a checked `Recipe`; every problem of all of them at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from peftcli.errors import Problem, RecipeError, did_you_mean
from peftcli.recipe import hints
from peftcli.recipe.layers import Reader, overridden, spelled_out
from peftcli.recipe.messages import MAX_PROBLEMS, Locate, nearest, problems_from_pydantic
from peftcli.recipe.paths import with_home
from peftcli.recipe.rules import broken_rules
from peftcli.recipe.schema import Recipe
from peftcli.recipe.shipped import method_fields, method_names
from peftcli.recipe.shorthands import SHORTHANDS
from peftcli.recipe.values import KeyPath, dotted, show


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and where each of its values came from.

    Attributes:
        recipe: The checked recipe.
        path: The file it was loaded from.
        locations: Key path, such as ("method", "r"), → `file:line` or the override that gave it. Has only what the
            recipe gives, not defaults.
    """

    recipe: Recipe
    path: Path
    locations: Mapping[KeyPath, str]

    def locate(self, path: KeyPath) -> str | None:
        """Returns where the recipe gives the key at a path; None where it does not."""
        return self.locations.get(path)

    def where(self, *path: str | int) -> str:
        """Returns where the recipe gives the key at a path, or else the innermost section around it."""
        return nearest(path, self.locate) or str(self.path)


def load(path: Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Returns the recipe in a file, with what it extends and with overrides such as `method.r=8` applied.

    The values of `method` are not checked beyond their names: that is for the method's own `Config`, whose errors
    `problems_from_pydantic(error, ("method",), loaded.locate)` places.

    Raises:
        RecipeError: The recipe cannot be read or is wrong in any way; holds every problem found.
    """
    reader = Reader()
    try:
        root = reader.read(path, str(path))
    except RecipeError as error:
        raise RecipeError.of(_in_order([*reader.problems, *error.problems])) from error
    root, problems = overridden(root, overrides)
    root, disagreements = spelled_out(root)
    locations = dict(root.locations())
    recipe, wrong = _checked(root.data(), path, locations.get)
    problems = [*reader.problems, *problems, *disagreements, *wrong]
    if recipe is None or problems:
        raise RecipeError.of(_in_order(problems))
    return LoadedRecipe(with_home(recipe), path, locations)


def _checked(values: dict[str, Any], path: Path, locate: Locate) -> tuple[Recipe | None, list[Problem]]:
    recipe, problems = None, []
    if values.get("output_dir") is None:
        values = {**values, "output_dir": str(Path("runs", path.stem))}
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += problems_from_pydantic(error, (), locate)
    problems += _method_problems(values.get("method"), locate)
    problems += broken_rules(values, locate)
    return recipe, problems


def _method_problems(method: object, locate: Locate) -> Iterator[Problem]:
    """Yields what is wrong with the method's type and with the names of its fields."""
    if not isinstance(method, Mapping):
        return  # reported with the form of the other sections
    name, where = method.get("type"), nearest(("method", "type"), locate)
    names = sorted((*method_names(), *SHORTHANDS))
    known = ", ".join(names)
    if name is None:
        yield Problem("method.type is required", where, f"one of {known}")
    elif not isinstance(name, str):
        yield Problem(f"method.type: expected text, got {show(name)}", where, f"one of {known}")
    elif name not in method_names():
        meant = did_you_mean(name.lower()[:100], names)
        yield Problem(
            f"method.type: unknown method {show(name)}", where, f"{f'{meant} ' if meant else ''}methods: {known}"
        )
    elif name in method_fields():  # a method that the schema does not know yet is checked by its Config alone
        unknown = [key for key in method if key not in method_fields()[name]]
        for key in unknown[: MAX_PROBLEMS + 1]:
            yield _unknown_field(name, key, locate(("method", key)))


def _unknown_field(name: str, key: str, where: str | None) -> Problem:
    owners = [other for other, fields in method_fields().items() if key in fields]
    names = (
        f"{', '.join(owners[:-1])} and {owners[-1]} have" if len(owners) > 1 else f"{owners[0]} has" if owners else ""
    )
    hint = f"only {names} it" if owners else None
    message = f"{dotted(('method', key))}: unknown key for {name}"
    return Problem(message, where, hint or hints.for_unknown_key(("method", key), method_fields()[name]))


def _in_order(problems: list[Problem]) -> list[Problem]:
    """Returns the problems in the order of files and lines, at most `MAX_PROBLEMS` of them and a word on the rest."""
    ordered = sorted(dict.fromkeys(problems), key=_position)
    rest = [Problem(f"there are more problems; these are the first {MAX_PROBLEMS}")]
    return ordered if len(ordered) <= MAX_PROBLEMS else ordered[:MAX_PROBLEMS] + rest


def _position(problem: Problem) -> tuple[str, int]:
    where = problem.where or ""
    file, _, line = where.rpartition(":")
    return (file, int(line)) if line.isdecimal() else (where, 0)
