"""How long a command takes until it is of use: help, checks, and the first step of a training.

Training is timed up to the line that says that its first optimizer step is done, and so is what a script needs at the
least: imports, `from_pretrained`, and one step of the same model on as many tokens, all weights frozen but the norms'.
`peftcli train` beside that reads a recipe and 1,000 rows, tokenises them, checks all of it, and begins a run's folder.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.bench import runs, timing
from scripts.bench.table import Cell, Options, Table

if TYPE_CHECKING:
    from scripts.bench.timing import Measurement

BARE, PEFT, TRAIN = "a bare script, one step", "the same with PEFT's LoRA", "peftcli train, one step"
SHAPE = (2, 19)
"""Rows and tokens of the bare script's batch: 2 rows of the WordNet data have 38.6 tokens in the mean."""
STEP = "step 1"
"""What the line begins with that all of them print after their first step."""


def run(options: Options) -> list[Table]:
    """Returns the seconds of each command, and of the trainings to their first step."""
    runs.require_model(options.model)
    with tempfile.TemporaryDirectory(prefix="peftcli-bench-") as name:
        commands = contestants(Path(name), options)
        marks = dict.fromkeys(commands.keys() & {BARE, PEFT, TRAIN}, STEP)
        found = timing.medians(timing.processes(commands, options.rounds, options.threads, marks))
    notes = (
        f"{options.model.name}; medians of {options.rounds} rounds of fresh processes. First step: until its line is "
        "printed. To the end, a training also writes a checkpoint and the adapter.",
    )
    return [Table("From the command to its use", rows(found), notes)]


def contestants(folder: Path, options: Options) -> dict[str, list[str]]:
    """Returns each command; of a smoke run, those that cost least."""
    training = {**runs.ONE_STEP, "per_device_train_batch_size": SHAPE[0]}
    recipe = runs.write_recipe(folder, "startup", options.model, runs.LORA, training)
    mine = [sys.executable, "-m", "scripts.bench.startup", str(options.model)]
    commands = {
        "peftcli --help": [*runs.PEFTCLI, "--help"],
        "peftcli validate --form-only": [*runs.PEFTCLI, "validate", "--form-only", recipe],
        "peftcli validate": [*runs.PEFTCLI, "validate", recipe],
        TRAIN: [*runs.PEFTCLI, "train", recipe, "--overwrite"],
        BARE: [*mine, "norms"],
        PEFT: [*mine, "lora"],
    }
    cheap = ("peftcli --help", TRAIN, BARE)
    return {name: command for name, command in commands.items() if name in cheap or not options.smoke}


def rows(found: Mapping[str, Measurement]) -> dict[str, dict[str, Cell]]:
    """Returns the figures of all commands; ratios are those of the first steps to the bare script's."""
    least = found[BARE].marked
    assert least is not None
    return {
        name: {
            "to the end, seconds": one.seconds,
            "first step, seconds": one.marked,
            "ratio": None if one.marked is None else one.marked / least,
            "peak GB": one.peak_gb,
        }
        for name, one in found.items()
    }


def bare(model_name: str, trained: str) -> None:
    """Does one step, of the norms or of PEFT's LoRA, and says so."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_name, use_cache=False).train()
    if trained == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    else:
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.ndim == 1)
    ids = torch.randint(model.config.vocab_size, SHAPE)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4, fused=True)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    print(STEP, flush=True)


if __name__ == "__main__":
    bare(*sys.argv[1:])
