"""A run that was stopped and resumed is the run that was not: to the bit, with dropout, accumulation and all."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import get_args

import pytest
import torch
import transformers
from safetensors.torch import load_file

from peftcli.checkpoint import state
from peftcli.errors import EXIT_INTERRUPTED_TWICE, DataError, Interrupted, ModelError, RecipeError
from peftcli.recipe import TrainingSection
from tests.conftest import Recorder, tiny_llama_config, write_jsonl

STEPS = 7
TRAINING = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 0.01,
    "logging_steps": 2,
    "eval_steps": 2,
    "save_steps": 2,
}
MEASURED = {"tokens_per_second", "memory_gb"}  # of the machine, not of the run


@pytest.fixture
def stopping_recipe(recipe_file):
    """A recipe for runs that are worth resuming: dropout, accumulation, evaluation and checkpoints."""

    def write(method="lora", **training):
        return recipe_file(method={"type": method, "r": 4, "dropout": 0.2}, training={**TRAINING, **training})

    return write


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


@pytest.fixture
def whole(whole_runs, train):
    """Returns the folder of a run that nothing interrupted, made once for each method."""

    def folder(path, method="lora"):
        if not (whole_runs / method).exists():
            train(path, f"output_dir={whole_runs / method}")
        return whole_runs / method

    return folder


def interrupt(train, path, *overrides, at, number=signal.SIGTERM, **options):
    """Trains until this process gets a signal after step `at`; returns the error that ended it."""
    recorder = options.pop("reporter", Recorder())
    recorder.on_step = lambda step: os.kill(os.getpid(), number) if step == at else None
    with pytest.raises(Interrupted) as caught:
        train(path, *overrides, reporter=recorder, **options)
    return caught.value


def tensors(run):
    return load_file(run / "adapter_model.safetensors")


def logged(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def assert_same(run, whole, *, log=True):
    found, expected = tensors(run), tensors(whole)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    newest = f"checkpoint-{STEPS}/optimizer.safetensors"
    assert (run / newest).read_bytes() == (whole / newest).read_bytes()
    if log:
        assert logged(run) == logged(whole)


@pytest.mark.parametrize(
    ("method", "number", "at"),
    [("lora", signal.SIGTERM, 4), ("lora", signal.SIGINT, 3), ("dora", signal.SIGTERM, 5), ("dora", signal.SIGUSR1, 1)],
    ids=str,
)
def test_interrupted_and_resumed_to_the_bit(stopping_recipe, train, whole, tmp_path, method, number, at):
    path = stopping_recipe(method)
    expected = whole(path, method)
    error = interrupt(train, path, at=at, number=number)
    assert (error.exit_code, f"{number.name}: stopped after step {at} of {STEPS}" in str(error)) == (75, True)
    assert "--resume" in error.problems[0].hint
    assert (tmp_path / "run" / f"checkpoint-{at}").is_dir()
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()  # not finished, and does not look it

    recorder = Recorder()
    facts = train(path, resume=True, reporter=recorder)
    assert (recorder.first_step, min(recorder.losses)) == (at, at + 1)
    assert_same(tmp_path / "run", expected, log=False)
    ours, theirs = logged(tmp_path / "run"), logged(expected)
    places = [(line["step"], "eval_loss" in line) for line in ours]
    assert places == [(2, False), (2, True), (4, False), (4, True), (6, False), (6, True), (7, False), (7, True)]
    assert ours == theirs  # averages over steps before and after the interruption among them
    uninterrupted = json.loads((expected / "manifest.json").read_text())
    assert facts["result"]["supervised_tokens"] == uninterrupted["result"]["supervised_tokens"]
    assert facts["result"]["eval"] == uninterrupted["result"]["eval"]


@pytest.mark.parametrize("laid_out", ["data.packing=true", "training.group_by_length=true"])
def test_packed_or_grouped_by_length(stopping_recipe, train, tmp_path, laid_out):
    own = [laid_out, "data.max_length=40"]
    if "group" in laid_out:
        own.append("data.padding_free=false")
    path = stopping_recipe()
    train(path, *own, f"output_dir={tmp_path / 'whole'}")
    interrupt(train, path, *own, at=4)
    recorder = Recorder()
    train(path, *own, resume=True, reporter=recorder)
    assert recorder.first_step == 4
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory, word_tokenizer):
    """A base for adapters with matrices of more than 4,096 numbers beside smaller ones."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("wide-llama")
    AutoModelForCausalLM.from_config(tiny_llama_config(hidden_size=96)).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("optim", get_args(TrainingSection.model_fields["optim"].annotation))
def test_with_every_optimizer(optim, wide_model, recipe_file, train, tmp_path):
    """What is kept of a matrix that is held in 8 bits, of a smaller one and of DoRA's vectors, comes back as it was."""
    path = recipe_file(
        model={"name": str(wide_model)},
        method={"type": "dora", "r": 48, "dropout": 0.2},
        training={**TRAINING, "optim": optim, "weight_decay": 0.1},
    )
    train(path, "output_dir=whole")
    interrupt(train, path, at=3)
    stored = load_file(tmp_path / "run" / "checkpoint-3" / "optimizer.safetensors")
    moments = {tensor.dtype for key, tensor in stored.items() if key.endswith("|state1")}
    assert moments == ({torch.uint8, torch.float32} if "8bit" in optim else {torch.float32} if "32" in optim else set())
    recorder = Recorder()
    train(path, resume=True, reporter=recorder)
    assert recorder.first_step == 3
    assert_same(tmp_path / "run", tmp_path / "whole", log=False)
    file = "adapter_model.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_interrupted_again_and_again(stopping_recipe, train, whole, tmp_path):
    path = stopping_recipe()
    interrupt(train, path, at=1)
    recorder = Recorder()
    for step in (2, 3, 6):
        interrupt(train, path, at=step, resume=True, reporter=recorder)
    train(path, resume=True)
    assert "circumstances" not in " ".join(recorder.notes)
    assert_same(tmp_path / "run", whole(path), log=False)


def test_killed_between_checkpoints(stopping_recipe, train, whole, tmp_path):
    """Without a signal's warning, what came after the newest checkpoint is done again, and logged once."""
    path = stopping_recipe()

    def die(step):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(path, reporter=Recorder(die))
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1.0}\n{"step": 6, "lo')  # logged after the checkpoint, and half a line
    train(path, resume=True)
    assert_same(tmp_path / "run", whole(path))


def test_killed_before_the_oldest_checkpoint_was_removed(stopping_recipe, train, tmp_path, monkeypatch):
    """After the last step, so that no later save removes it: there are no more than the recipe asks for."""
    path = stopping_recipe(save_total_limit=2)
    train(path, "output_dir=whole")
    with monkeypatch.context() as patch:
        rotate = state.rotate

        def die_at_the_end(run, limit, keep):
            if STEPS in state.checkpoints(run):
                raise KeyboardInterrupt
            rotate(run, limit, keep)

        patch.setattr(state, "rotate", die_at_the_end)
        with pytest.raises(KeyboardInterrupt):
            train(path)
    assert list(state.checkpoints(tmp_path / "run")) == [4, 6, 7]
    train(path, resume=True)
    assert list(state.checkpoints(tmp_path / "run")) == [6, 7] == list(state.checkpoints(tmp_path / "whole"))
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_killed_before_the_first_checkpoint(stopping_recipe, train, whole, tmp_path):
    path = stopping_recipe()

    def die(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(path, reporter=Recorder(die))
    recorder = Recorder()
    train(path, resume=True, reporter=recorder)
    assert "no checkpoint yet: starting from step 0" in recorder.notes
    assert_same(tmp_path / "run", whole(path))


def damage_a_byte(checkpoint):
    file = checkpoint / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        damage_a_byte,
        lambda checkpoint: (checkpoint / "adapter_model.safetensors").unlink(),
        lambda checkpoint: (checkpoint / "state.json").write_text("{"),
    ],
    ids=["a bit flipped", "a file missing", "no state"],
)
def test_a_damaged_checkpoint_is_set_aside(stopping_recipe, train, whole, tmp_path, damage):
    path = stopping_recipe()
    interrupt(train, path, at=5)
    damage(tmp_path / "run" / "checkpoint-5")
    recorder = Recorder()
    train(path, resume=True, reporter=recorder)
    assert recorder.first_step == 4
    assert any("checkpoint-5 is damaged" in note for note in recorder.notes)
    assert (tmp_path / "run" / "checkpoint-5.damaged").is_dir()
    assert_same(tmp_path / "run", whole(path))


def test_the_best_before_an_interruption_is_remembered(stopping_recipe, train, tmp_path):
    path = stopping_recipe(load_best_at_end=True, save_total_limit=1)
    # Answers that training never gives: the more it learns, the worse these become.
    write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "the cat ? ", "completion": "x y z"}] * 2)
    whole = train(path, "output_dir=whole")
    assert 0 < whole["result"]["best_step"] < 5  # before the interruption
    interrupt(train, path, at=5)
    facts = train(path, resume=True)
    for key in ("eval", "best_step", "best_eval_loss"):
        assert facts["result"][key] == whole["result"][key] != {}
    assert_same(tmp_path / "run", tmp_path / "whole", log=False)


def test_a_run_that_stopped_early_and_is_resumed_stops_there_again(stopping_recipe, train, tmp_path):
    path = stopping_recipe(early_stopping_patience=1, eval_steps=1, save_steps=2)
    write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "the cat ? ", "completion": "x y z"}] * 2)
    facts = train(path)
    assert facts["result"]["steps"] < STEPS
    before = tensors(tmp_path / "run")
    again = train(path, resume=True)
    assert all(tensor.equal(before[name]) for name, tensor in tensors(tmp_path / "run").items())
    for key in ("steps", "eval", "best_step", "supervised_tokens"):
        assert again["result"][key] == facts["result"][key]


def test_a_finished_run_that_is_resumed_stays_as_it_is(stopping_recipe, train, tmp_path):
    path = stopping_recipe()
    facts = train(path)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    recorder = Recorder()
    again = train(path, resume=True, reporter=recorder)
    assert recorder.losses == {}
    facts["result"].pop("seconds")
    again["result"].pop("seconds")
    assert again == facts
    changed = {file.name for file, content in before.items() if file.read_bytes() != content}
    assert changed <= {"manifest.json"}  # which says how long this process took


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["training.seed=7", "method.r=8"], ["training.seed was 42, is 7", "method.r was 4, is 8"]),
        (["training.max_steps=9"], ["training.max_steps was 7, is 9"]),
        (["data.max_length=32"], ["data.max_length was 64, is 32"]),
        (["data.train=eval.jsonl"], ["data.train was "]),
        (
            ["training.gradient_accumulation_steps=1"],
            ["a step of this run took ", "set training.gradient_accumulation_steps to 2"],
        ),
        (["method.type=dora"], ["method.type was lora, is dora"]),
        (["training.early_stopping_patience=1"], ["training.early_stopping_patience was None, is 1"]),
    ],
    ids=lambda value: value[0].partition("=")[0] if "=" in value[0] else "",
)
def test_a_changed_recipe_is_refused(stopping_recipe, train, tmp_path, overrides, named):
    path = stopping_recipe()
    interrupt(train, path, at=2)
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    with pytest.raises(RecipeError) as caught:
        train(path, *overrides, resume=True)
    assert all(text in str(caught.value) for text in named)
    assert "output_dir=DIR" in caught.value.problems[0].hint
    assert all(file.read_bytes() == content for file, content in before.items() if file.name != ".lock")


def test_what_changes_nothing_may_change(stopping_recipe, train, whole, tmp_path):
    path = stopping_recipe()
    interrupt(train, path, at=3)
    train(path, "training.logging_steps=1", "training.save_steps=3", "training.save_total_limit=9", resume=True)
    assert_same(tmp_path / "run", whole(path), log=False)


def test_resuming_from_the_runs_own_recipe_in_another_folder(stopping_recipe, train, whole, tmp_path, monkeypatch):
    path = stopping_recipe()
    interrupt(train, path, at=3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(tmp_path / "run" / "recipe.yaml", resume=True)
    assert_same(tmp_path / "run", whole(path), log=False)


def test_it_says_where_it_cannot_be_the_same_to_the_bit(stopping_recipe, train, tmp_path):
    """Another number of threads rounds sums in another order."""
    path = stopping_recipe()
    interrupt(train, path, at=3)
    recorder, threads = Recorder(), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        interrupt(train, path, at=5, resume=True, reporter=recorder)
    finally:
        torch.set_num_threads(threads)
    said = f"resuming under other circumstances (threads {threads}, now {threads + 1}): what follows is the same run"
    assert [note for note in recorder.notes if "circumstances" in note] == [
        f"{said} to within rounding, not to the bit"
    ]
    manifest = train(path, "output_dir=whole")
    assert manifest["computed_on"] == {
        "device": f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "threads": threads,
        "processes": 1,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "same_bits": True,
    }


def test_nothing_to_resume(stopping_recipe, train, tmp_path):
    path = stopping_recipe()
    with pytest.raises(ModelError, match="run holds no run to resume"):
        train(path, resume=True)
    assert not (tmp_path / "run").exists() or not any(
        entry for entry in (tmp_path / "run").iterdir() if not entry.name.startswith(".")
    )
    train(path)  # and nothing is in its way


def test_data_that_changed_under_the_run(stopping_recipe, train, tmp_path):
    """The recipe is the same but the file is not: a silent change of what the remaining steps see."""
    path = stopping_recipe()
    interrupt(train, path, at=2)
    rows = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[:-1]))
    with pytest.raises(DataError, match=r"data\.train: it has changed since run was started"):
        train(path, resume=True)
    (tmp_path / "train.jsonl").write_text("".join(rows))
    train(path, resume=True)


@contextmanager
def started(*arguments):
    """Yields a process of this Python, which does not outlive the test."""
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_real_signal_to_a_real_process(stopping_recipe, tmp_path):
    path = str(stopping_recipe(max_steps=100_000, logging_steps=1))
    with started("-m", "peftcli", "train", path) as process:
        for line in process.stderr:
            if line.startswith("step 3/"):
                break
        process.send_signal(signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (75, "")
    assert "SIGTERM: stopped after step" in stderr
    assert "hint:" in stderr
    assert "Traceback" not in stderr
    step = int(stderr.partition("stopped after step ")[2].split()[0])
    assert (tmp_path / "run" / f"checkpoint-{step}" / "state.json").is_file()


def test_a_second_ctrl_c_ends_at_once():
    """Even inside code that never returns to the loop. The module imports no torch, so this process starts quickly."""
    program = (
        "import time\nfrom peftcli.training.signals import StopRequest\n"
        "with StopRequest() as stop:\n print('ready', flush=True)\n while True: time.sleep(60)"
    )
    with started("-c", program) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == EXIT_INTERRUPTED_TWICE


def test_handlers_are_put_back_after_a_run(stopping_recipe, train):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    interrupt(train, stopping_recipe(), at=1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
