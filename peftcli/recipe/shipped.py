"""The recipe's JSON schema: what the package ships, and how it is made.

`schema.json` exists because the methods' fields are declared beside their maths, which imports torch; with the file,
names can be checked, methods described and editors helped without it. `scripts/write_schema.py` makes it, a test keeps
it current.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from peftcli.errors import RecipeError
from peftcli.recipe.schema import Recipe
from peftcli.recipe.shorthands import SHORTHANDS

SCHEMA_FILE = Path(__file__).with_name("schema.json")
FACTS = "x-peftcli"
"""The keyword of a method's definition that holds what else is known of it; JSON Schema ignores what starts so."""
_METHODS = Path(__file__).parent.parent / "methods"


def method_names() -> tuple[str, ...]:
    """Returns the names that `method.type` can have: the files of `peftcli/methods`, which are not imported."""
    return tuple(sorted(file.stem for file in _METHODS.glob("*.py") if not file.stem.startswith("_")))


def json_schema() -> dict[str, Any]:
    """Returns the shipped JSON schema (draft 2020-12) of a recipe file."""
    schema: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return schema


def method_definition(name: str) -> dict[str, Any]:
    """Returns a method's definition in the shipped schema: its fields under `properties`, what else is under `FACTS`.

    Raises:
        RecipeError: The schema does not know the method yet.
    """
    definition: dict[str, Any] | None = json_schema()["$defs"].get(f"method-{name}")
    if definition is None:
        raise RecipeError(f"the schema does not know {name}", hint="write it anew: make schema")
    return definition


@cache
def method_fields() -> Mapping[str, tuple[str, ...]]:
    """Returns the names of each method's fields, `type` first, as the shipped schema has them."""
    definitions = json_schema()["$defs"]
    methods = (name.removeprefix("method-") for name in definitions if name.startswith("method-"))
    choices = ((name, definitions[f"method-{name}"]["properties"]) for name in methods)
    return {name: ("type", *(field for field in fields if field != "type")) for name, fields in choices}


def build_schema(configs: Mapping[str, type[BaseModel]], facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the JSON schema of a recipe whose `method` is one of `configs`, given by the methods' names.

    Args:
        configs: The fields of each method.
        facts: What else is to be known of each.
    """
    schema = Recipe.model_json_schema()
    definitions: dict[str, Any] = schema["$defs"]
    for name, config in configs.items():
        method = config.model_json_schema(ref_template=f"#/$defs/{name}-{{model}}")
        definitions |= {f"{name}-{inner}": value for inner, value in method.pop("$defs", {}).items()}
        definitions[f"method-{name}"] = {**method, "title": f"method: {name}", FACTS: dict(facts[name])}
    for name, short in SHORTHANDS.items():
        if short.method in configs:
            kind = definitions[f"method-{short.method}"]["properties"]["type"]
            kind["enum"] = [*kind.get("enum", [kind.pop("const", short.method)]), name]
    properties = {"extends": _EXTENDS, **schema.pop("properties")}
    choices = [{"$ref": f"#/$defs/method-{name}"} for name in configs]
    properties["method"] = {"description": properties["method"]["description"], "anyOf": choices}
    # A recipe that extends another may leave to it what is required of the whole.
    whole = {"required": schema.pop("required"), "properties": {"method": {"required": ["type"]}}}
    for section in ("model", "data"):
        definition = definitions[properties[section]["$ref"].removeprefix("#/$defs/")]
        whole["properties"][section] = {"required": definition.pop("required")}
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "peftcli recipe"}
    return {**head, "properties": properties, "if": {"not": {"required": ["extends"]}}, "then": whole}


_EXTENDS = {
    "anyOf": [{"type": "string"}, {"items": {"type": "string"}, "type": "array"}],
    "description": "Recipes to start from, relative to this file; what this file says goes before what they say.",
    "title": "Extends",
}
