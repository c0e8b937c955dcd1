"""Mutants of adapter folders: each is refused, or fits its base and is what its run wrote, where that can be told."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from peftcli import inject, methods, models
from peftcli.checkpoint.adapter import CONFIG_FILE, WEIGHTS_FILE, Origin, read_adapter, require_fit, save_adapter
from peftcli.checkpoint.seal import SEAL_FILE
from peftcli.errors import ModelError
from scripts.torture import tensors
from scripts.torture.fuzzing import Fuzzing
from scripts.torture.mutations import bytes_mutant, json_mutant, value_mutant
from scripts.torture.outcome import Order, Outcome

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

UNIT, SHORT, LONG = "mutants", 500, 20_000
METHODS: dict[str, dict[str, Any]] = {
    **{
        name: {"type": name}
        for name in ("lora", "dora", "dvora", "vera", "prompt", "prefix", "adapter", "ia3", "bitfit")
    },
    **{name: {"type": name} for name in ("ln_tuning", "hydralora")},
    "adalora": {"type": "adalora", "r": 6, "target_r": 4},
    "vblora": {"type": "vblora", "vector_length": 8},
}


@dataclass(frozen=True)
class Seed:
    """An adapter's files as they were written."""

    config: bytes
    weights: bytes
    seal: bytes


def run(order: Order) -> Outcome:
    """Reads `order.count` mutants of folders, shared out over methods and files."""
    outcome = Outcome("mutants of adapter folders, each refused or read and fitted to its base")
    random, fuzzing, folder = order.random("adapters"), Fuzzing("adapters", outcome, order.count), order.folder
    skeleton = models.skeleton(base_config())
    seeds = [made(fields, folder / name) for name, fields in METHODS.items()]
    for _ in range(order.count):
        seed, kind = random.choice(seeds), random.choice(tuple(KINDS))
        changed = KINDS[kind](seed, random)
        for name, content in files_of(changed).items():
            (folder / name).write_bytes(content)
        (folder / SEAL_FILE).unlink(missing_ok=True)
        fuzzing.ask(kind, changed.config, partial(is_read, folder, skeleton))
        (folder / SEAL_FILE).write_bytes(changed.seal)
        same = fields_of(changed) == fields_of(seed) and changed.weights == seed.weights
        is_lie = not same and changed.seal == seed.seal
        fuzzing.ask(f"{kind}, sealed", changed.config, partial(is_believed, folder, skeleton, is_lie))
    return fuzzing.finish()


def base_config() -> PretrainedConfig:
    """Returns the configuration of a tiny model."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
        attention_bias=True,
    )


def made(fields: Mapping[str, Any], folder: Path) -> Seed:
    """Returns a fresh adapter's files, written into `folder`."""
    from transformers import AutoModelForCausalLM

    method = methods.load(fields["type"])
    config = method.Config.model_validate(fields)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(base_config())
    inject.graft(model, method, config, 0)
    folder.mkdir()
    save_adapter(folder, model, Origin(method, config, "base", None, "causal-lm"))
    files = {name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)}
    return Seed(files[CONFIG_FILE], files[WEIGHTS_FILE], (folder / SEAL_FILE).read_bytes())


def files_of(seed: Seed) -> dict[str, bytes]:
    """Returns what is in the folder but for the seal."""
    return {CONFIG_FILE: seed.config, WEIGHTS_FILE: seed.weights}


def fields_of(seed: Seed) -> Any:
    """Returns what its configuration says, however that is spelled; None where it says nothing."""
    try:
        return json.loads(seed.config)
    except (ValueError, RecursionError):
        return None


def is_read(folder: Path, skeleton: PreTrainedModel) -> bool:
    """Returns whether an adapter is read and fits, and is not refused; raises where anything else happens."""
    try:
        adapter = read_adapter(folder)
        sites, _ = require_fit(skeleton, adapter)
    except ModelError as error:
        str(error).encode()
        inject.ungraft(skeleton)
        return False
    assert sites or adapter.tensors
    return not adapter.doubts


def is_believed(folder: Path, skeleton: PreTrainedModel, is_lie: bool) -> bool:
    """Returns whether an adapter is read; raises where its files are not those that were sealed."""
    taken = is_read(folder, skeleton)
    assert not (taken and is_lie), "other files were sealed"
    return taken


def _config_mutant(seed: Seed, random: Random) -> Seed:
    return Seed(json_mutant(seed.config, random), seed.weights, seed.seal)


def _weights_mutant(seed: Seed, random: Random) -> Seed:
    kind = random.choice(tuple(tensors.KINDS.values()))
    return Seed(seed.config, kind(seed.weights, random), seed.seal)


def _payload_mutant(seed: Seed, random: Random) -> Seed:
    """Returns an adapter with one bit of its numbers flipped, which PEFT does not notice."""
    length = 8 + int.from_bytes(seed.weights[:8], "little")
    at = random.randrange(length, len(seed.weights))
    flipped = seed.weights[at] ^ 1 << random.randrange(8)
    return Seed(seed.config, seed.weights[:at] + bytes([flipped]) + seed.weights[at + 1 :], seed.seal)


def _seal_mutant(seed: Seed, random: Random) -> Seed:
    if random.random() < 0.5:
        return Seed(seed.config, seed.weights, bytes_mutant(seed.seal, random))
    return Seed(seed.config, seed.weights, json.dumps(value_mutant(json.loads(seed.seal), random)).encode())


KINDS: dict[str, Callable[[Seed, Random], Seed]] = {
    "configuration": _config_mutant,
    "header": _weights_mutant,
    "numbers": _payload_mutant,
    "seal": _seal_mutant,
}
