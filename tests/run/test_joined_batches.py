"""Packed, padding-free and length-grouped batches in whole runs: what is learned, what is said, what is refused."""

import json

import pytest

from peftcli import recipe
from peftcli.errors import ModelError, RecipeError
from tests.conftest import Recorder, write_jsonl
from tests.training.test_checks import mamba

PACKED = {"packing": True, "max_length": 32}


def test_a_packed_run_learns_every_sample_once_an_epoch(recipe_file, train, tmp_path):
    recorder = Recorder()
    path = recipe_file(data=PACKED, training={"max_steps": None, "num_train_epochs": 2})
    facts = train(path, "training.max_steps=null", reporter=recorder)
    (said,) = [note for note in recorder.notes if note.startswith("packing: 32 samples in ")]
    packs = int(said.split(" packs ")[0].split()[-1])
    assert max(recorder.losses) == 2 * -(-packs // 4)  # steps of four packs
    whole = train(path, "output_dir=apart", "data.packing=false", "training.num_train_epochs=2")
    assert facts["result"]["supervised_tokens"] == whole["result"]["supervised_tokens"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_step_of_all_samples_is_the_same_step_however_they_are_laid_out(recipe_file, train, attention):
    """Packs end to end or row by row, joined and padded samples: one loss, and an adapter of the same gradient norm."""
    path = recipe_file(
        model={"attn_implementation": attention},
        training={"max_steps": 1, "per_device_train_batch_size": 64},
    )
    layouts = {
        "packed": ["data.packing=true"],
        "rows": ["data.packing=true", "data.max_length=32"],
        "joined": ["data.padding_free=true"],
        "padded": ["data.padding_free=false"],
        "grouped": ["data.padding_free=false", "training.group_by_length=true"],
    }
    lines = {}
    for name, changes in layouts.items():
        train(path, f"output_dir={name}", *changes)
        lines[name] = json.loads((path.parent / name / "metrics.jsonl").read_text().splitlines()[0])
    for name in layouts:
        for figure in ("loss", "grad_norm"):
            assert lines[name][figure] == pytest.approx(lines["padded"][figure], rel=1e-5), (name, figure)


def test_what_a_dense_mask_costs_is_said(recipe_file, train):
    said = {}
    for attention in ("sdpa", "eager"):
        recorder = Recorder()
        path = recipe_file(model={"attn_implementation": attention}, data=PACKED, training={"max_steps": 1})
        train(path, f"output_dir={attention}", reporter=recorder)
        said[attention] = [note for note in recorder.notes if "a mask hides what it computes" in note]
    assert said["sdpa"] == []
    (note,) = said["eager"]
    assert note.startswith("joined samples cost attention: llama with eager attention")


def test_grouping_what_is_joined_anyway_is_said_to_save_nothing(recipe_file, train):
    recorder = Recorder()
    train(recipe_file(training={"group_by_length": True, "max_steps": 1}), reporter=recorder)
    assert any(note.startswith("training.group_by_length saves nothing here") for note in recorder.notes)


def test_a_model_that_mixes_neighbours_is_refused(recipe_file, train, tmp_path, word_tokenizer):
    mamba().save_pretrained(tmp_path / "mamba")
    word_tokenizer.save_pretrained(tmp_path / "mamba")
    path = recipe_file(
        model={"name": "mamba"}, data=PACKED, method={"type": "lora", "r": 2, "target_modules": ["x_proj"]}
    )
    with pytest.raises(ModelError, match=r"data\.packing: mamba .* cannot keep joined samples apart") as caught:
        train(path)
    assert caught.value.problems[0].hint == "set data.packing to false"


def test_a_method_that_cannot_have_it_is_refused_before_a_weight_is_read(recipe_file, train):
    path = recipe_file(data=PACKED, method={"type": "prefix", "num_virtual_tokens": 2})
    with pytest.raises(RecipeError, match=r"data\.packing: ") as caught:
        train(path)
    assert caught.value.problems[0].hint == "set data.packing to false"
    assert "recipe.yaml:" in str(caught.value.problems[0].where)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"task": "seq2seq-lm"}, "data": PACKED}, "data.packing does nothing with model.task: seq2seq-lm"),
        (
            {"model": {"task": "sequence-classification"}, "data": PACKED},
            "data.packing does nothing with model.task: sequence-classification",
        ),
        (
            {"model": {"task": "image-classification"}, "training": {"group_by_length": True}},
            "training.group_by_length does nothing with model.task: image-classification",
        ),
        ({"data": {**PACKED, "padding_free": False}}, "data.packing: true needs what data.padding_free: false forbids"),
        (
            {"data": PACKED, "training": {"group_by_length": True}},
            "training.group_by_length does nothing with data.packing: true",
        ),
        (
            {"data": {"padding_free": True}, "training": {"group_by_length": True}},
            "training.group_by_length does nothing with data.padding_free: true",
        ),
    ],
)
def test_settings_that_leave_each_other_nothing_to_do(recipe_file, sections, message):
    with pytest.raises(RecipeError) as caught:
        recipe.load(recipe_file(**sections))
    (found,) = [problem for problem in caught.value.problems if problem.message.startswith(message)]
    assert found.hint


def test_a_step_of_other_packs_is_refused(recipe_file, train, tmp_path, rows):
    write_jsonl(tmp_path / "train.jsonl", rows)
    path = recipe_file(data=PACKED, training={"max_steps": 2, "save_steps": 1})
    train(path)
    with pytest.raises(RecipeError, match="a step of this run took 4 packs"):
        train(path, "training.per_device_train_batch_size=3", resume=True)
