"""Writes `peftcli/recipe/schema.json` from the recipe's models and every method's class. Imports torch and PEFT."""

from __future__ import annotations

import json
from typing import Any, get_args

from peft import PeftType

from peftcli import methods
from peftcli.data.meaning import GOALS
from peftcli.methods._place import Kind
from peftcli.methods._protocol import Method
from peftcli.recipe.shipped import SCHEMA_FILE, build_schema


def facts_of(method: type[Method]) -> dict[str, Any]:
    """Returns what `peftcli methods NAME` says of a method beside its docstring and fields, with the fields' defaults.

    `merge` and `lora_export` are true, or why not; `nearest_lora` is the option of `export` that writes a near one.
    """
    config = method.Config()
    unmergeable, not_low_rank = method.unmergeable(config), method.not_low_rank(config)
    nearest = None
    if not_low_rank is not None and hasattr(method, "averaged_low_rank"):
        nearest = "--lossy"
    elif not_low_rank is not None and unmergeable is None and method.place == "targets":
        nearest = "--rank"
    peft_type = method.peft_type_of(config)
    return {
        "default_learning_rate": method.default_learning_rate,
        "default_head_learning_rate": method.default_head_learning_rate or method.default_learning_rate,
        "place": method.place,
        "kinds": [kind for kind in get_args(Kind) if method.place == "targets" and kind in method.kinds],
        "tasks": [task for task in GOALS if method.tasks is None or task in method.tasks],
        "starts_as_base": method.starts_as_base,
        "merge": unmergeable or True,
        "lora_export": not_low_rank or True,
        "nearest_lora": nearest,
        "peft_type": peft_type,
        "in_peft": peft_type in PeftType.__members__,
    }


def schema_text() -> str:
    """Returns what the file should hold."""
    found = {name: methods.load(name) for name in methods.names()}
    schema = build_schema(
        {name: method.Config for name, method in found.items()},
        {name: facts_of(method) for name, method in found.items()},
    )
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
    print(f"wrote {SCHEMA_FILE}")
