"""How much fits, found by the run itself, and what is said when it does not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from peftcli import recipe
from peftcli.errors import HostError, RecipeError
from peftcli.training import memory
from tests.conftest import Recorder

AUTO = {"per_device_train_batch_size": "auto", "gradient_accumulation_steps": 2, "max_steps": 3}


@pytest.fixture
def with_room_for(monkeypatch):
    """Has a CPU's reckoning find room for so many samples at once, whatever one of them takes."""

    def limit(size):
        monkeypatch.setattr(memory, "kept_bytes", lambda model, run: 1000)
        monkeypatch.setattr(memory, "available_bytes", lambda: int((size + 0.5) * memory.PASSES * 1000 / memory.USABLE))

    return limit


def cut_of(folder):
    settings = recipe.load(folder / "recipe.yaml").recipe.training
    return settings.per_device_train_batch_size, settings.gradient_accumulation_steps


def losses_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize(("room", "cut"), [(100, (16, 1)), (16, (16, 1)), (15, (8, 2)), (5, (4, 4)), (1, (1, 16))])
def test_a_step_is_cut_into_what_fits_and_learns_the_same(room, cut, recipe_file, train, tmp_path, with_room_for):
    with_room_for(room)
    recorder = Recorder()
    path = recipe_file(training={**AUTO, "logging_steps": 1})
    train(path, "output_dir=auto", reporter=recorder)
    assert cut_of(tmp_path / "auto") == cut
    assert f"training.per_device_train_batch_size: {cut[0]} fits, {cut[1]} times a step" in recorder.notes
    train(path, "output_dir=fixed", "training.per_device_train_batch_size=8")
    auto, fixed = (losses_of(tmp_path / name) for name in ("auto", "fixed"))
    assert auto == pytest.approx(fixed, rel=1e-5)


def test_a_resumed_run_keeps_what_was_found(recipe_file, train, tmp_path, with_room_for):
    with_room_for(4)
    path = recipe_file(method={"type": "lora", "r": 4, "dropout": 0.2}, training={**AUTO, "save_steps": 1})
    train(path, "output_dir=whole")
    train(path, "output_dir=parts")
    for step in ("checkpoint-2", "checkpoint-3"):
        shutil.rmtree(tmp_path / "parts" / step)
    with_room_for(100)  # by now there is more: it would draw other dropout
    train(path, "output_dir=parts", resume=True)
    assert cut_of(tmp_path / "parts") == (4, 4)
    whole, parts = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_packs_are_counted_too(recipe_file, train, tmp_path, with_room_for):
    with_room_for(3)
    train(recipe_file(data={"packing": True, "max_length": 32}, training=AUTO), "output_dir=packed")
    assert cut_of(tmp_path / "packed") == (2, 8)


def test_when_nothing_fits_it_says_what_to_do(recipe_file, train, with_room_for):
    with_room_for(0)
    with pytest.raises(HostError, match=r"not even one example fits beside what is in the .* of cpu") as caught:
        train(recipe_file(training=AUTO))
    assert "training.gradient_checkpointing=true" in caught.value.problems[0].hint
    assert "per_device_train_batch_size" not in caught.value.problems[0].hint


@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed"])
def test_where_processes_wait_for_each_other_it_is_refused(strategy, recipe_file):
    path = recipe_file(training=AUTO, distributed={"strategy": strategy})
    with pytest.raises(RecipeError, match=rf"auto cannot be tried with {strategy}"):
        recipe.load(path)


def test_what_is_kept_is_measured(recipe_file, train, tmp_path):
    """With the machine's own memory a tiny model fits whole."""
    train(recipe_file(training=AUTO), "output_dir=measured")
    assert cut_of(tmp_path / "measured") == (16, 1)


def test_longer_samples_keep_more(make_model):
    model = make_model("llama").train()

    def of(length):
        ids = torch.ones(1, length, dtype=torch.long)
        return memory.kept_bytes(model, lambda size: model(ids.expand(size, -1)).logits.sum())

    assert of(40) > 3 * of(10) > 0


def out_of_memory(*_, **__):
    """Asks the real allocator for more than any machine has."""
    return torch.empty(2**46, dtype=torch.uint8)


def test_running_out_says_where_it_went_and_what_to_change(recipe_file, train, monkeypatch):
    monkeypatch.setattr("peftcli.training.loss.score", out_of_memory)
    with pytest.raises(HostError, match=r"^out of memory on cpu, which has [\d.]+ GB: base weights .* MB; ") as caught:
        train(recipe_file(training={"max_steps": 1, "per_device_train_batch_size": 4}))
    assert "activations of 4 examples of up to " in str(caught.value)
    hint = caught.value.problems[0].hint
    assert "training.per_device_train_batch_size=2 training.gradient_accumulation_steps=2" in hint
    assert "training.gradient_checkpointing=true" in hint
    assert "quantization.type=nf4" in hint


def test_what_is_on_already_is_not_advised(recipe_file, train, monkeypatch):
    monkeypatch.setattr("peftcli.training.loss.score", out_of_memory)
    settings = {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_checkpointing": True}
    with pytest.raises(HostError, match="of 1 example of up to") as caught:
        train(recipe_file(training=settings, quantization={"type": "nf4"}))
    hint = caught.value.problems[0].hint
    assert "batch_size" not in hint
    assert "checkpointing" not in hint
    assert "nf4" not in hint
    assert "data.max_length below" in hint


def test_running_out_while_loading_is_explained_too(recipe_file, train, monkeypatch):
    monkeypatch.setattr("peftcli.models.load_model", out_of_memory)
    with pytest.raises(HostError, match=r"out of memory while .* was loaded in float32 onto cpu") as caught:
        train(recipe_file())
    assert "quantization.type=nf4" in caught.value.problems[0].hint


def test_another_error_stays_what_it_is(recipe_file, train, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr("peftcli.training.loss.score", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(recipe_file(training={"max_steps": 1}))
