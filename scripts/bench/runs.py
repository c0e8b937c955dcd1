"""What the parts that start whole runs share: the model, the data, and a recipe for them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN_FILE = REPOSITORY / "recipes/data/wordnet_train.jsonl"
PEFTCLI = (sys.executable, "-m", "peftcli")
LORA = {"type": "lora", "r": 16, "alpha": 32}
ONE_STEP = {"max_steps": 1, "warmup_ratio": 0, "logging_steps": 1}
"""Training fields of a run that changes the adapter once, without warm-up's first rate of 0."""


def require_model(model: Path) -> None:
    """Ends the benchmark where there is no model in the folder `model`."""
    if not model.is_dir():
        sys.exit(f"error: there is no model in {model}\n\nhint: make model, or name another one with --model")


def write_recipe(folder: Path, name: str, model: Path, method: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """Writes `folder`/`name`.yaml, a recipe for the WordNet data, and returns its path. Its run goes to out-`name`."""
    recipe = {
        "model": {"name": str(model)},
        "data": {"train": str(TRAIN_FILE), "max_length": 256},
        "method": dict(method),
        "training": dict(training),
        "output_dir": str(folder / f"out-{name}"),
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return str(path)
