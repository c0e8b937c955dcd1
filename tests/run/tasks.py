"""Recipes of every task on tiny models, for tests of what is done with a run."""

import json

from peftcli import methods
from tests.conftest import WORDS, write_jsonl
from tests.families import save_family
from tests.methods.building import SMALL

FAMILY = {
    "causal-lm": "llama",
    "seq2seq-lm": "t5",
    "sequence-classification": "bert",
    "token-classification": "bert",
}
"""The family of models that each task is tried on."""


def sentence(i):
    words = WORDS.split()
    return [words[(3 * i + 5 * j) % 25] for j in range(3 + i % 4)]


def sample(task, i):
    """Returns one row of a task's data."""
    words = sentence(i)
    if task == "causal-lm":
        return {"prompt": f"{' '.join(words)} ? ", "completion": words[0]}
    if task == "seq2seq-lm":
        return {"prompt": " ".join(words), "completion": words[0]}
    if task == "sequence-classification":
        return {"text": " ".join(words), "label": "yes" if "cat" in words else "no"}
    return {"tokens": words, "tags": ["low" if word[0] < "m" else "high" for word in words]}


def save_families(folder):
    """Saves a tiny model for each task; returns the folders by family."""
    return {name: save_family(name, folder / name) for name in set(FAMILY.values())}


def method_section(name, **fields):
    """Returns a method section of a size that fits tiny models."""
    known = methods.load(name).Config.model_fields
    return {"type": name, **{field: value for field, value in SMALL.items() if field in known}, **fields}


def recipe_of(name, task, folders, folder, *, training=None, model=None, **fields):
    """Returns the sections of a recipe for the method `name`, its data written into `folder`, for `recipe_file`."""
    rows = write_jsonl(folder / "rows.jsonl", [sample(task, i) for i in range(8)])
    settings = {"max_steps": 2, "per_device_train_batch_size": 8, "save_steps": 2, **(training or {})}
    return {
        "model": {"name": str(folders[FAMILY[task]]), "task": task, **(model or {})},
        "data": {"train": str(rows), "eval": str(rows), "max_length": 64},
        "method": method_section(name, **fields),
        "training": settings,
    }


def tensors_on_file(folder):
    """Returns the tensors of an adapter's file."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def fields_on_file(folder):
    """Returns what an adapter's adapter_config.json says."""
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
