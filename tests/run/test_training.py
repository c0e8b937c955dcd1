"""A run's folder: who may write it, when, and what happens to what was there."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peftcli import files, locks, methods, models, recipe
from peftcli.errors import DataError, HostError, ModelError, NumericalError, RecipeError
from peftcli.run.folder import TrainOptions, open_folder
from tests.conftest import Recorder, write_jsonl
from tests.tolerances import EXACT, HALF

ONE_STEP = {"max_steps": 1}


def listing(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


class TestTheFolder:
    def test_what_is_there_is_kept(self, recipe_file, train, tmp_path):
        path = recipe_file(training=ONE_STEP)
        train(path)
        before = listing(tmp_path / "run")
        with pytest.raises(HostError, match="run exists and is not empty") as caught:
            train(path, "training.seed=7")
        assert all(option in caught.value.problems[0].hint for option in ("--resume", "--overwrite", "output_dir=DIR"))
        assert listing(tmp_path / "run") == before

    def test_an_empty_one_will_do(self, recipe_file, train, tmp_path):
        (tmp_path / "run").mkdir()
        train(recipe_file(training=ONE_STEP))

    def test_overwriting_replaces_the_run_and_nothing_else(self, recipe_file, train, tmp_path):
        path = recipe_file(training={"max_steps": 2, "save_steps": 1})
        train(path)
        (tmp_path / "run" / "mine.txt").write_text("mine")
        train(path, "training.max_steps=1", "training.seed=7", overwrite=True)
        assert not (tmp_path / "run" / "checkpoint-2").exists()
        assert (tmp_path / "run" / "mine.txt").read_text() == "mine"
        assert recipe.load(tmp_path / "run" / "recipe.yaml").recipe.training.seed == 7

    def test_a_mistake_found_late_leaves_the_old_run_alone(self, recipe_file, train, tmp_path):
        """`--overwrite` with a recipe that cannot run must not cost the run that is there."""
        path = recipe_file(training=ONE_STEP)
        train(path)
        before = listing(tmp_path / "run")
        with pytest.raises(RecipeError, match="no module matches"):
            train(path, 'method.target_modules=["no_such_module"]', overwrite=True)
        with pytest.raises(DataError):
            train(path, "data.train=nowhere.jsonl", overwrite=True)
        assert listing(tmp_path / "run") == before

    def test_a_file_in_the_way(self, recipe_file, train, tmp_path):
        (tmp_path / "run").write_text("mine")
        with pytest.raises(HostError, match="run is a file"):
            train(recipe_file())
        with pytest.raises(HostError, match=r"cannot write run/deeper"):
            train(recipe_file(), "output_dir=run/deeper")
        assert (tmp_path / "run").read_text() == "mine"

    @pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
    def test_a_folder_that_cannot_be_written(self, recipe_file, train, monkeypatch, number):
        def refuse(self, *_):
            raise OSError(number, os.strerror(number), str(self))

        monkeypatch.setattr(files, "_write_new", refuse)
        monkeypatch.setattr("peftcli.models.locate", None)  # found out before the model is looked for
        with pytest.raises(HostError, match=f"cannot write run: {os.strerror(number)}") as caught:
            train(recipe_file())
        assert ("space" in caught.value.problems[0].hint) == (number == errno.ENOSPC)

    def test_two_runs_in_one_folder(self, recipe_file, train, tmp_path):
        path = recipe_file(training=ONE_STEP)
        (tmp_path / "run").mkdir()
        with locks.locked(tmp_path / "run"), pytest.raises(HostError, match=f"in use by another run .*{os.getpid()}"):
            train(path)
        train(path)

    def test_a_lock_does_not_outlive_its_process(self, recipe_file, train, tmp_path):
        path = recipe_file(training=ONE_STEP)
        (tmp_path / "run").mkdir()
        program = (
            "import os, sys, pathlib; from peftcli import locks\n"
            "with locks.locked(pathlib.Path(sys.argv[1])): os._exit(9)"
        )
        assert subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], check=False).returncode == 9
        train(path)

    def test_a_run_that_never_began_leaves_nothing(self, recipe_file, train, tmp_path):
        with pytest.raises(DataError):
            train(recipe_file(data={"train": "nowhere.jsonl"}))
        assert not (tmp_path / "run").exists()

    def test_it_is_entered_before_anything_is_read(self, tmp_path):
        with open_folder(tmp_path / "a" / "b", TrainOptions()):
            assert (tmp_path / "a" / "b").is_dir()


def test_the_disk_fills_up_in_the_middle(recipe_file, train, tmp_path, monkeypatch):
    """The checkpoint that was whole stays whole, and the run can go on once there is space."""
    path = recipe_file(training={"max_steps": 4, "save_steps": 2})
    train(path, "output_dir=whole")
    original, full = files.write_safetensors, []

    def write(target, tensors, metadata=None):
        if "checkpoint-4" in str(target) and not full:
            full.append(target)
            with files.explained(target):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(target, tensors, metadata)

    monkeypatch.setattr(files, "write_safetensors", write)
    with pytest.raises(HostError, match="No space left on device") as caught:
        train(path)
    assert "save_total_limit" in caught.value.problems[0].hint
    assert {entry.name for entry in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2"}
    train(path, resume=True)
    ours, whole = (tmp_path / name / "adapter_model.safetensors" for name in ("run", "whole"))
    assert ours.read_bytes() == whole.read_bytes()


def test_the_first_sample_is_shown(recipe_file):
    from peftcli.run.training import train

    shown = []
    train(recipe.load(recipe_file(training=ONE_STEP)), TrainOptions(), Recorder(), shown.append)
    (segments,) = shown
    assert [(segment.text, segment.supervised) for segment in segments] == [
        ("the a ?", False),
        (" the of </s>", True),
    ]


def test_what_was_decided_is_said(recipe_file, train):
    recorder = Recorder()
    facts = train(recipe_file(training=ONE_STEP), reporter=recorder)
    assert recorder.notes[0].startswith("train: 32 rows gave 32 samples")
    assert recorder.notes[1].startswith("eval: 8 rows gave 8 samples")
    counts = facts["parameters"]
    assert recorder.notes[2] == (
        f"{counts['trainable_params']:,} of {counts['total_params']:,} parameters train "
        f"({counts['trainable_percent']:.3f} %) in 14 modules; base in float32 on cpu, mixed precision no"
    )


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_recipe_without_a_rate_uses_the_methods_own(recipe_file, train, method):
    facts = train(recipe_file(method={"type": method}, training={**ONE_STEP, "learning_rate": None, "warmup_steps": 0}))
    assert facts["result"]["train"]["learning_rate"] == methods.load(method).default_learning_rate == 2e-4


def test_bf16_computes_in_bf16_and_trains_in_float32(recipe_file, train, tmp_path):
    path = recipe_file(training={"max_steps": 3})
    train(path, "output_dir=full")
    facts = train(path, "training.mixed_precision=bf16")
    full = json.loads((tmp_path / "full" / "manifest.json").read_text())
    assert facts["result"]["train"]["loss"] != full["result"]["train"]["loss"]
    assert facts["result"]["train"]["loss"] == pytest.approx(full["result"]["train"]["loss"], rel=HALF[torch.bfloat16])
    stored = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {"torch.float32"}


def test_gradient_checkpointing_trains_the_same(recipe_file, train):
    path = recipe_file(training={"max_steps": 3})
    plain, thrifty = (
        train(path, f"training.gradient_checkpointing={on}", f"output_dir={on}") for on in ("false", "true")
    )
    assert thrifty["result"]["train"]["loss"] == pytest.approx(
        plain["result"]["train"]["loss"], rel=EXACT[torch.float32]
    )


def test_numbers_that_are_not_finite_end_the_run(recipe_file, train, tmp_path, model_folder):
    """In the data that is trained on, or only in what is evaluated on; the last whole checkpoint stays."""
    folder = shutil.copytree(model_folder, tmp_path / "broken")
    path = recipe_file(model={"name": "broken"}, training={"max_steps": 4, "save_steps": 1, "eval_steps": 3})
    stored = load_file(folder / "model.safetensors")
    stored["model.embed_tokens.weight"][50] = float("nan")  # the letter t: in no training row
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].nan_to_num()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    train(path, "output_dir=fine")
    write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "the t ? ", "completion": "cat"}])
    with pytest.raises(NumericalError, match="the evaluation loss is nan"):
        train(path)
    assert {entry.name for entry in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "the t ? ", "completion": "cat"}])
    with pytest.raises(NumericalError, match="step 1: the loss is nan") as caught:
        train(path, "output_dir=other")
    assert caught.value.exit_code == 5
    assert not (tmp_path / "other" / "adapter_model.safetensors").exists()


def test_a_base_module_that_no_forward_calls(recipe_file, train, monkeypatch):
    original = models.load_model

    def with_a_spare(*arguments):
        model, fresh = original(*arguments)
        model.model.layers[0].spare = nn.Linear(8, 8)
        return model, fresh

    monkeypatch.setattr(models, "load_model", with_a_spare)
    with pytest.raises(NumericalError, match=r"layers\.0\.spare"):
        train(recipe_file())


def test_options_of_a_method_are_checked_with_their_lines(recipe_file, train, tmp_path):
    path = recipe_file(method={"r": 0, "dropout": 1.5})
    with pytest.raises(RecipeError) as caught:
        train(path)
    wheres = [problem.where for problem in caught.value.problems]
    assert len(wheres) == 2
    assert all(where.startswith(f"{path}:") for where in wheres)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"target_modules": ["q_porj"]}, 'method.target_modules: no module matches "q_porj"'),
        ({"layers": [5]}, "method.layers: there is no layer 5"),
        ({"r": 400}, "method.r: 400 is more than the 48"),
        ({"target_modules": ["input_layernorm"]}, "which cannot be adapted"),
    ],
)
def test_modules_are_checked_before_weights_are_loaded(recipe_file, train, monkeypatch, method, message):
    monkeypatch.setattr("peftcli.models.load_model", None)
    path = recipe_file(method=method)
    with pytest.raises(RecipeError) as caught:
        train(path)
    (problem,) = caught.value.problems
    assert message in problem.message
    key = next(iter(method))
    line = next(number for number, text in enumerate(path.read_text().splitlines(), 1) if f'"{key}"' in text)
    assert problem.where == f"{path}:{line}"


def test_nothing_to_resume_is_a_model_error_without_a_folder(recipe_file, train, tmp_path):
    with pytest.raises(ModelError, match="holds no run to resume"):
        train(recipe_file(), resume=True)
    assert not (tmp_path / "run").exists()
