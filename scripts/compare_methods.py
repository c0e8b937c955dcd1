"""Trains every method on the shipped classification set with a real encoder and prints what each reached.

    make encoder
    python scripts/compare_methods.py            # a quarter of an hour on two CPU cores
    python scripts/compare_methods.py --methods lora vera --epochs 3

Each method runs at its own default learning rate and size, on the same data in the same order, so the table says how
the defaults do on one small task with one seed. It is no ranking of the methods.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peftcli import recipe
from peftcli.errors import PeftcliError
from peftcli.recipe import method_names
from peftcli.reporting import Silent
from peftcli.run.applying import evaluate
from peftcli.run.folder import TrainOptions
from peftcli.run.subject import open_subject
from peftcli.run.training import train

ENCODER = "~/.cache/peftcli/all-MiniLM-L6-v2"
DATA = Path(__file__).parent.parent / "recipes" / "data"
SIZES: dict[str, dict[str, Any]] = {"vblora": {"vector_length": 128}, "waveft": {"n_frequency": 1024}}
"""Fields without which a method's defaults do not fit layers this small."""


def main() -> None:
    """Prints the table, as Markdown or as JSON."""
    parser = argparse.ArgumentParser(description="Train every method on one classification set.")
    parser.add_argument("--methods", nargs="+", default=list(method_names()), choices=method_names())
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--model", default=ENCODER, help="an encoder's folder (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="peftcli-compare-") as folder:
        for name in args.methods:
            try:
                rows.append(run(name, args.model, args.epochs, Path(folder)))
            except PeftcliError as error:
                sys.exit(f"error: {name}: {error}")
            print(describe(rows[-1]), file=sys.stderr, flush=True)
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    print("| method | trained parameters | untrained accuracy | accuracy | seconds |\n| --- | --- | --- | --- | --- |")
    print("\n".join(describe(row) for row in rows))


def run(name: str, model: str, epochs: float, folder: Path) -> dict[str, Any]:
    """Returns what training and evaluating the method called `name` gave."""
    values = {
        "model": {"name": model, "task": "sequence-classification"},
        "data": {
            "train": str(DATA / "wordnet_category_train.jsonl"),
            "eval": str(DATA / "wordnet_category_test.jsonl"),
            "max_length": 64,
        },
        "method": {"type": name, **SIZES.get(name, {})},
        "training": {"num_train_epochs": epochs, "per_device_train_batch_size": 16},
        "output_dir": str(folder / name),
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    started = time.monotonic()
    facts = train(recipe.load(path), TrainOptions("cpu"), Silent(), lambda segments: None)
    seconds = time.monotonic() - started
    measured = evaluate(open_subject(folder / name, None, None), None, None, "cpu", Silent())
    counts = facts["parameters"]
    return {
        "method": name,
        "trained": counts["trainable_params"] - counts["head_params"],
        "head": counts["head_params"],
        "base_accuracy": measured["base"]["eval_accuracy"],
        "accuracy": measured["adapter"]["eval_accuracy"],
        "loss": measured["adapter"]["eval_loss"],
        "seconds": round(seconds, 1),
    }


def describe(row: dict[str, Any]) -> str:
    """Returns a row of the table; the head's parameters come after the method's own."""
    return (
        f"| {row['method']} | {row['trained']:,} + {row['head']:,} | {row['base_accuracy']:.1%} | "
        f"{row['accuracy']:.1%} | {row['seconds']:.0f} |"
    )


if __name__ == "__main__":
    main()
