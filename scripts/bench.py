"""Measures peftcli against TRL, end to end, side by side in one run.

    make bench

Both fine-tune SmolLM2-135M with LoRA (r 16, alpha 32, dropout 0.05, all linear layers) for 20 steps of 8 rows of the
WordNet data, from typing the command to the saved adapter. Rounds are interleaved, since a shared machine's speed
drifts; what counts is the ratio of the medians. TRL gets OMP_NUM_THREADS, which `accelerate launch` would otherwise set
to 1 and so halve its speed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL = Path("~/.cache/peftcli/SmolLM2-135M-Instruct").expanduser()
TRAIN_FILE = REPOSITORY / "recipes/data/wordnet_train.jsonl"
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Measurement:
    """One run: wall-clock seconds, and the peak memory of its largest process in GB."""

    seconds: float
    peak_gb: float


def main() -> None:
    """Runs the benchmark and prints its table, or JSON."""
    parser = argparse.ArgumentParser(description="Measure peftcli against TRL, end to end.")
    parser.add_argument("--trl", type=Path, default=REPOSITORY / ".venv-bench/bin/trl", help="the trl program")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not MODEL.is_dir():
        sys.exit("error: the demo model is missing\n\nhint: make model")
    with tempfile.TemporaryDirectory(prefix="peftcli-bench-") as name:
        commands = contestants(Path(name), args.trl, args.steps)
        results: dict[str, list[Measurement]] = {contestant: [] for contestant in commands}
        for round_number in range(args.rounds):
            for contestant, command in commands.items():
                log(f"round {round_number + 1} of {args.rounds}: {contestant}")
                results[contestant].append(measure(command, args.threads))
    report(results, args.threads, as_json=args.json)


def contestants(folder: Path, trl: Path, steps: int) -> dict[str, list[str]]:
    """Returns each contestant's command; writes what they read into `folder`."""
    peftcli = str(Path(sys.executable).with_name("peftcli"))
    commands = {
        "peftcli LoRA": [peftcli, "train", write_recipe(folder, "lora", steps), "--overwrite"],
        "peftcli DoRA": [peftcli, "train", write_recipe(folder, "dora", steps), "--overwrite"],
    }
    if trl.exists():
        commands["trl sft LoRA"] = [str(trl), "sft", "--config", write_trl_config(folder, steps)]
    else:
        log(f"{trl} is missing: measuring peftcli alone (make bench installs it)")
    return commands


def write_recipe(folder: Path, method: str, steps: int) -> str:
    """Writes our recipe and returns its path. JSON is YAML."""
    recipe = {
        "model": {"name": str(MODEL)},
        "data": {"train": str(TRAIN_FILE), "max_length": 256},
        "method": {"type": method, "r": 16, "alpha": 32, "dropout": 0.05},
        "training": {
            "max_steps": steps,
            "per_device_train_batch_size": 8,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0,
            "logging_steps": 5,
        },
        "output_dir": str(folder / f"out-{method}"),
    }
    path = folder / f"{method}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return str(path)


def write_trl_config(folder: Path, steps: int) -> str:
    """Writes the same for `trl sft` and returns its path."""
    data = folder / "data"
    data.mkdir()
    shutil.copy(TRAIN_FILE, data / "train.jsonl")
    config: dict[str, Any] = {
        "model_name_or_path": str(MODEL),
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


def measure(command: list[str], threads: int) -> Measurement:
    """Runs a command to its end and returns what it took.

    Raises:
        SystemExit: The command failed; its output is shown.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRL_TELEMETRY": "0"}
    with tempfile.TemporaryFile() as output:
        started = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - started
        if os.waitstatus_to_exitcode(status):
            output.seek(0)
            sys.exit(f"error: {' '.join(command)} failed:\n{output.read().decode(errors='replace')[-3000:]}")
    return Measurement(seconds, usage.ru_maxrss * 1024 / 1e9)


def report(results: Mapping[str, list[Measurement]], threads: int, *, as_json: bool) -> None:
    """Prints medians, and ratios to the first contestant."""
    medians = {
        name: Measurement(
            statistics.median(run.seconds for run in runs), statistics.median(run.peak_gb for run in runs)
        )
        for name, runs in results.items()
    }
    first = next(iter(medians.values()))
    if as_json:
        rows = {name: {"seconds": m.seconds, "peak_gb": m.peak_gb} for name, m in medians.items()}
        print(json.dumps({"threads": threads, "machine": platform.processor(), "medians": rows}, indent=2))
        return
    print(f"medians of {len(next(iter(results.values())))} interleaved rounds, {threads} threads")
    print(f"{'':14}{'seconds':>9}{'ratio':>8}{'peak GB':>9}{'ratio':>8}")
    for name, median in medians.items():
        times, memory = median.seconds / first.seconds, median.peak_gb / first.peak_gb
        print(f"{name:14}{median.seconds:9.1f}{times:8.2f}{median.peak_gb:9.2f}{memory:8.2f}")


def log(text: str) -> None:
    """Prints progress to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
