"""What is done with adapters: on which data and base, and what is never overwritten."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcli.errors import DataError, HostError, ModelError, RecipeError
from peftcli.merge import LAYER_TOLERANCE
from peftcli.methods.lora import LoRA
from peftcli.run import applying
from peftcli.run.merging import merge as run_merge
from peftcli.run.subject import DEFAULT_PROMPTS, open_subject, proof_inputs
from tests.conftest import Recorder, unseal, write_jsonl
from tests.run.merging import merge_and_compare


@pytest.fixture
def run(recipe_file, train):
    """A run of two steps; its folder, relative to the current directory."""
    train(recipe_file(training={"max_steps": 2, "learning_rate": 0.1}))
    return Path("run")


def subject(run=None, adapter=None, model=None):
    return open_subject(run, adapter, model)


def evaluate(one, data=None, batch_size=None):
    return applying.evaluate(one, data, batch_size, "cpu", Recorder())


def merge(one, target, dtype=None, overwrite=False):
    return merge_and_compare(one, Path(target), dtype, Recorder(), overwrite=overwrite)


class TestSubjects:
    def test_neither_run_nor_adapter(self):
        with pytest.raises(RecipeError, match="--adapter DIR"):
            subject()

    @pytest.mark.parametrize(
        ("make", "reason"), [(None, "there is no such folder"), ("mkdir", "it has no recipe.yaml")], ids=str
    )
    def test_no_run(self, tmp_path, make, reason):
        folder = tmp_path / "nothing"
        if make:
            folder.mkdir()
        with pytest.raises(ModelError, match=f"nothing is not a run: {reason}"):
            subject(folder)

    def test_an_unfinished_run(self, run):
        (run / "adapter_config.json").unlink()
        with pytest.raises(ModelError, match=r"run is not an adapter: it has no adapter_config\.json"):
            subject(run)

    def test_an_adapter_that_does_not_name_its_base(self, run, model_folder):
        fields = json.loads((run / "adapter_config.json").read_text())
        (run / "recipe.yaml").unlink()
        unseal(run)
        (run / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": None}))
        with pytest.raises(ModelError, match="does not name its base model") as caught:
            subject(run)
        assert "--model" in caught.value.problems[0].hint
        assert subject(run, model=str(model_folder)).base.source.name == str(model_folder)

    def test_a_folder_with_an_adapter_alone(self, run, model_folder):
        (run / "recipe.yaml").unlink()
        one = subject(run)
        assert (one.recipe, one.form, one.base.source.name) == (None, "text", str(model_folder))

    def test_the_tokenizer_is_the_runs_own(self, run):
        config = json.loads((run / "tokenizer_config.json").read_text())
        (run / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "cat"}))
        assert subject(run).base.tokenizer.eos_token == "cat"

    def test_the_merged_model_belongs_to_the_runs_own_adapter_and_base(self, run, model_folder):
        merge(subject(run), run / "merged")
        assert subject(run).merged == run / "merged"
        assert subject(run, adapter=run / "checkpoint-2").merged is None
        assert subject(run, model=str(model_folder)).merged is None


class TestEvaluating:
    def test_data_in_place_of_the_runs(self, run, rows, tmp_path):
        write_jsonl(tmp_path / "other.jsonl", rows[:3])
        found = evaluate(subject(run), tmp_path / "other.jsonl")
        assert found["adapter"]["eval_tokens"] < evaluate(subject(run))["adapter"]["eval_tokens"]

    def test_the_run_held_some_out(self, recipe_file, train):
        facts = train(recipe_file(data={"eval": None, "eval_fraction": 0.25}, training={"max_steps": 2}))
        found = evaluate(subject(Path("run")))
        assert facts["data"]["eval"]["samples"] == 8
        assert found["adapter"] == pytest.approx(facts["result"]["eval"])

    def test_nothing_to_evaluate_on(self, recipe_file, train):
        train(recipe_file(data={"eval": None}, training={"max_steps": 1}))
        with pytest.raises(DataError, match="nothing to evaluate on") as caught:
            evaluate(subject(Path("run")))
        assert "--data FILE" in caught.value.problems[0].hint

    def test_an_adapter_alone_is_evaluated_as_far_as_its_model_can_see(self, run, make_model, rows):
        (run / "recipe.yaml").unlink()
        one = subject(run)
        assert one.base.config.max_position_embeddings < 1024  # the default of data.max_length
        found = evaluate(one, Path("eval.jsonl"))
        assert found["adapter"]["eval_tokens"] == 49

    def test_the_batch_size_changes_no_metric(self, run):
        assert evaluate(subject(run), batch_size=1)["base"] == pytest.approx(evaluate(subject(run))["base"])


class TestMerging:
    def test_what_is_there_is_kept(self, run):
        merge(subject(run), "merged")
        with pytest.raises(HostError, match="merged exists and is not empty") as caught:
            merge(subject(run), "merged")
        assert "--overwrite" in caught.value.problems[0].hint
        merge(subject(run), "merged", "bfloat16", overwrite=True)
        assert json.loads(Path("merged/config.json").read_text())["dtype"] == "bfloat16"

    def test_a_file_in_the_way(self, run):
        with pytest.raises(HostError, match=r"train\.jsonl is a file"):
            merge(subject(run), "train.jsonl", overwrite=True)
        assert Path("train.jsonl").is_file()

    @pytest.mark.parametrize("target", ["run", ".", "run/../run", "run/checkpoint-2/.."])
    def test_a_run_is_never_replaced(self, run, target):
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        for one in (subject(run), subject(run, adapter=run / "checkpoint-2")):
            with pytest.raises(HostError, match="holds a run, the adapter or the base model"):
                merge(one, target, overwrite=True)
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    def test_nor_is_the_base_model(self, run, model_folder, tmp_path):
        base = shutil.copytree(model_folder, tmp_path / "base")
        one = subject(run, model=str(base))
        for target in (base, Path("base")):
            with pytest.raises(HostError, match="holds a run, the adapter or the base model"):
                merge(one, target, overwrite=True)
        assert (base / "model.safetensors").is_file()

    def test_a_merge_that_cannot_be_proven_leaves_nothing(self, run, monkeypatch):
        from peftcli import merge as merging
        from peftcli.run import merging as run_merging

        original = merging.logits_of
        monkeypatch.setattr(
            merging, "logits_of", lambda model, *rest: [x * (1 + hasattr(model, "x")) for x in original(model, *rest)]
        )
        real = run_merging.load_weights

        def disturbed(base, device, *seed):
            model, fresh = real(base, device, *seed)
            if "merged" in base.source.name:
                model.x = True
            return model, fresh

        monkeypatch.setattr(run_merging, "load_weights", disturbed)
        with pytest.raises(ModelError, match="the merged model differs from base and adapter"):
            merge(subject(run), "merged")
        assert not [entry for entry in Path().iterdir() if "merged" in entry.name]

    def test_a_layer_that_is_merged_wrongly_leaves_nothing(self, run, monkeypatch):
        right = LoRA.merged
        monkeypatch.setattr(LoRA, "merged", lambda self, weight: right(self, weight) + 1e-3 * (weight > 0.05))
        with pytest.raises(ModelError, match=r"layers.0.mlp.down_proj: the merged layer differs") as caught:
            run_merge(subject(run), Path("merged"), None, Recorder(), overwrite=False)
        assert "--verify logits" in caught.value.problems[0].hint
        assert not [entry for entry in Path().iterdir() if "merged" in entry.name]

    def test_layers_are_proven_without_a_model(self, run, monkeypatch):
        monkeypatch.setattr("peftcli.run.merging.load_weights", None)
        done = run_merge(subject(run), Path("merged"), None, Recorder(), overwrite=False)
        assert (done.count, done.layers, done.agreement) == (14, 14, None)
        assert 0 < done.layer_difference < LAYER_TOLERANCE

    def test_an_adapter_that_does_not_fit_leaves_nothing(self, run):
        tensors = load_file(run / "adapter_model.safetensors")
        tensors.pop(next(iter(tensors)))
        save_file(tensors, run / "adapter_model.safetensors")
        unseal(run)
        with pytest.raises(ModelError, match="is missing"):
            merge(subject(run), "merged")
        assert not Path("merged").exists()

    def test_held_out_samples_are_what_it_is_proven_on(self, run):
        agreement, _ = merge(subject(run), "merged")
        lengths = [given["input_ids"].shape[1] for given in proof_inputs(subject(run))]
        assert (len(lengths), sum(lengths)) == (4, agreement.positions)

    def test_without_any_it_is_proven_on_plain_text(self, run):
        (run / "recipe.yaml").unlink()
        prompts = proof_inputs(subject(run))
        assert len(prompts) == len(DEFAULT_PROMPTS)
        merge(subject(run), "merged")


class TestGenerating:
    def test_the_run_says_how(self, recipe_file, train):
        train(recipe_file(training={"max_steps": 1}, evaluation={"generate": {"max_new_tokens": 3}}))
        said = list(applying.generate(subject(Path("run")), ["the", "a"], {}, "cpu", Recorder(), with_base=False))
        assert [answer["prompt"] for answer in said] == ["the", "a"]
        assert all(set(answer) == {"prompt", "adapter"} and len(answer["adapter"].split()) <= 3 for answer in said)
        longer = applying.generate(
            subject(Path("run")), ["the"], {"max_new_tokens": 9}, "cpu", Recorder(), with_base=False
        )
        assert len(next(longer)["adapter"].split()) > 3

    def test_base_and_adapter_are_two_models(self, run, monkeypatch):
        one = subject(run)
        scaled = {name: 40 * tensor if "lora_B" in name else tensor for name, tensor in one.adapter.tensors.items()}
        loud = replace(one, adapter=replace(one.adapter, tensors=scaled))
        (answer,) = applying.generate(loud, ["the cat ? "], {"max_new_tokens": 8}, "cpu", Recorder(), with_base=True)
        (plain,) = applying.generate(loud, ["the cat ? "], {"max_new_tokens": 8}, "cpu", Recorder(), with_base=False)
        assert answer["adapter"] == plain["adapter"] != answer["base"]


def test_an_adapter_with_a_number_that_is_none(run):
    tensors = load_file(run / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, run / "adapter_model.safetensors")
    unseal(run)
    with pytest.raises(ModelError, match="not finite"):
        evaluate(subject(run))
