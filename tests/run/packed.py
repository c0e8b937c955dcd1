"""Model folders that come packed, as transformers saves them."""

import json
from pathlib import Path

import torch

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 5.0},
}
"""What transformers' BitsAndBytesConfig is given for each."""


def save_packed(kind, base, folder, auto="AutoModelForCausalLM", **changes):
    """Writes the model in `base` into `folder`, packed, with its tokenizer; returns the folder."""
    import transformers

    settings = transformers.BitsAndBytesConfig(**{**KINDS[kind], **changes})
    saving = {"max_shard_size": "40KB"} if kind == "fp4" else {}  # scales in another shard than their weights
    model = getattr(transformers, auto).from_pretrained(base, dtype=torch.bfloat16, quantization_config=settings)
    model.save_pretrained(folder, **saving)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def change_config(folder, **fields):
    """Changes what a folder's config.json says of its quantisation."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= fields
    path.write_text(json.dumps(config))
