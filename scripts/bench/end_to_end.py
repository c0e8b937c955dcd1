"""From typing the command to the saved adapter: peftcli against TRL.

Both fine-tune the model with LoRA (r 16, alpha 32, dropout 0.05, all linear layers) for 20 steps of 8 rows of the
WordNet data. TRL gets OMP_NUM_THREADS, which `accelerate launch` would otherwise set to 1 and so halve its speed.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from scripts.bench import runs, timing
from scripts.bench.table import Cell, Options, Table

TRL = runs.REPOSITORY / ".venv-bench/bin/trl"
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def run(options: Options) -> list[Table]:
    """Returns seconds, peaks and last losses of whole runs, and their ratios to peftcli's LoRA."""
    runs.require_model(options.model)
    steps = 1 if options.smoke else 20
    with tempfile.TemporaryDirectory(prefix="peftcli-bench-") as name:
        commands = contestants(Path(name), steps, options)
        found = timing.medians(timing.processes(commands, options.rounds, options.threads))
        losses = last_losses(Path(name))
    first = next(iter(found.values()))
    rows: dict[str, dict[str, Cell]] = {
        name: {
            "seconds": one.seconds,
            "ratio": one.seconds / first.seconds,
            "peak GB": one.peak_gb,
            "ratio of peaks": one.peak_gb / first.peak_gb,
            "last loss": losses.get(name),
        }
        for name, one in found.items()
    }
    notes = (
        f"{options.model.name}, {steps} steps of 8 rows, float32; medians of {options.rounds} rounds. The peak is "
        "that of the largest process. The last loss is the mean over the last five steps, of each tool's own order of "
        "samples.",
    )
    return [Table("From the command to the saved adapter", rows, notes)]


def contestants(folder: Path, steps: int, options: Options) -> dict[str, list[str]]:
    """Returns each contestant's command; writes what they read into `folder`."""
    commands = {
        LABELS[method]: [*runs.PEFTCLI, "train", write_recipe(folder, method, options.model, steps), "--overwrite"]
        for method in (("lora",) if options.smoke else ("lora", "dora"))
    }
    if options.smoke:
        return commands
    if TRL.exists():
        commands["trl sft LoRA"] = [str(TRL), "sft", "--config", write_trl_config(folder, options.model, steps)]
    else:
        timing.log(f"{TRL} is missing: measuring peftcli alone (make bench installs it)")
    return commands


LABELS = {"lora": "peftcli LoRA", "dora": "peftcli DoRA"}


def last_losses(folder: Path) -> dict[str, float]:
    """Returns the last training loss that each contestant logged."""
    found = {}
    for method, label in LABELS.items():
        log = folder / f"out-{method}" / "metrics.jsonl"
        if log.is_file():
            found[label] = float(json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["loss"])
    states = sorted(folder.glob("out-trl/checkpoint-*/trainer_state.json"))
    if states:
        history = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
        found["trl sft LoRA"] = next(float(entry["loss"]) for entry in reversed(history) if "loss" in entry)
    return found


def write_recipe(folder: Path, method: str, model: Path, steps: int) -> str:
    """Writes our recipe and returns its path."""
    training = {
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0,
        "logging_steps": 5,
    }
    return runs.write_recipe(folder, method, model, {**runs.LORA, "type": method, "dropout": 0.05}, training)


def write_trl_config(folder: Path, model: Path, steps: int) -> str:
    """Writes the same for `trl sft` and returns its path."""
    data = folder / "data"
    data.mkdir()
    shutil.copy(runs.TRAIN_FILE, data / "train.jsonl")
    config: dict[str, Any] = {
        "model_name_or_path": str(model),
        "dataset_name": str(data),
        "output_dir": str(folder / "out-trl"),
        "use_peft": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_modules": LINEAR_LAYERS,
        "per_device_train_batch_size": 8,
        "max_steps": steps,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "linear",
        "max_length": 256,
        "logging_steps": 5,
        "gradient_checkpointing": False,
        "bf16": False,
        "dtype": "float32",
        "use_cpu": True,
        "report_to": "none",
    }
    path = folder / "trl.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")
    return str(path)
