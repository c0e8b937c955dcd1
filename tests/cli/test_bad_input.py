"""The mistakes that people make, each with its exit code and one message that says what to do. Never a traceback."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcli.errors import EXIT_BUG, EXIT_INTERRUPTED_TWICE
from peftcli.training.loop import Trainer
from tests.conftest import write_jsonl


def assert_told(outcome, code, *texts, hint=True, count=1):
    """Checks an exit code and that stderr alone tells what is wrong, once, with what to do about it."""
    found, stdout, stderr = outcome
    assert found == code, stderr
    assert stdout == ""
    assert stderr.count("error:") == count, stderr
    assert ("hint:" in stderr) == hint, stderr
    assert "Traceback" not in stderr
    assert "Error(" not in stderr  # an exception's repr
    for text in texts:
        assert text in stderr
    message = stderr.partition("error:")[2].partition("hint:")[0]
    assert len(message.strip().splitlines()) == 1


@pytest.fixture
def lines(tmp_path):
    """Returns the line of a recipe file on which a key is."""

    def line(key, name="recipe.yaml"):
        text = (tmp_path / name).read_text().splitlines()
        return f"{name}:{next(number for number, row in enumerate(text, 1) if key in row)}"

    return line


class TestRecipes:
    """Exit code 2, with the line."""

    def test_an_unknown_key(self, cli, recipe_file, lines):
        recipe_file(training={"lerning_rate": 1e-3})
        assert_told(cli("train", "recipe.yaml"), 2, lines("lerning_rate"), 'did you mean "learning_rate"')

    def test_a_wrong_type(self, cli, recipe_file, lines):
        recipe_file(training={"max_steps": "many"})
        assert_told(cli("train", "recipe.yaml"), 2, lines("max_steps"), "training.max_steps", hint=False)

    def test_a_value_out_of_range(self, cli, recipe_file, lines):
        recipe_file(method={"dropout": 1.5})
        assert_told(cli("train", "recipe.yaml"), 2, lines("dropout"), "method.dropout", hint=False)

    def test_all_problems_at_once(self, cli, recipe_file):
        recipe_file(training={"max_steps": "many", "lerning_rate": 1}, model={"dtype": "float8"})
        code, stdout, stderr = cli("train", "recipe.yaml")
        assert (code, stdout, stderr.count("error:")) == (2, "", 3)
        assert stderr.rstrip().endswith("3 problems")

    def test_an_unknown_method(self, cli, recipe_file, lines):
        recipe_file(method={"type": "dorra"})
        assert_told(cli("train", "recipe.yaml"), 2, lines("dorra"), 'did you mean "dora"')

    def test_a_field_of_another_method(self, cli, recipe_file, lines):
        recipe_file(method={"type": "lora", "detach_norm": True})
        assert_told(cli("train", "recipe.yaml"), 2, lines("detach_norm"), "only dora and dvora have it")

    def test_no_matching_module(self, cli, recipe_file, lines):
        recipe_file(method={"target_modules": ["q_porj"]})
        assert_told(cli("train", "recipe.yaml"), 2, lines("target_modules"), 'did you mean "q_proj"')

    def test_no_such_recipe(self, cli, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for command in ("train", "validate", "preview"):
            assert_told(cli(command, "nowhere.yaml"), 2, "there is no recipe nowhere.yaml", hint=False)

    def test_a_misspelt_recipe(self, cli, recipe_file):
        recipe_file()
        assert_told(cli("train", "recpie.yaml"), 2, "there is no recipe recpie.yaml", "did you mean recipe.yaml?")

    def test_a_folder_for_a_recipe(self, cli, recipe_file, tmp_path):
        recipe_file()
        assert_told(cli("train", tmp_path), 2, f"{tmp_path} is a folder", "recipe.yaml")

    @pytest.mark.parametrize("content", [b"\xff\xfe\x00m\x00o", b"model: \xe9\n"])
    def test_a_recipe_that_is_not_utf_8(self, cli, tmp_path, content):
        (tmp_path / "recipe.yaml").write_bytes(content)
        code, stdout, stderr = cli("train", tmp_path / "recipe.yaml")
        assert (code, stdout) == (2, "")
        assert "UTF-8" in stderr

    @pytest.mark.parametrize("override", ["training.max_steps", "=3", "training.max_stepps=3", "method.r=big"])
    def test_a_bad_override(self, cli, recipe_file, override):
        recipe_file()
        code, stdout, stderr = cli("train", "recipe.yaml", override)
        assert (code, stdout, stderr.count("error:")) == (2, "", 1)
        assert override.strip("=3") in stderr

    def test_too_long_for_the_model(self, cli, recipe_file):
        recipe_file(data={"max_length": 5000})
        assert_told(cli("train", "recipe.yaml"), 2, "5,000 tokens are more than the model's 256", "256 or less")

    def test_settings_that_exclude_each_other(self, cli, recipe_file):
        recipe_file(training={"max_steps": 3, "num_train_epochs": 1.0})
        assert_told(cli("train", "recipe.yaml"), 2, "training.max_steps and training.num_train_epochs exclude")

    def test_a_recipe_changed_before_resuming(self, cli, recipe_file):
        recipe_file(training={"max_steps": 1})
        assert cli("train", "recipe.yaml")[0] == 0
        assert_told(cli("train", "recipe.yaml", "training.seed=1", "--resume"), 2, "training.seed was 42, is 1")

    def test_resume_and_overwrite(self, cli, recipe_file):
        recipe_file()
        assert_told(cli("train", "recipe.yaml", "--resume", "--overwrite"), 2, "--resume and --overwrite exclude")


class TestData:
    """Exit code 3, with the file."""

    def test_a_missing_file(self, cli, recipe_file):
        recipe_file(data={"train": "trian.jsonl"})
        assert_told(cli("train", "recipe.yaml"), 3, "trian.jsonl")

    def test_a_missing_column(self, cli, recipe_file, tmp_path):
        recipe_file(data={"format": "prompt-completion"})
        write_jsonl(tmp_path / "train.jsonl", [{"question": "a", "completion": "b"}])
        assert_told(cli("train", "recipe.yaml"), 3, "prompt", "question")

    def test_a_file_without_rows(self, cli, recipe_file, tmp_path):
        recipe_file()
        (tmp_path / "train.jsonl").write_text("")
        code, stdout, stderr = cli("train", "recipe.yaml")
        assert (code, stdout, stderr.count("error:")) == (3, "", 1)
        assert "train.jsonl" in stderr

    def test_a_file_that_is_not_utf_8(self, cli, recipe_file, tmp_path):
        recipe_file()
        (tmp_path / "train.jsonl").write_bytes(b'{"prompt": "caf\xe9", "completion": "x"}\n')
        assert_told(cli("train", "recipe.yaml"), 3, "train.jsonl", "UTF-8")

    def test_a_line_that_is_not_json(self, cli, recipe_file, tmp_path):
        recipe_file()
        with (tmp_path / "train.jsonl").open("a") as file:
            file.write("{oops\n")
        code, stdout, stderr = cli("train", "recipe.yaml")
        assert (code, stdout, stderr.count("error:")) == (3, "", 1)
        assert "train.jsonl:33" in stderr

    def test_nothing_to_learn(self, cli, recipe_file, tmp_path):
        recipe_file(data={"max_length": 2})
        code, stdout, stderr = cli("train", "recipe.yaml")
        assert (code, stdout, stderr.count("error:")) == (3, "", 1)

    def test_a_missing_file_to_evaluate_on(self, cli, recipe_file):
        recipe_file(training={"max_steps": 1})
        assert cli("train", "recipe.yaml")[0] == 0
        code, stdout, stderr = cli("eval", "run", "--data", "nowhere.jsonl")
        assert (code, stdout, stderr.count("error:")) == (3, "", 1)
        assert "nowhere.jsonl" in stderr

    def test_prompts_that_cannot_be_read(self, cli, tmp_path):
        code, stdout, stderr = cli("generate", tmp_path, "--prompt-file", tmp_path / "nowhere.txt")
        assert (code, stdout, stderr.count("error:")) == (3, "", 1)
        assert "--prompt-file" in stderr
        (tmp_path / "prompts.txt").write_bytes(b"\xff")
        assert cli("generate", tmp_path, "--prompt-file", tmp_path / "prompts.txt")[0] == 3


class TestModels:
    """Exit code 4."""

    def test_no_such_folder(self, cli, recipe_file):
        recipe_file(model={"name": "./nowhere"})
        assert_told(cli("train", "recipe.yaml"), 4, "./nowhere: there is no such folder")

    def test_a_hub_model_without_a_network(self, cli, recipe_file):
        recipe_file(model={"name": "org/no-such-model"})
        assert_told(cli("train", "recipe.yaml"), 4, "org/no-such-model", "the model hub cannot be reached")

    @pytest.mark.parametrize("command", [["eval"], ["merge"], ["generate"]], ids=lambda command: command[0])
    @pytest.mark.parametrize("kind", ["nothing", "a folder", "a file", "a model"])
    def test_no_run(self, cli, tmp_path, model_folder, command, kind):
        folder = model_folder if kind == "a model" else tmp_path / "x"
        if kind == "a folder":
            folder.mkdir()
        elif kind == "a file":
            folder.write_text("x")
        arguments = [*command, folder, *(["hello"] if command == ["generate"] else [])]
        assert_told(cli(*arguments), 4, f"{folder} is not a run", "peftcli train")

    @pytest.mark.parametrize("command", [["eval"], ["merge"], ["generate"]], ids=lambda command: command[0])
    def test_no_adapter(self, cli, tmp_path, command):
        arguments = [*command, "--adapter", tmp_path, *(["hello"] if command == ["generate"] else [])]
        assert_told(cli(*arguments), 4, "is not an adapter")

    def test_a_damaged_adapter(self, cli, recipe_file):
        recipe_file(training={"max_steps": 1})
        assert cli("train", "recipe.yaml")[0] == 0
        file = Path("run/adapter_model.safetensors")
        content = file.read_bytes()
        file.write_bytes(content[:100])
        changed = "adapter_model.safetensors has changed since it was written"
        assert_told(cli("eval", "run"), 4, "adapter_model.safetensors is damaged", changed, count=2)
        file.write_bytes(content)
        tensors = load_file(file)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, file)
        for command in (["eval", "run"], ["merge", "run"], ["eval", "run", "--force"]):
            assert_told(cli(*command), 4, "lora_A.weight is missing", changed, count=2)

    def test_nothing_to_resume(self, cli, recipe_file):
        recipe_file()
        assert_told(cli("train", "recipe.yaml", "--resume"), 4, "holds no run to resume")


def test_numbers_that_are_not_finite(cli, recipe_file):
    """Exit code 5."""
    recipe_file(training={"learning_rate": 1e30, "warmup_steps": 0, "max_grad_norm": None, "max_steps": 9})
    code, stdout, stderr = cli("train", "recipe.yaml")
    assert (code, stdout, stderr.count("error:")) == (5, "", 1)
    assert "step 2: the loss is" in stderr
    assert "learning_rate" in stderr.partition("hint:")[2]


class TestTheHost:
    """Exit code 6."""

    def test_a_file_in_the_way(self, cli, recipe_file, tmp_path):
        recipe_file()
        (tmp_path / "run").write_text("")
        assert_told(cli("train", "recipe.yaml"), 6, "output_dir: run is a file", "output_dir=DIR")
        assert_told(cli("train", "recipe.yaml", "output_dir=run/x/y"), 6, "cannot write run/x/y", "output_dir=DIR")

    def test_a_run_in_the_way(self, cli, recipe_file):
        recipe_file(training={"max_steps": 1})
        assert cli("train", "recipe.yaml")[0] == 0
        assert_told(cli("train", "recipe.yaml"), 6, "run exists and is not empty", "--resume", "--overwrite")

    @pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody, not even root, can write to")
    def test_a_folder_that_cannot_be_written(self, cli, recipe_file):
        recipe_file()
        assert_told(cli("train", "recipe.yaml", "output_dir=/proc/peftcli"), 6, "cannot write /proc/peftcli")

    def test_a_merge_in_the_way(self, cli, recipe_file):
        recipe_file(training={"max_steps": 1})
        assert cli("train", "recipe.yaml")[0] == 0
        assert_told(cli("merge", "run", "-o", "train.jsonl"), 6, "train.jsonl is a file", "--output DIR")
        assert_told(cli("merge", "run", "-o", "run", "--overwrite"), 6, "run holds a run", "--output DIR")
        assert cli("merge", "run")[0] == 0
        assert_told(cli("merge", "run"), 6, "merged exists and is not empty", "--overwrite")

    @pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has one")
    def test_a_device_that_is_not_there(self, cli, recipe_file):
        recipe_file()
        assert_told(cli("train", "recipe.yaml", "--device", "cuda"), 6, "this machine has no cuda device")

    def test_fp16_on_a_cpu(self, cli, recipe_file):
        recipe_file(training={"mixed_precision": "fp16"})
        assert_told(cli("train", "recipe.yaml", "--device", "cpu"), 6, "fp16 needs a GPU")


class TestUsage:
    """Exit code 2, with the usage."""

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["train", "recipe.yaml", "--dry-run"], "--dry-run"),
            (["trian", "recipe.yaml"], "trian"),
            (["train"], "Missing argument 'recipe'"),
            (["eval", "run", "--batch-size", "0"], "--batch-size"),
            (["preview", "recipe.yaml", "-n", "none"], "--count"),
        ],
    )
    def test_a_command_line_that_is_none(self, cli, recipe_file, arguments, text):
        recipe_file()
        code, stdout, stderr = cli(*arguments)
        assert (code, stdout) == (2, "")
        assert "Usage:" in stderr
        assert text in stderr

    def test_a_device_that_is_none(self, cli, recipe_file):
        recipe_file()
        assert_told(cli("train", "recipe.yaml", "--device", "gpu"), 2, '--device: "gpu" is no device')

    def test_a_dtype_that_is_none(self, cli, tmp_path):
        assert_told(cli("merge", tmp_path, "--dtype", "int4"), 2, '--dtype: "int4"', hint=False)
        assert_told(cli("merge", tmp_path, "--verify", "none"), 2, '--verify: "none" is none of layers', hint=False)
        assert_told(cli("merge", tmp_path, "--base", "original", "--verify", "layers"), 2, "whole models are measured")

    def test_neither_run_nor_adapter(self, cli):
        for command in ("eval", "merge"):
            assert_told(cli(command), 2, "--adapter DIR", hint=False)
        assert_told(cli("generate", "--adapter", "x"), 2, "there is no prompt")
        assert_told(cli("generate"), 2, "there is no prompt")

    @pytest.mark.parametrize(
        ("command", "name", "meant"), [("methods", "dorra", "dora"), ("recipes", "quikstart", "quickstart")]
    )
    def test_looking_up_what_is_not_there(self, cli, command, name, meant):
        assert_told(cli(command, name), 2, f'"{name}"', f'did you mean "{meant}"')

    def test_no_command_shows_the_help(self, cli):
        code, stdout, stderr = cli()
        assert code == 2
        assert "Usage:" in stdout + stderr


class TestBugs:
    """Exit code 1: the traceback goes to a file."""

    @pytest.fixture(autouse=True)
    def _bug(self, monkeypatch, tmp_path):
        def broken(*_):
            raise ZeroDivisionError("[bold]division[/] by zero")

        monkeypatch.setattr("peftcli.run.training.train", broken)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def test_the_traceback_goes_to_a_file(self, cli, recipe_file, tmp_path):
        recipe_file()
        outcome = cli("train", "recipe.yaml")
        code, stdout, stderr = outcome
        assert (code, stdout) == (EXIT_BUG, "")
        assert "Traceback" not in stderr
        assert "this is a bug in peftcli" in stderr
        assert "[bold]division[/] by zero" in stderr  # as it is, not as markup
        (file,) = tmp_path.glob("peftcli-bug-*.txt")
        assert str(file) in stderr
        assert re.search(r"Traceback(.|\n)*in broken(.|\n)*ZeroDivisionError", file.read_text())

    def test_debug_prints_it_too(self, cli, recipe_file):
        recipe_file()
        code, _, stderr = cli("--debug", "train", "recipe.yaml")
        assert code == EXIT_BUG
        assert "Traceback" in stderr


def test_debug_prints_the_traceback_of_an_error(cli):
    code, stdout, stderr = cli("--debug", "train", "nowhere.yaml")
    assert (code, stdout) == (2, "")
    assert "Traceback" in stderr
    assert stderr.count("hint:") >= 1


def test_ctrl_c_before_training(cli, recipe_file, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("peftcli.run.training.train", interrupted)
    recipe_file()
    code, stdout, stderr = cli("train", "recipe.yaml")
    assert (code, stdout) == (EXIT_INTERRUPTED_TWICE, "")
    assert "interrupted" in stderr
    assert "Traceback" not in stderr


def test_ctrl_c_while_training(cli, recipe_file, monkeypatch):
    """Saved, told how to go on, and code 75, which schedulers know to try again."""
    original = Trainer._after_step

    def pressed(self):
        original(self)
        if self.progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_after_step", pressed)
    recipe_file()
    outcome = cli("train", "recipe.yaml")
    assert_told(outcome, 75, "SIGINT: stopped after step 2 of 4; it is saved", "--resume")


def test_text_of_the_users_is_not_taken_for_markup(cli, tmp_path):
    (tmp_path / "a.yaml").write_text("model: {name: x, '[red]': 1, ':smile:': 2}\n")
    _, _, stderr = cli("validate", "--form-only", tmp_path / "a.yaml")
    assert "[red]" in stderr
    assert ":smile:" in stderr
