"""Mutants of the recipes that ship: each is loaded, or refused as a recipe, in time, and nothing else happens."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import yaml
from rich.console import Console

from peftcli import recipe
from peftcli.cli import console
from peftcli.errors import RecipeError
from peftcli.run.fitting import check_method
from scripts.torture.fuzzing import Fuzzing
from scripts.torture.mutations import ODD_BYTES, ODD_VALUES, bytes_mutant, value_mutant
from scripts.torture.outcome import Order, Outcome

UNIT, SHORT, LONG = "mutants", 1500, 100_000
RECIPES = Path(__file__).parents[2] / "recipes"

YAML_TEXTS = (
    *("[", "]", "{", "}", ":", ": ", ",", "-", "- ", "? ", "#", "&a ", "*a", "*n", "<<: ", "<<: *n", "!", "!!str "),
    *("!!python/object/apply:os.system [x]", "|", ">", "'", '"', "\\", "\t", "\r", "  ", "\x85", "\u2028", "\ufeff"),
    *("%", "@", "`", "~", "---\n", "...\n", "null", "true", "no", ".nan", ".inf", "1e999", "9" * 500, "-1", "0", "1e3"),
    *(
        "extends: r.yaml\n",
        "extends: [",
        "extends: /dev/zero\n",
        "a: " * 60,
        "[" * 60,
        "{a: " * 60,
        "model:",
        "method:",
    ),
    *("type: dora", "train:", "eval_fraction: 0.1\n", "x" * 5000, "\\ud800", '"\\ud800"', "é", "\U0001f600"),
)
PIECES = (*ODD_BYTES, *(text.encode() for text in YAML_TEXTS))
VALUES = (*ODD_VALUES, *YAML_TEXTS)


def run(order: Order) -> Outcome:
    """Loads `order.count` mutants, shared out over all recipes that ship."""
    outcome = Outcome("mutants of the recipes that ship, each loaded or refused")
    seeds = [path.read_bytes() for path in sorted(RECIPES.glob("**/*.yaml"))]
    random, fuzzing, file = order.random("recipes"), Fuzzing("recipes", outcome, order.count), order.folder / "r.yaml"
    shown = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), soft_wrap=True)
    for _ in range(order.count):
        kind = random.choice(tuple(KINDS))
        data = KINDS[kind](random.choice(seeds), random)
        file.write_bytes(data)
        fuzzing.ask(kind, data, lambda: is_loaded(file, shown))
    return fuzzing.finish()


def _bytes_mutant(data: bytes, random: Random) -> bytes:
    return bytes_mutant(data, random, PIECES)


def _line_mutant(data: bytes, random: Random) -> bytes:
    """Returns `data` with one line's key, value or indentation replaced."""
    lines = data.splitlines(keepends=True) or [b""]
    at = random.randrange(len(lines))
    key, colon, value = lines[at].partition(b":")
    piece = random.choice(PIECES)
    lines[at] = random.choice((key + colon + b" " + piece + b"\n", piece + colon + value, b"  " + lines[at], b""))
    return b"".join(lines)


def _value_mutant(data: bytes, random: Random) -> bytes:
    """Returns a recipe with values replaced, left out, renamed or moved, as JSON, which is YAML."""
    changed = value_mutant(yaml.load(data, yaml.SafeLoader), random, VALUES)
    return json.dumps(changed).encode("utf-8", "surrogatepass")


KINDS: dict[str, Callable[[bytes, Random], bytes]] = {
    "bytes": _bytes_mutant,
    "lines": _line_mutant,
    "both": lambda data, random: _line_mutant(_bytes_mutant(data, random), random),
    "values": _value_mutant,
}
"""What is changed of a recipe."""


def is_loaded(file: Path, shown: Console) -> bool:
    """Returns whether a recipe is loaded, and not refused; raises where anything else happens."""
    try:
        loaded = recipe.load(file)
        check_method(loaded)
    except RecipeError as error:
        str(error).encode()
        console.print_error(error, to=shown)
        return False
    file.write_text(recipe.dump(loaded.recipe), encoding="utf-8", newline="")
    assert recipe.load(file).recipe == loaded.recipe, "written down, it is another recipe"
    return True
