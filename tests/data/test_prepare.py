"""What is held out is the same whether or not the training data is encoded beside it."""

import json

import pytest

from peftcli.data import prepare, prepare_eval
from peftcli.errors import RecipeError

ROWS = [{"prompt": f"say {i}\n", "completion": "yes " * (1 + i % 3)} for i in range(20)]
LIMITS = {"vocab_size": 480, "max_positions": None, "seed": 3}


def test_a_file_of_its_own(section, tokenizer, tmp_path):
    (tmp_path / "eval.jsonl").write_text(json.dumps({"prompt": "say a\n", "completion": "no"}), encoding="utf-8")
    data = section(ROWS, eval="eval.jsonl")
    alone = prepare_eval(data, tokenizer, **LIMITS)
    assert alone is not None
    assert len(alone) == 1
    assert alone.fingerprint == prepare(data, tokenizer, **LIMITS).eval.fingerprint


def test_a_fraction_of_the_training_rows(section, tokenizer):
    data = section(ROWS, eval_fraction=0.25)
    alone = prepare_eval(data, tokenizer, **LIMITS)
    assert alone is not None
    assert len(alone) == 5
    assert alone.fingerprint == prepare(data, tokenizer, **LIMITS).eval.fingerprint


def test_nothing_held_out(section, tokenizer):
    assert prepare_eval(section(ROWS), tokenizer, **LIMITS) is None


def test_more_tokens_than_positions(section, tokenizer):
    with pytest.raises(RecipeError, match="positions"):
        prepare_eval(section(ROWS, eval_fraction=0.5), tokenizer, **{**LIMITS, "max_positions": 8})
