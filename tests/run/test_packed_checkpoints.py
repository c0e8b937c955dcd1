"""Base models whose files are packed already, from recipe to merged model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peftcli
from peftcli import quantization, recipe
from peftcli.errors import ModelError, RecipeError
from peftcli.run import applying, inspecting, planning
from peftcli.run.exporting import export_as_lora
from peftcli.run.merging import merge_onto
from peftcli.run.opening import load_weights, open_base
from peftcli.run.subject import open_subject
from tests.conftest import Recorder
from tests.methods.building import assert_close
from tests.run.merging import merge_and_compare
from tests.run.packed import KINDS, change_config, save_packed
from tests.run.tasks import recipe_of, save_families
from tests.tolerances import PACKED

CPU = torch.device("cpu")
ROOT = Path(peftcli.__file__).parents[1]
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def packed_folders(tmp_path_factory, model_folder):
    return {kind: save_packed(kind, model_folder, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture
def packed_recipe(recipe_file, packed_folders):
    def write(kind, **sections):
        return recipe_file(**{"model": {"name": str(packed_folders[kind])}, **sections})

    return write


def as_bytes(weight):
    """Returns packed bytes for a comparison: as floating-point numbers many would not equal themselves."""
    return weight.detach().flatten().view(torch.uint8)


def loaded(folder, **fields):
    section = recipe.ModelSection(name=str(folder))
    packed = recipe.QuantizationSection(**fields) if fields else None
    return load_weights(open_base(section, packed=packed), CPU)[0]


@each_kind
def test_it_is_loaded_as_it_was_saved_and_behaves_as_what_is_packed_here(kind, packed_folders, model_folder):
    model = loaded(packed_folders[kind])
    files = packed_folders[kind].glob("*.safetensors")
    stored = {key: tensor for file in files for key, tensor in load_file(file).items()}
    layers = {name: module for name, module in model.named_modules() if quantization.is_quantised(module)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert layer.weight.dtype == stored[f"{name}.weight"].dtype
        assert torch.equal(as_bytes(layer.weight), as_bytes(stored[f"{name}.weight"]))
        assert not layer.weight.requires_grad
        assert "source_cls" not in vars(layer)
        assert "forward" not in vars(layer)
        layer.eval()
        x = torch.randn(3, layer.in_features)
        with quantization.unrounded_inputs(layer):
            expected = torch.nn.functional.linear(x, quantization.unpacked(layer), layer.bias)
            assert_close(layer(x), expected, PACKED)
    assert not {"hf_device_map", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"} & set(vars(model))
    assert not getattr(model, "is_quantized", False)
    others = [p for name, p in model.named_parameters() if name.removesuffix(".weight") not in layers]
    assert {parameter.dtype for parameter in others} == {torch.float32}
    own = loaded(model_folder, type=kind, double_quant=kind == "nf4") if kind != "int8" else None
    if own is not None:  # it was packed from bfloat16 there, from float32 here
        assert {type(module) for module in own.modules()} == {type(module) for module in model.modules()}


@each_kind
def test_from_recipe_to_merged_model(kind, packed_recipe, packed_folders, train):
    recorder = Recorder()
    path = packed_recipe(kind, training={"save_steps": 2})
    facts = train(path, reporter=recorder)
    (said,) = [note for note in recorder.notes if "comes packed" in note]
    assert f"14 linear layers, 84 % of the base's weights, are held in {kind}" in said
    assert facts["quantization"]["type"] == kind
    assert f"| Base held in | {kind} |" in Path("run/README.md").read_text()
    recorder = Recorder()
    assert facts["parameters"].items() <= planning.plan(recipe.load(path), recorder).items()
    assert inspecting.validate(recipe.load(path), recorder)["adapted_modules"] == 14
    assert len(recorder.notes) == 2
    assert all(note.endswith(f"comes packed: its linear layers are held in {kind}") for note in recorder.notes)
    train(path, resume=True)

    subject = open_subject(Path("run"), None, None)
    found = applying.evaluate(subject, None, None, "cpu", Recorder())
    assert found["adapter"] == pytest.approx(facts["result"]["eval"])
    answers = list(applying.generate(subject, ["the cat"], {"max_new_tokens": 3}, "cpu", Recorder(), with_base=True))
    assert set(answers[0]) == {"prompt", "base", "adapter"}

    agreement, count = merge_and_compare(subject, Path("merged"), "float32", Recorder(), overwrite=False)
    assert count == 14
    assert agreement.max_difference < 1e-5
    config = json.loads(Path("merged/config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"
    tensors = {key: t for file in Path("merged").glob("*.safetensors") for key, t in load_file(file).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tensors) == 34

    merge_and_compare(subject, Path("half"), None, Recorder(), overwrite=False)
    tensors = {key: t for file in Path("half").glob("*.safetensors") for key, t in load_file(file).items()}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads(Path("half/config.json").read_text())["dtype"] == "bfloat16"

    with pytest.raises(RecipeError, match="comes packed, and its original weights are not in it"):
        merge_onto(subject, Path("other"), None, "original", Recorder(), overwrite=False)
    assert not [entry for entry in Path().iterdir() if "other" in entry.name]


def test_its_dora_is_exported_beside_the_same_base(packed_recipe, train):
    train(packed_recipe("nf4", method={"type": "dora", "r": 4}))
    subject = open_subject(Path("run"), None, None)
    done = export_as_lora(subject, Path("lora"), 48, Recorder(), lossy=False, overwrite=False)
    assert done.agreement.max_difference < 1e-5  # of full rank


@each_kind
def test_a_section_that_agrees_is_fine_and_settles_what_is_left_to_it(kind, packed_folders):
    fields = {"nf4": {"type": "nf4"}, "fp4": {"type": "fp4", "double_quant": False}}
    if kind == "int8":
        assert loaded(packed_folders[kind], type="int8", outlier_threshold=5.0) is not None
        return
    model = loaded(packed_folders[kind], **fields[kind], compute_dtype="bfloat16", storage_dtype="float16")
    layer = model.model.layers[0].mlp.up_proj
    assert (layer.compute_dtype, layer.weight.dtype) == (torch.bfloat16, torch.float16)
    plain = loaded(packed_folders[kind]).model.layers[0].mlp.up_proj
    assert torch.equal(as_bytes(layer.weight), as_bytes(plain.weight))
    assert torch.equal(quantization.unpacked(layer), quantization.unpacked(plain).bfloat16())


@pytest.mark.parametrize("command", ["train", "plan", "validate"])
@pytest.mark.parametrize(
    ("kind", "section", "key", "hint"),
    [
        ("nf4", {"type": "fp4"}, "type", "set type to that"),
        ("nf4", {"type": "int8"}, "type", "set type to that"),
        ("fp4", {"type": "fp4"}, "double_quant", "set double_quant to that"),
        ("int8", {"type": "int8"}, "outlier_threshold", "remove the section"),
        ("nf4", {"skip_modules": ["up_proj"]}, "skip_modules", "remove it"),
        ("nf4", {"skip_modules": ["up_porj"]}, "skip_modules", "did you mean"),
    ],
)
def test_a_section_that_disagrees_is_an_error(command, kind, section, key, hint, packed_recipe, train):
    path = packed_recipe(kind, quantization=section)
    run = {"plan": planning.plan, "validate": inspecting.validate}.get(command)
    with pytest.raises(RecipeError, match=rf"quantization\.{key}: ") as caught:
        train(path) if run is None else run(recipe.load(path), Recorder())
    (problem,) = caught.value.problems
    assert "model.name" in problem.message or "matches" in problem.message
    assert hint in problem.hint
    assert problem.where.rpartition(":")[2].isdecimal()


def test_another_base_that_comes_packed_otherwise_is_an_error(recipe_file, train, packed_folders):
    train(recipe_file(quantization={"type": "nf4"}))
    with pytest.raises(RecipeError, match=r'quantization\.type: "nf4" does not go with model\.name: .*type: "int8"'):
        open_subject(Path("run"), None, str(packed_folders["int8"]))
    assert open_subject(Path("run"), None, str(packed_folders["nf4"]), force=True).base.comes_packed


@pytest.mark.parametrize(
    "fields",
    [
        *({"quant_method": method} for method in ("gptq", "awq", "fp8", "mxfp4")),
        {"bnb_4bit_quant_storage": "float64"},
        {"bnb_4bit_quant_type": "af4"},
        {"load_in_8bit": True},
        {"load_in_4bit": False},
    ],
    ids=str,
)
def test_other_quantisations_are_refused(fields, packed_folders, tmp_path, recipe_file, train):
    shutil.copytree(packed_folders["nf4"], tmp_path / "other")
    change_config(tmp_path / "other", **fields)
    method = fields.get("quant_method", "bitsandbytes")
    for run in (train, lambda path: planning.plan(recipe.load(path), Recorder())):
        with pytest.raises(ModelError, match=rf"model\.name: \S+ comes quantised by {method}") as caught:
            run(recipe_file(model={"name": str(tmp_path / "other")}))
        assert "name the model that it was made from" in caught.value.problems[0].hint


def test_a_configuration_of_other_weights_is_refused(packed_folders, tmp_path):
    shutil.copytree(packed_folders["nf4"], tmp_path / "other")
    change_config(tmp_path / "other", llm_int8_skip_modules=["lm_head", "up_proj"])
    with pytest.raises(ModelError, match="up_proj"):
        loaded(tmp_path / "other")


def test_what_would_train_packed_weights_is_refused(packed_recipe, train):
    with pytest.raises(RecipeError, match=r"full trains weights, such as .*weights in nf4 cannot be trained"):
        train(packed_recipe("nf4", method={"type": "full"}))


def test_layers_that_were_left_dense_are_adapted_and_merged_as_such(model_folder, tmp_path, recipe_file, train):
    folder = save_packed("nf4", model_folder, tmp_path / "part", llm_int8_skip_modules=["lm_head", "down_proj"])
    train(recipe_file(model={"name": str(folder)}, quantization={"type": "nf4", "skip_modules": ["down_proj"]}))
    subject = open_subject(Path("run"), None, None)
    model, _ = load_weights(subject.base, CPU)
    assert sum(quantization.is_quantised(module) for module in model.modules()) == 12
    agreement, count = merge_and_compare(subject, Path("merged"), "float32", Recorder(), overwrite=False)
    assert (count, agreement.max_difference < 1e-5) == (14, True)


def test_a_new_head_on_it_is_dense_and_trains(recipe_file, train, tmp_path):
    """transformers would expect the classifier of a model that was packed without one to be packed too."""
    folders = save_families(tmp_path / "families")
    folder = save_packed("nf4", folders["bert"], tmp_path / "packed", auto="AutoModel")
    sections = recipe_of("lora", "sequence-classification", folders, tmp_path, target_modules=["query", "value"])
    sections["model"]["name"] = str(folder)
    recorder = Recorder()
    train(recipe_file(**sections), reporter=recorder)
    assert any("classifier.bias, classifier.weight: they start from random numbers" in note for note in recorder.notes)
    subject = open_subject(Path("run"), None, None)
    agreement, _ = merge_and_compare(subject, Path("merged"), "float32", Recorder(), overwrite=False)
    assert agreement.max_difference < 1e-5


def test_nothing_is_said_that_is_not_peftclis_own(packed_recipe):
    """bitsandbytes warns as it is imported, and int8 at each product: seen only where nothing imported it before."""
    path = packed_recipe("int8", training={"max_steps": 1})
    command = [sys.executable, "-m", "peftcli", "train", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "comes packed: 14 linear layers" in done.stderr
    assert "gemm_4bit" not in done.stderr
    assert "MatMul8bitLt" not in done.stderr


def test_gpt2s_layers_come_packed_but_are_no_linear_layers(make_model, word_tokenizer, tmp_path, recipe_file):
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    word_tokenizer.save_pretrained(tmp_path / "gpt2")
    folder = save_packed("nf4", tmp_path / "gpt2", tmp_path / "packed")
    with pytest.raises(ModelError, match="comes packed, but not its linear layers"):
        planning.plan(recipe.load(recipe_file(model={"name": str(folder)})), Recorder())
    with pytest.raises(ModelError, match=r"disagree on whether .* is packed"):
        loaded(folder)
