"""Commands that look things up: methods, recipes, schema, env."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from json import dumps as to_json
from pathlib import Path
from typing import Annotated, Any

import typer

import peftcli
from peftcli.cli import console
from peftcli.cli.training import AsJson
from peftcli.errors import RecipeError, did_you_mean

ADAPTS = {
    "input-embedding": "the input embedding",
    "model": "the model as a whole",
    "nowhere": "nothing: parameters of the base train",
}
"""What a method without target modules adapts, by its place."""
NEAREST = {"--rank": "--rank N writes the nearest", "--lossy": "--lossy writes its mean"}
TYPES = {"boolean": "true | false", "integer": "integer", "number": "number", "object": "mapping", "string": "text"}
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
"""What the types and limits of JSON Schema are called here."""


def methods(
    name: Annotated[str | None, typer.Argument(help="A method, to read all about it.", show_default=False)] = None,
    json: AsJson = False,
) -> None:
    """List the methods, or describe one: its paper and equation, fields and defaults, and what it can do."""
    from peftcli.recipe import method_names
    from peftcli.recipe.shipped import FACTS, method_definition
    from peftcli.recipe.shorthands import SHORTHANDS

    names = sorted((*method_names(), *SHORTHANDS))
    if name is None:
        lines = {method: _docstring(method).splitlines()[0] for method in names}
        console.print_json(lines) if json else console.print_table(["method", ""], [list(row) for row in lines.items()])
        return
    if name not in names:
        hint = did_you_mean(name, names) or f"there are {', '.join(names)}"
        raise RecipeError(f'there is no method "{name}"', hint=hint)
    definition = method_definition(SHORTHANDS[name].method if name in SHORTHANDS else name)
    text, fields, facts = _docstring(name), definition["properties"], definition[FACTS]
    papers = [f"https://arxiv.org/abs/{number}" for number in dict.fromkeys(re.findall(r"\b\d{4}\.\d{5}\b", text))]
    if json:
        console.print_json({"method": name, "description": text, "papers": papers, **facts, "fields": fields})
        return
    console.stdout.print(text, markup=False)
    console.stdout.print()
    rows = [
        [key, _as_yaml(field.get("default")), _values(field), str(field.get("description", ""))]
        for key, field in fields.items()
        if key != "type"
    ]
    if rows:
        console.print_table(["field", "default", "values", ""], rows)
        console.stdout.print()
    console.print_table(["with these defaults", ""], _fact_rows(facts, fields, papers))


def _docstring(method: str) -> str:
    """Returns the docstring of a method's file, read without importing it, which would import torch."""
    from peftcli.recipe.shorthands import SHORTHANDS

    if method in SHORTHANDS:
        return SHORTHANDS[method].about
    source = Path(peftcli.__file__).parent / "methods" / f"{method}.py"
    return ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""


def _fact_rows(facts: Mapping[str, Any], fields: Mapping[str, Any], papers: list[str]) -> list[list[str]]:
    """Returns what a method can do, a row each: the facts that the schema holds, in words."""
    adapts = ADAPTS.get(facts["place"])
    if adapts is None:
        adapts = f"modules of kind {', '.join(facts['kinds'])}; target_modules: {fields['target_modules']['default']}"
    reader = "which PEFT reads and writes too" if facts["in_peft"] else "which PEFT does not have"
    nearest = f"; {NEAREST[facts['nearest_lora']]}" if facts["nearest_lora"] else ""
    rows = {
        "learning rate": f"{facts['default_learning_rate']:g}",
        "  of a new task head": f"{facts['default_head_learning_rate']:g}",
        "adapts": adapts,
        "tasks": ", ".join(facts["tasks"]),
        "starts as its base": "yes" if facts["starts_as_base"] else "no",
        "merges": _yes_or_why_not(facts["merge"]),
        "exports to LoRA": _yes_or_why_not(facts["lora_export"]) + nearest,
        "peft_type of its files": f"{facts['peft_type']}, {reader}",
        "papers": "  ".join(papers) or "none",
    }
    return [list(row) for row in rows.items()]


def _yes_or_why_not(fact: bool | str) -> str:
    return "yes" if fact is True else f"no: {fact}"


def _as_yaml(value: Any) -> str:
    """Returns a default as a recipe would say it; nothing where there is none."""
    return "" if value is None else value if isinstance(value, str) else to_json(value)


def _values(field: Mapping[str, Any]) -> str:
    """Returns what a field takes, from its JSON schema: `integer ≥ 1`, `branch | paper`."""
    options = [option for option in field.get("anyOf", [field]) if option.get("type") != "null"]
    return " | ".join(_option(option) for option in options)


def _option(option: Mapping[str, Any]) -> str:
    if "enum" in option or "const" in option:
        return " | ".join(map(str, option.get("enum", [option.get("const")])))
    if option["type"] == "array":
        return f"[{_values(option['items'])}, …]"
    limits = [f"{sign} {option[name]:,}" for name, sign in LIMITS.items() if name in option]
    return " ".join([TYPES[option["type"]], ", ".join(limits)]).strip()


def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe, to print it.", show_default=False)] = None,
    json: AsJson = False,
) -> None:
    """List the recipes that come with peftcli, or print one to start from."""
    folder = _recipes_folder()
    files = sorted(folder.glob("**/*.yaml"), key=lambda path: (len(path.parts), path))  # the papers' come last
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}
    if name is not None:
        if name not in found:
            hint = did_you_mean(name, list(found)) or f"there are {', '.join(found)}"
            raise RecipeError(f'there is no recipe "{name}"', hint=hint)
        typer.echo(found[name].read_text(encoding="utf-8"), nl=False)
        return
    titles = {key: _title(path) for key, path in found.items()}
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
