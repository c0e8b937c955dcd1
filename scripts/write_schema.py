"""Writes `peftcli/recipe/schema.json` from the recipe's models and every method's `Config`. Imports torch."""

from __future__ import annotations

import json

from peftcli import methods
from peftcli.recipe.shipped import SCHEMA_FILE, build_schema


def schema_text() -> str:
    """Returns what the file should hold."""
    schema = build_schema({name: methods.load(name).Config for name in methods.names()})
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
    print(f"wrote {SCHEMA_FILE}")
