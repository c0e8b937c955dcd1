"""Some hundred mutants of everything that is read, each loaded or refused by name; `scripts/torture` makes millions."""

import importlib
import json
import random

import pytest

from peftcli.recipe import load
from scripts.torture import adapters, recipes, rows, tensors
from scripts.torture.outcome import Order
from tests.conftest import unseal

PARTS = {"recipes": 600, "rows": 1000, "adapters": 150, "tensors": 2500}


@pytest.mark.parametrize("part", PARTS)
def test_mutants_are_accepted_or_refused(part, tmp_path):
    outcome = importlib.import_module(f"scripts.torture.{part}").run(Order(PARTS[part], tmp_path))
    assert outcome.failures == []
    figures = outcome.rows["all"]
    assert figures["mutants"] >= PARTS[part]
    assert figures["accepted"] > figures["mutants"] / 25, "almost all mutants are nonsense: they test nothing"
    assert figures["refused"] > figures["mutants"] / 10, "almost all mutants are harmless: they test nothing"


def test_what_is_mutated_is_good(tmp_path):
    """Each seed is accepted as it is."""
    tokenizer = rows.make_tokenizer()
    for suffix, (forms, write, _) in rows.KINDS.items():
        for form in forms:
            (tmp_path / f"d{suffix}").write_bytes(write(rows.ROWS[form]))
            assert rows.is_prepared(tmp_path / f"d{suffix}", rows.TASKS.get(form, "causal-lm"), tokenizer), (
                suffix,
                form,
            )
    (tmp_path / "x.safetensors").write_bytes(tensors.seed_file())
    assert tensors.is_read(tmp_path / "x.safetensors")
    skeleton = adapters.models.skeleton(adapters.base_config())
    for name, fields in adapters.METHODS.items():
        adapters.made(fields, tmp_path / name)
        assert adapters.is_read(tmp_path / name, skeleton), name
    for path in recipes.RECIPES.glob("**/*.yaml"):
        load(path)


def test_an_escape_is_told(tmp_path, monkeypatch):
    """The harness itself can fail."""

    def broken(*_):
        raise KeyError("x")

    monkeypatch.setattr(tensors, "is_read", broken)
    outcome = tensors.run(Order(50, tmp_path))
    assert outcome.rows["all"]["escaped"] == 50
    assert 1 <= len(outcome.failures) < 5
    assert "KeyError" in outcome.failures[0]


@pytest.mark.parametrize("at", ["weights", "alpha"])
def test_a_lie_is_only_believed_without_a_seal(at, tmp_path):
    """A flipped bit and another `lora_alpha` load in PEFT without a word."""
    skeleton = adapters.models.skeleton(adapters.base_config())
    seed = adapters.made({"type": "lora"}, tmp_path / "a")
    config, weights = tmp_path / "a" / "adapter_config.json", tmp_path / "a" / "adapter_model.safetensors"
    if at == "weights":
        weights.write_bytes(seed.weights[:-1] + bytes([seed.weights[-1] ^ 1]))
    else:
        config.write_text(json.dumps({**json.loads(seed.config), "lora_alpha": 800}))
    assert not adapters.is_read(tmp_path / "a", skeleton)
    (doubt,) = adapters.read_adapter(tmp_path / "a").doubts
    assert "has changed since it was written" in doubt.message
    unseal(tmp_path / "a")
    assert adapters.is_read(tmp_path / "a", skeleton)


def test_mutants_follow_from_the_seed():
    made = [[tensors.KINDS["header"](tensors.seed_file(), random.Random(seed)) for _ in range(3)] for seed in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
