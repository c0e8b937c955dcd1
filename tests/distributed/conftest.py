"""Runs of several processes: two on this machine over gloo, as torchrun starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import reset_accelerate, tiny_llama_config, write_jsonl
from tests.distributed import worker

ROOT = Path(__file__).parents[2]
ROWS = 29
"""Training rows: in steps of four, an epoch's last one has a single sample, so a process gets an empty batch."""


def environment(**changes):
    """Returns an environment in which a new process finds the package and the tests, and is nobody's worker."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC", "GROUP_", "PEFTCLI_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


class Workplace:
    """A folder with a tiny model, data and recipes, and the runs that were made there."""

    def __init__(self, folder, tokenizer, rows):
        from transformers import AutoModelForCausalLM

        self.folder = folder
        torch.manual_seed(7)
        AutoModelForCausalLM.from_config(tiny_llama_config()).save_pretrained(folder / "tiny")
        tokenizer.save_pretrained(folder / "tiny")
        write_jsonl(folder / "train.jsonl", rows[:ROWS])
        write_jsonl(folder / "eval.jsonl", rows[ROWS:])

    def recipe(self, name, method, **training):
        """Writes a recipe of 12 steps of four samples and returns its path."""
        folder = self.folder
        settings = {"max_steps": 12, "per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 6, **training}
        values = {
            "model": {"name": str(self.folder / "tiny")},
            "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "max_length": 64},
            "method": method,
            "training": settings,
            "output_dir": str(self.folder / name),
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(json.dumps(values))
        return path

    def job(self, name, recipe, *overrides, resume=False, under=None):
        """Returns what a worker is to train: `recipe`, into the folder `name`, `under` one of its circumstances."""
        changes = [f"output_dir={self.folder / name}", *overrides]
        return {"recipe": str(recipe), "overrides": changes, "resume": resume, "under": under}

    def alone(self, jobs):
        """Does the jobs in this process."""
        file = self.folder / "alone.json"
        file.write_text(json.dumps(jobs))
        worker.main(file)
        reset_accelerate()

    def together(self, jobs, count=2):
        """Does the jobs in `count` processes that torchrun starts, one job after the other."""
        file = self.folder / "together.json"
        file.write_text(json.dumps(jobs))
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        done = subprocess.run(
            [*start, "-m", "tests.distributed.worker", str(file)],
            env=environment(XDG_CACHE_HOME=str(self.folder / "cache")),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=220,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]

    def adapter(self, name):
        """Returns the tensors of a run's adapter."""
        return load_file(self.folder / name / "adapter_model.safetensors")

    def metrics(self, name):
        """Returns what a run logged."""
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def manifest(self, name):
        return json.loads((self.folder / name / "manifest.json").read_text())


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, word_tokenizer, rows):
    return Workplace(tmp_path_factory.mktemp("distributed"), word_tokenizer, rows)


def furthest(one, other):
    """Returns the largest difference between two adapters' tensors."""
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)
