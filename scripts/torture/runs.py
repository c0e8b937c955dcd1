"""Tiny runs that take a fraction of a second and use everything a resumed run must get right."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORDS = "the a of and to in is that it was cat dog tree house river stone runs sleeps eats sees big small red old new"

BASE: dict[str, Any] = {
    "model": {"name": "model"},
    "data": {"train": "train.jsonl", "eval": "eval.jsonl", "max_length": 48},
    "training": {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_steps": 2,
        "save_total_limit": 2,
    },
}

CASES: dict[str, dict[str, Any]] = {
    "lora": {"method": {"type": "lora", "r": 4, "dropout": 0.2}, "training": {"load_best_at_end": True}},
    "dora, accumulation 4": {
        "method": {"type": "dora", "r": 4, "dropout": 0.2},
        "training": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    },
    "vera": {"method": {"type": "vera", "r": 8, "dropout": 0.1}},
    "hydralora": {"method": {"type": "hydralora", "r": 4, "dropout": 0.1}},
    "prompt": {"method": {"type": "prompt"}},
    "adapter": {"method": {"type": "adapter", "bottleneck_size": 8}},
    "adalora": {
        "method": {
            "type": "adalora",
            "r": 6,
            "target_r": 4,
            "dropout": 0.1,
            "warmup_steps": 1,
            "final_steps": 1,
            "interval": 1,
        }
    },
    "lora, 8-bit AdamW": {
        "method": {"type": "lora", "r": 32, "target_modules": ["down_proj", "q_proj"], "dropout": 0.2},
        "training": {"optim": "adamw_8bit"},
    },
    "lora, NF4": {"method": {"type": "lora", "r": 4, "dropout": 0.2}, "quantization": {"type": "nf4"}},
    "lora, packing": {"method": {"type": "lora", "r": 4, "dropout": 0.2}, "data": {"packing": True}},
    "lora, logs across checkpoints": {
        "method": {"type": "lora", "r": 4, "dropout": 0.2},
        "training": {"logging_steps": 3, "gradient_accumulation_steps": 2},
    },
    "lora, three checkpoints": {"method": {"type": "lora", "r": 4}, "training": {"save_total_limit": 3}},
}
"""What each case's recipe has beside `BASE`."""


def write(folder: Path, case: str, output: Path, **training: Any) -> Path:
    """Writes the recipe of `case` into `folder`, which `prepare` has filled, and returns it.

    Args:
        folder: Where model and data are, and the current directory of what is run.
        case: Which of `CASES`.
        output: The run's folder.
        training: Changed fields of that section.
    """
    sections = {"training": training, "output_dir": str(output.relative_to(folder))}
    path = folder / f"{case}.yaml"
    path.write_text(json.dumps(merged(merged(BASE, CASES[case]), sections), indent=1), encoding="utf-8")
    return path  # JSON is YAML


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Returns two levels of sections and fields, those of `other` before those of `one`."""
    found = copy.deepcopy(dict(one))
    for section, fields in other.items():
        found[section] = {**found.get(section, {}), **fields} if isinstance(fields, dict) else fields
    return found


def prepare(folder: Path) -> None:
    """Fills `folder` with a tiny base model, its tokenizer, and data; nothing is computed for it."""
    model = folder / "model"
    model.mkdir(parents=True)
    _write_model(model)
    words = WORDS.split()
    rows = [
        {
            "prompt": " ".join(words[(3 * i + j) % 25] for j in range(2 + i % 4)) + " ? ",
            "completion": " ".join(words[(5 * i + 2 * j + i // 25) % 25] for j in range(2 + i % 7)),
        }
        for i in range(40)
    ]
    for name, part in (("train", rows[:32]), ("eval", rows[32:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _write_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
    from transformers.utils import logging

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    logging.disable_progress_bar()
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    ids = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", "?", *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
