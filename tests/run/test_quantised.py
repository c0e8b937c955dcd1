"""Runs on a base that is held in 4 bits, from recipe to merged model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcli import quantization, recipe
from peftcli.errors import HostError, ModelError, RecipeError
from peftcli.run import applying, planning
from peftcli.run.exporting import export_as_lora
from peftcli.run.merging import merge_onto
from peftcli.run.opening import load_weights, open_base
from peftcli.run.subject import open_subject
from tests.conftest import Recorder, unseal
from tests.run.merging import merge_and_compare
from tests.run.tasks import recipe_of, save_families
from tests.tolerances import HALF

NF4 = {"type": "nf4"}
SMALL = {"lora": {"r": 4}, "dora": {"r": 4}, "vera": {"r": 8, "target_modules": "all-linear"}}
each_method = pytest.mark.parametrize("name", SMALL)


INT8 = {"type": "int8"}


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
    agreement, count = merge_and_compare(subject, Path("run/merged"), None, recorder, overwrite=False)
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
    assert merge_and_compare(subject, Path("merged"), None, Recorder(), overwrite=False)[1] == 2
    stored, merged = (load_file(Path(folder) / "model.safetensors") for folder in (model_folder, "merged"))
    packing = quantization.Packing(recipe.QuantizationSection(), (), torch.float32)
    key = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(merged[key], packing.of(stored[key]))
    for key in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.bias"):
        assert torch.equal(merged[key], stored[key])


def test_the_base_is_packed_as_the_merge_says_in_every_dtype(recipe_file, train):
    train(recipe_file(model={"dtype": "bfloat16"}, quantization={"type": "fp4", "double_quant": False}))
    subject = open_subject(Path("run"), None, None)
    agreement, _ = merge_and_compare(subject, Path("merged"), "bfloat16", Recorder(), overwrite=False)
    assert agreement.max_difference < 2e-2  # the answers of a bfloat16 model against those of its bfloat16 twin


@pytest.mark.parametrize(
    "fields", [{"quantization": {**NF4, "compute_dtype": "bfloat16"}}, {"model": {"dtype": "bfloat16"}}]
)
def test_what_computed_in_half_precision_is_compared_as_such(fields, recipe_file, train):
    """As a run on a GPU asks for it: merged onto float32 weights, it is that far from the model that was trained."""
    train(recipe_file(method={"type": "vera", **SMALL["vera"]}, training={"learning_rate": 0.1}, **fields))
    subject = open_subject(Path("run"), None, None)
    agreement, _ = merge_and_compare(subject, Path("merged"), "float32", Recorder(), overwrite=False)
    assert 1e-4 < agreement.max_difference < HALF[torch.bfloat16]
    exported = export_as_lora(subject, Path("lora"), None, Recorder(), lossy=False, overwrite=False)
    assert exported.agreement.max_difference < HALF[torch.bfloat16]


def test_its_dora_is_exported_beside_the_same_base(recipe_file, train):
    train(recipe_file(method={"type": "dora", "r": 4}, quantization=NF4))
    subject = open_subject(Path("run"), None, None)
    done = export_as_lora(subject, Path("lora"), 48, Recorder(), lossy=False, overwrite=False)
    assert done.agreement.max_difference < 1e-5  # of full rank


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of what is mapped")
@pytest.mark.parametrize("section", [NF4, INT8], ids=["nf4", "int8"])
def test_nothing_of_the_dense_weights_is_left_in_memory(section, recipe_file, model_folder, tmp_path):
    """As long as one tensor lies in the mapped file, all of it counts as the process's memory."""
    own = shutil.copytree(model_folder, tmp_path / "own")  # that no other test has mapped
    wanted = recipe.load(recipe_file(model={"name": str(own)}, quantization=section)).recipe
    model, _ = load_weights(open_base(wanted.model, packed=wanted.quantization), torch.device("cpu"))
    assert str(own) not in Path("/proc/self/maps").read_text()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight is embedding.weight, "the copies are not tied"
    stored = load_file(model_folder / "model.safetensors")
    assert torch.equal(embedding.weight, stored["model.embed_tokens.weight"])


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
    agreement, _ = merge_and_compare(subject, Path("merged"), None, Recorder(), overwrite=False)
    assert agreement.max_difference < 1e-5


def test_biases_train_beside_packed_weights(recipe_file, train):
    train(recipe_file(method={"type": "bitfit"}, quantization=NF4))
    subject = open_subject(Path("run"), None, None)
    agreement, _ = merge_and_compare(subject, Path("merged"), None, Recorder(), overwrite=False)
    assert agreement.max_difference < 1e-5
    with pytest.raises(ModelError, match=r"quantization\.compute_dtype: .* bfloat16 would round"):
        train(recipe_file(method={"type": "bitfit"}, quantization={"compute_dtype": "bfloat16"}), overwrite=True)


def test_a_base_that_was_not_packed_does_not_train(recipe_file, train, monkeypatch):
    monkeypatch.setattr(quantization, "quantize", lambda *_: 14)
    with pytest.raises(
        HostError, match=r"14 linear layers were to be held in nf4 and are not, such as model\.layers\.0"
    ):
        train(recipe_file(quantization=NF4))
    assert not Path("run").exists()


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


def test_an_adapter_may_hold_a_module_in_full(recipe_file, train, model_folder):
    """Such a module, that a file of PEFT's may name, is left dense: its weights are the adapter's."""
    train(recipe_file(quantization=NF4))
    config = Path("run/adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), "modules_to_save": ["layers.0.mlp.up_proj"]}))
    module = "model.layers.0.mlp.up_proj"
    weights = {"weight": torch.randn(80, 48), "bias": torch.zeros(80)}
    path = Path("run/adapter_model.safetensors")
    held = {f"base_model.model.{module}.{name}": tensor for name, tensor in weights.items()}
    save_file({**load_file(path), **held}, path, {"format": "pt"})
    unseal("run")
    subject = open_subject(Path("run"), None, None)
    model, _ = load_weights(subject.base, torch.device("cpu"))
    assert not quantization.is_quantised(model.model.layers[0].mlp.up_proj)
    assert quantization.is_quantised(model.model.layers[1].mlp.up_proj)


@each_method
def test_int8_from_recipe_to_merged_model(name, recipe_file, train, model_folder):
    recorder = Recorder()
    path = recipe_file(method={"type": name, **SMALL[name]}, quantization=INT8, training={"save_steps": 2})
    facts = train(path, reporter=recorder)
    said = "held in int8, which rounds their inputs too, but in training on a CPU"
    assert any(note.endswith(said) for note in recorder.notes)
    assert not any("cannot keep joined samples apart" in note for note in recorder.notes)

    def stop(step):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(path, "output_dir=other", reporter=Recorder(on_step=stop))
    train(path, "output_dir=other", resume=True)
    assert adapter_bytes("run") == adapter_bytes("other")

    subject = open_subject(Path("run"), None, None)
    recorder = Recorder()
    agreement, count = merge_and_compare(subject, Path("run/merged"), None, recorder, overwrite=False)
    assert (count, agreement.same_choice) == (14, 1.0)
    assert agreement.max_difference < 1e-5
    assert any(note.startswith("int8 rounds the inputs of its layers too") for note in recorder.notes)
    found = applying.evaluate(open_subject(Path("run"), None, None), None, None, "cpu", Recorder())
    assert found["adapter"] == pytest.approx(facts["result"]["eval"])
    assert found["merged"] == pytest.approx(found["adapter"], rel=5e-2)  # without the rounding of inputs
    assert found["merged"] != pytest.approx(found["adapter"], rel=1e-6)


def test_an_int8_adapter_is_exported_as_exactly_as_any(recipe_file, train):
    train(recipe_file(method={"type": "dora", "r": 4}, quantization=INT8))
    subject = open_subject(Path("run"), None, None)
    done = export_as_lora(subject, Path("lora"), 48, Recorder(), lossy=False, overwrite=False)
    assert done.agreement.max_difference < 1e-5  # of full rank


def test_skipped_layers_are_dense_wherever_the_run_goes(recipe_file, train, model_folder):
    recorder = Recorder()
    path = recipe_file(quantization={"type": "nf4", "skip_modules": ["up_proj", "layers.1.self_attn"]})
    facts = train(path, reporter=recorder)
    assert any(note.startswith("8 linear layers") for note in recorder.notes)
    assert facts["quantization"]["skip_modules"] == ["up_proj", "layers.1.self_attn"]
    subject = open_subject(Path("run"), None, None)
    model, _ = load_weights(subject.base, torch.device("cpu"))
    assert sum(quantization.is_quantised(module) for module in model.modules()) == 8
    recorder = Recorder()
    agreement, _ = merge_and_compare(subject, Path("merged"), None, recorder, overwrite=False)
    assert agreement.max_difference < 1e-5
    assert recorder.notes[0].startswith("the 8 linear layers that were held in nf4")
    found = applying.evaluate(subject, None, None, "cpu", Recorder())
    assert found["adapter"] == pytest.approx(facts["result"]["eval"])


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_skipped_layer_that_is_not_there_is_an_error_with_its_line(command, recipe_file, train):
    path = recipe_file(quantization={"type": "nf4", "skip_modules": ["up_porj"]})
    with pytest.raises(RecipeError, match=r'quantization\.skip_modules: no linear layer matches "up_porj"') as caught:
        train(path) if command == "train" else planning.plan(recipe.load(path), Recorder())
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if '"skip_modules"' in text)
    assert caught.value.problems[0].where.endswith(f":{line}")


def test_a_section_that_skips_everything_is_an_error(recipe_file):
    path = recipe_file(quantization={"type": "nf4", "skip_modules": "layers"})
    with pytest.raises(RecipeError, match="no linear layers to hold in nf4 beside those of skip_modules"):
        planning.plan(recipe.load(path), Recorder())


class TestBothBases:
    @pytest.fixture
    def subject(self, recipe_file, train):
        train(recipe_file(quantization=NF4))
        return open_subject(Path("run"), None, None)

    def test_into_the_original_weights(self, subject, model_folder):
        found, count = merge_onto(subject, Path("merged"), None, "original", Recorder(), overwrite=False)
        assert count == 14
        assert list(found) == ["dequantised", "original"]
        assert found["dequantised"].max_difference < 1e-5
        assert found["original"].max_difference > 1e-3  # the rounding of 4 bits
        assert 0 < found["original"].mean_divergence < 1
        stored, merged = (load_file(Path(folder) / "model.safetensors") for folder in (model_folder, "merged"))
        tensors = load_file(Path("run/adapter_model.safetensors"))
        key = "model.layers.0.mlp.up_proj"
        A, B = (tensors[f"base_model.model.{key}.lora_{letter}.weight"] for letter in "AB")
        scale = recipe.load(Path("run/recipe.yaml")).recipe.method.get("alpha", 8) / len(A)
        expected = stored[f"{key}.weight"] + scale * B @ A
        assert torch.allclose(merged[f"{key}.weight"], expected, rtol=0, atol=1e-6)
        assert {entry.name for entry in Path().iterdir() if "merged" in entry.name} == {"merged"}

    def test_it_says_which_weights_are_written(self, subject):
        notes = {}
        for base in ("dequantised", "original"):
            recorder = Recorder()
            merge_onto(subject, Path(base), None, base, recorder, overwrite=False)
            (notes[base],) = recorder.notes
        assert notes["dequantised"].startswith("the 14 linear layers that were held in nf4 become the weights")
        assert "the original weights of the 14 linear layers that were held in nf4" in notes["original"]
        assert "another model than was trained" in notes["original"]

    def test_into_the_dequantised_ones_it_is_the_default_with_both_errors(self, subject):
        found, _ = merge_onto(subject, Path("merged"), None, "dequantised", Recorder(), overwrite=False)
        agreement, _ = merge_and_compare(subject, Path("plain"), None, Recorder(), overwrite=False)
        assert found["dequantised"] == agreement
        assert found["original"].max_difference > 100 * agreement.max_difference
        assert Path("merged/model.safetensors").read_bytes() == Path("plain/model.safetensors").read_bytes()

    def test_on_the_command_line(self, subject, cli):
        code, out, _ = cli("merge", "run", "--base", "original", "--json")
        report = json.loads(out)
        assert (code, report["base"], set(report["compared"])) == (0, "original", {"dequantised", "original"})
        assert report["max_difference"] == report["compared"]["original"]["max_difference"]
        code, out, _ = cli("merge", "run", "--base", "dequantised", "--overwrite")
        assert "onto the dequantised base, compared on" in out
        assert "onto the original base, compared on" in out
        code, _, err = cli("merge", "run", "--base", "best", "--overwrite")
        assert (code, "is none of dequantised, original" in err) == (2, True)

    def test_a_dense_base_is_but_one(self, recipe_file, train):
        train(recipe_file())
        for base in ("original", "dequantised"):
            with pytest.raises(RecipeError, match="was not quantised for the training, so there is only one"):
                merge_onto(
                    open_subject(Path("run"), None, None), Path("merged"), None, base, Recorder(), overwrite=False
                )
