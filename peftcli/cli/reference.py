"""Commands that look things up: methods, recipes, schema, env."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any

import typer

import peftcli
from peftcli.cli import console
from peftcli.cli.training import AsJson
from peftcli.errors import RecipeError, did_you_mean


def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to read all about it.", show_default=False)] = None,
    json: AsJson = False,
) -> None:
    """List the methods, or describe one: its equation, fields and defaults."""
    from peftcli.recipe import method_names

    if name is None:
        lines = {method: _docstring(method).splitlines()[0] for method in method_names()}
        console.print_json(lines) if json else console.print_table(["method", ""], [list(row) for row in lines.items()])
        return
    if name not in method_names():
        hint = did_you_mean(name, method_names()) or f"there are {', '.join(method_names())}"
        raise RecipeError(f'there is no method "{name}"', hint=hint)
    fields = _method_fields(name)
    if json:
        console.print_json({"method": name, "description": _docstring(name), "fields": fields})
        return
    console.stdout.print(_docstring(name), markup=False)
    console.stdout.print()
    rows = [[key, _default(field), str(field.get("description", ""))] for key, field in fields.items() if key != "type"]
    console.print_table(["field", "default", ""], rows)


def _docstring(method: str) -> str:
    """Returns the docstring of a method's file, read without importing it, which would import torch."""
    source = Path(peftcli.__file__).parent / "methods" / f"{method}.py"
    return ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""


def _method_fields(method: str) -> dict[str, Any]:
    """Returns the JSON schema's properties of a method's fields."""
    from peftcli.recipe import json_schema

    for definition in json_schema()["$defs"].values():
        properties: dict[str, Any] = definition.get("properties", {})
        if properties.get("type", {}).get("const") == method:
            return properties
    raise RecipeError(f"the schema does not know {method}", hint="write it anew: make schema")


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    return "" if value is None else str(value)


def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe, to print it.", show_default=False)] = None,
    json: AsJson = False,
) -> None:
    """List the recipes that come with peftcli, or print one to start from."""
    folder = _recipes_folder()
    found = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name is not None:
        if name not in found:
            hint = did_you_mean(name, list(found)) or f"there are {', '.join(found)}"
            raise RecipeError(f'there is no recipe "{name}"', hint=hint)
        typer.echo(found[name].read_text(encoding="utf-8"), nl=False)
        return
    titles = {stem: _title(path) for stem, path in found.items()}
    if json:
        console.print_json(titles)
        return
    console.print_table(["recipe", ""], [list(row) for row in titles.items()])
    console.stderr.print("\npeftcli recipes NAME prints one: peftcli recipes quickstart > my_recipe.yaml")


def _recipes_folder() -> Path:
    """Returns the recipes' folder: inside an installed package, beside the package in a clone."""
    package = Path(peftcli.__file__).parent
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def _title(path: Path) -> str:
    """Returns the first line of a recipe's header."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[0].lstrip("# ").strip() if lines else ""


def schema(json: Annotated[bool, typer.Option("--json", hidden=True)] = True) -> None:
    """Print the JSON Schema of recipes, for an editor's completion and checks."""
    from peftcli.recipe import json_schema

    console.print_json(json_schema())


def env(json: AsJson = False) -> None:
    """Print the versions and devices that a bug report needs."""
    import torch

    from peftcli.manifest import environment

    facts: dict[str, Any] = dict(environment())
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    facts["device"] = str(device or "cpu")
    if device is not None and device.type == "cuda":
        facts["device"] += f" ({torch.cuda.get_device_name()}, {torch.cuda.device_count()} in all)"
        facts["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    facts["cpu_threads"] = torch.get_num_threads()
    if json:
        console.print_json(facts)
    else:
        console.print_table(["", ""], [[name, str(value)] for name, value in facts.items()])
