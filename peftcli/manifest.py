"""What a run says about itself when it is done: `manifest.json` for programs, a model card for people."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peftcli
from peftcli import files, inject, quantization
from peftcli.checkpoint import adapter as adapter_files
from peftcli.data.dataset import EncodedDataset
from peftcli.models import TASK_CLASSES

if TYPE_CHECKING:
    from torch import nn
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from peftcli.data import Dataset, PreparedData
    from peftcli.recipe import Recipe
    from peftcli.training.loop import Result

MANIFEST_FILE = "manifest.json"
PACKAGES = (
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "tokenizers",
    "safetensors",
    "bitsandbytes",
    "liger-kernel",
)
RUN_FILES = (
    "recipe.yaml",
    "adapter_*",
    MANIFEST_FILE,
    "metrics.jsonl",
    "README.md",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "labels.json",
    "checkpoint-*",
    "merged",
    "lora",
    "tensorboard",
)
"""Globs of what a run writes into its folder, and so of what replacing a run removes.

The recipe goes first: without it there is nothing to resume, so a crash among these leaves no run of which half is old.
"""

FREE_TO_CHANGE = {
    "training.logging_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.eval_steps",
    "training.load_best_at_end",
    "training.per_device_eval_batch_size",
    "logging.report_to",
    "evaluation.generate",
    "output_dir",
}
"""Recipe keys that do not change what the remaining steps compute; any other may not change when a run is resumed."""
CUTS_STEPS = (
    "training.per_device_train_batch_size",
    "training.gradient_accumulation_steps",
    "distributed.strategy",
    "distributed.num_processes",
    "distributed.timeout",
    "distributed.deepspeed_config",
)
"""Recipe keys that decide how a step is shared out; they may change as long as a step takes as many samples."""


def changed_fields(wanted: Recipe, before: Recipe) -> dict[str, tuple[Any, Any]]:
    """Returns the keys that would change what a resumed run computes, each with its value before and now.

    A data format of `auto` agrees with whatever the run settled on.
    """
    now, then = _flat(wanted.model_dump()), _flat(before.model_dump())
    if now["data.format"] == "auto":
        now["data.format"] = then["data.format"]
    keys = (key for key in now | then if not any(key == free or key.startswith(free + ".") for free in FREE_TO_CHANGE))
    return {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        flat.update(_flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def parameter_counts(model: nn.Module) -> dict[str, int | float]:
    """Returns how many parameters of an adapted model are which. Works on the meta device.

    `trainable_params` all that train, with those of the task's head (`head_params`) and of routers (`router_params`);
    `base_params` what the model had before, head aside; `total_params` all; `trainable_percent` trainable / total.
    A weight that is held in 4 bits counts as what it stands for.
    """
    sizes = {name: quantization.num_weights(parameter) for name, parameter in model.named_parameters()}
    total, head = sum(sizes.values()), sum(sizes[name] for name in inject.head_parameters(model))
    added = router = 0
    for part in inject.parts(model).values():
        own = dict(part.named_parameters())
        added += sum(parameter.numel() for parameter in own.values())
        router += sum(own[name].numel() for name in part.router_parameters if name in own)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "trainable_params": trainable,
        "head_params": head,
        "router_params": router,
        "base_params": total - added - head,
        "total_params": total,
        "trainable_percent": 100 * trainable / total,
    }


def environment() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    found = {"peftcli": peftcli.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe(
    run: Path,
    recipe: Recipe,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase | BaseImageProcessor,
    revision: str | None,
    model: PreTrainedModel,
    prepared: PreparedData,
    result: Result,
) -> dict[str, Any]:
    """Returns the manifest of a finished run."""
    template = getattr(tokenizer, "chat_template", None)
    return {
        "recipe_sha256": files.sha256(run / "recipe.yaml"),
        "method": recipe.method["type"],
        "task": recipe.model.task,
        "base_model": {"name": recipe.model.name, "revision": revision, "type": config.model_type},
        "quantization": _held(recipe, config),
        "adapted_modules": len(inject.adapters(model)),
        "data": {
            "format": prepared.format,
            "labels": list(prepared.labels) if prepared.labels is not None else None,
            "train": _dataset(prepared.train),
            "eval": _dataset(prepared.eval) if prepared.eval is not None else None,
            "chat_template_sha256": hashlib.sha256(str(template).encode()).hexdigest() if template else None,
        },
        "seed": recipe.training.seed,
        "device": str(model.device),
        "result": {
            "steps": result.progress.step,
            "supervised_tokens": result.progress.tokens,
            "seconds": round(result.seconds, 2),
            "train": dict(result.last_log),
            "eval": dict(result.last_evaluation),
            "best_eval_loss": result.progress.best_loss,
            "best_step": result.progress.best_step,
        },
        "adapter_sha256": files.sha256(run / adapter_files.WEIGHTS_FILE),
        "environment": environment(),
    }


def _held(recipe: Recipe, config: PretrainedConfig) -> dict[str, Any] | None:
    """Returns how the base was packed, by the recipe or in its own checkpoint; None where it was not."""
    section = recipe.quantization or quantization.stored_section(config, recipe.model.name)
    return section.model_dump() if section is not None else None


def _dataset(samples: Dataset) -> dict[str, Any]:
    tokens = {"tokens": len(samples.input_ids)} if isinstance(samples, EncodedDataset) else {}
    return {"samples": len(samples), **tokens, "sha256": samples.fingerprint}


def model_card(facts: Mapping[str, Any], recipe_text: str) -> str:
    """Returns the run's README.md: what the adapter is, how it did, and the recipe that repeats it."""
    base, result, counts = facts["base_model"], facts["result"], facts["parameters"]
    evaluation, labels, auto = result["eval"], facts["data"]["labels"], TASK_CLASSES[facts["task"]]
    counted = "supervised tokens" if labels is None or facts["task"] == "token-classification" else "labelled samples"
    rows = [
        ("Method", facts["method"]),
        ("Base model", f"`{base['name']}`" + (f" at `{base['revision']}`" if base["revision"] else "")),
        ("Trained parameters", f"{counts['trainable_params']:,} ({counts['trainable_percent']:.3f} % of all)"),
        ("Optimizer steps", f"{result['steps']:,} over {result['supervised_tokens']:,} {counted}"),
        ("Training loss", f"{result['train']['loss']:.4f}" if result["train"] else "not logged"),
        ("Evaluation loss", f"{evaluation['eval_loss']:.4f}" if evaluation else "not evaluated"),
    ]
    if labels is not None:
        rows.insert(2, ("Labels", ", ".join(labels)))
    if facts["quantization"] is not None:
        rows.insert(2, ("Base held in", facts["quantization"]["type"]))
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
base_model: {base["name"]}
library_name: peft
tags: [peftcli, {facts["method"]}]
---

# {facts["method"]} adapter for {Path(base["name"]).name}

| | |
| --- | --- |
{table}

This folder is an adapter in PEFT's format:

```python
from peft import PeftModel
from transformers import {auto}

model = {auto}.from_pretrained("{base["name"]}"{f", num_labels={len(labels)}" if labels is not None else ""})
model = PeftModel.from_pretrained(model, "path/to/this/folder")
```

`peftcli train recipe.yaml output_dir=DIR` repeats the run; `manifest.json` has versions, hashes and all figures.

```yaml
{recipe_text.rstrip()}
```
"""
