"""Runs on a base that is held in 4 bits, from recipe to merged model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcli import quantization, recipe
from peftcli.errors import ModelError, RecipeError
from peftcli.run import applying, planning
from peftcli.run.exporting import export_as_lora
from peftcli.run.opening import load_weights
from peftcli.run.subject import open_subject
from tests.conftest import Recorder
from tests.run.tasks import recipe_of, save_families

NF4 = {"type": "nf4"}
SMALL = {"lora": {"r": 4}, "dora": {"r": 4}, "vera": {"r": 8, "target_modules": "all-linear"}}
each_method = pytest.mark.parametrize("name", SMALL)


def adapter_bytes(folder):
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


@each_method
def test_from_recipe_to_merged_model(name, recipe_file, train, model_folder):
    recorder = Recorder()
    path = recipe_file(method={"type": name, **SMALL[name]}, quantization=NF4, training={"save_steps": 2})
    facts = train(path, reporter=recorder)
    assert "14 linear layers, 84 % of the base's weights, are held in nf4, computed in float32" in recorder.notes
    assert (facts["quantization"]["type"], facts["adapted_modules"]) == ("nf4", 14)
    assert facts["parameters"].items() <= planning.plan(recipe.load(path), Recorder()).items()
    assert "| Base held in | nf4 |" in Path("run/README.md").read_text()

    subject = open_subject(Path("run"), None, None)
    found = applying.evaluate(subject, None, None, "cpu", Recorder())
    assert found["adapter"] == pytest.approx(facts["result"]["eval"])
    assert found["base"]["eval_loss"] != found["adapter"]["eval_loss"]
    answers = list(applying.generate(subject, ["the cat"], {"max_new_tokens": 3}, "cpu", Recorder(), with_base=True))
    assert set(answers[0]) == {"prompt", "base", "adapter"}

    recorder = Recorder()
    agreement, count = applying.merge(subject, Path("run/merged"), None, recorder, overwrite=False)
    assert (count, agreement.same_choice) == (14, 1.0)
    assert agreement.max_difference < 1e-5
    assert recorder.notes[0].startswith("the 14 linear layers that were held in nf4 become the weights")
    found = applying.evaluate(open_subject(Path("run"), None, None), None, None, "cpu", Recorder())
    assert found["merged"] == pytest.approx(found["adapter"], rel=1e-5)


@each_method
def test_it_goes_on_where_it_stopped(name, recipe_file, train):
    path = recipe_file(method={"type": name, **SMALL[name]}, quantization=NF4, training={"save_steps": 2})
    train(path, "output_dir=whole")

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(path, reporter=Recorder(on_step=stop))
    train(path, resume=True)
    assert adapter_bytes("run") == adapter_bytes("whole")
    with pytest.raises(RecipeError, match=r"quantization\.type was nf4, is fp4"):
        train(path, "quantization.type=fp4", resume=True)


def test_the_shorthand_is_the_long_form(recipe_file, train):
    train(recipe_file("short.yaml", method={"type": "qlora", "r": 4}, output_dir="short"))
    train(recipe_file("long.yaml", method={"type": "lora", "r": 4}, quantization=NF4, output_dir="long"))
    train(recipe_file("dense.yaml", method={"type": "lora", "r": 4}, output_dir="dense"))
    assert adapter_bytes("short") == adapter_bytes("long") != adapter_bytes("dense")
    resolved = [
        recipe.load(Path(name, "recipe.yaml")).recipe.model_dump(exclude={"output_dir"}) for name in ("short", "long")
    ]
    assert resolved[0] == resolved[1]
    assert "qlora" not in Path("short/recipe.yaml").read_text()


def test_layers_that_are_not_adapted_are_merged_as_they_were_held(recipe_file, train, model_folder):
    train(recipe_file(method={"type": "lora", "r": 4, "target_modules": ["q_proj"]}, quantization=NF4))
    subject = open_subject(Path("run"), None, None)
    assert applying.merge(subject, Path("merged"), None, Recorder(), overwrite=False)[1] == 2
    stored, merged = (load_file(Path(folder) / "model.safetensors") for folder in (model_folder, "merged"))
    packing = quantization.Packing(recipe.QuantizationSection(), (), torch.float32)
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(merged[key], packing.of(stored[key]))
    for key in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.bias"):
        assert torch.equal(merged[key], stored[key])


def test_the_base_is_packed_as_the_merge_says_in_every_dtype(recipe_file, train):
    train(recipe_file(model={"dtype": "bfloat16"}, quantization={"type": "fp4", "double_quant": False}))
    subject = open_subject(Path("run"), None, None)
    agreement, _ = applying.merge(subject, Path("merged"), "bfloat16", Recorder(), overwrite=False)
    assert agreement.max_difference < 2e-2  # the answers of a bfloat16 model against those of its bfloat16 twin


def test_its_dora_is_exported_beside_the_same_base(recipe_file, train):
    train(recipe_file(method={"type": "dora", "r": 4}, quantization=NF4))
    subject = open_subject(Path("run"), None, None)
    done = export_as_lora(subject, Path("lora"), 48, Recorder(), lossy=False, overwrite=False)
    assert done.agreement.max_difference < 1e-5  # of full rank


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_families(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("pooler", [True, False], ids=["with a pooler", "without one"])
@pytest.mark.parametrize("task", ["seq2seq-lm", "sequence-classification", "token-classification"])
def test_in_other_tasks(task, pooler, folders, recipe_file, train, tmp_path):
    """A new head, and a pooler that the checkpoint lacks, are not packed: they train."""
    recorder = Recorder()
    adapted = ["q", "v"] if task == "seq2seq-lm" else ["query", "value"]
    sections = recipe_of("lora", task, folders, tmp_path, target_modules=adapted)
    if not pooler:
        base = Path(sections["model"]["name"])
        sections["model"]["name"] = str(shutil.copytree(base, tmp_path / "base"))
        tensors = load_file(base / "model.safetensors")
        kept = {key: tensor for key, tensor in tensors.items() if "pooler" not in key}
        save_file(kept, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    train(recipe_file(**sections, quantization=NF4), reporter=recorder)
    (said,) = (note for note in recorder.notes if "held in nf4" in note)
    count = {"sequence-classification": 12 + pooler, "token-classification": 12}.get(task)
    assert count is None or said.startswith(f"{count} linear layers")
    subject = open_subject(Path("run"), None, None)
    agreement, _ = applying.merge(subject, Path("merged"), None, Recorder(), overwrite=False)
    assert agreement.max_difference < 1e-5


def test_biases_train_beside_packed_weights(recipe_file, train):
    train(recipe_file(method={"type": "bitfit"}, quantization=NF4))
    subject = open_subject(Path("run"), None, None)
    agreement, _ = applying.merge(subject, Path("merged"), None, Recorder(), overwrite=False)
    assert agreement.max_difference < 1e-5
    with pytest.raises(ModelError, match=r"quantization\.compute_dtype: .* bfloat16 would round"):
        train(recipe_file(method={"type": "bitfit"}, quantization={"compute_dtype": "bfloat16"}), overwrite=True)


class TestWhatCannotBe:
    @pytest.mark.parametrize("command", ["train", "plan"])
    def test_training_packed_weights(self, command, recipe_file, train):
        path = recipe_file(method={"type": "full"}, quantization=NF4)
        with pytest.raises(RecipeError, match=r"full trains weights, such as .*weights in nf4 cannot be trained"):
            train(path) if command == "train" else planning.plan(recipe.load(path), Recorder())

    def test_a_model_without_linear_layers(self, recipe_file, train, make_model, word_tokenizer, tmp_path):
        make_model("gpt2").save_pretrained(tmp_path / "gpt2")
        word_tokenizer.save_pretrained(tmp_path / "gpt2")
        path = recipe_file(model={"name": "gpt2"}, quantization=NF4)
        with pytest.raises(RecipeError, match="no linear layers to hold in nf4") as caught:
            train(path, "model.name=./gpt2")
        line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if '"quantization"' in text)
        assert caught.value.problems[0].where.endswith(f":{line}")

    def test_a_training_of_the_head_alone_can(self, recipe_file, train, make_model, word_tokenizer, tmp_path):
        make_model().save_pretrained(tmp_path / "untied")
        word_tokenizer.save_pretrained(tmp_path / "untied")
        train(recipe_file(model={"name": "./untied"}, method={"type": "head"}, quantization=NF4))


def test_an_adapter_may_hold_a_module_in_full(recipe_file, train):
    """Such a module, that a file of PEFT's may name, is left dense: its weights are the adapter's."""
    train(recipe_file(quantization=NF4))
    config = Path("run/adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": ["layers.0.mlp.up_proj"]}))
    subject = open_subject(Path("run"), None, None)
    model, _ = load_weights(subject.base, torch.device("cpu"))
    assert not quantization.is_quantised(model.model.layers[0].mlp.up_proj)
    assert quantization.is_quantised(model.model.layers[1].mlp.up_proj)
