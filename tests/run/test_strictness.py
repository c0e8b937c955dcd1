"""That an adapter goes with its own base: how that is told, on which commands, and what --force says."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcli.checkpoint import seal as seals
from peftcli.errors import ModelError
from peftcli.recipe import ModelSection
from peftcli.run.exporting import export_as_lora
from peftcli.run.fingerprint import fingerprint
from peftcli.run.opening import open_base
from peftcli.run.subject import open_subject
from tests.conftest import Recorder

COMMANDS = {"eval": [], "merge": [], "export": [], "generate": ["the cat ? "]}


@pytest.fixture
def own_base(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "base")


@pytest.fixture
def run(own_base, recipe_file, train):
    train(recipe_file(model={"name": str(own_base)}, training={"max_steps": 2, "save_steps": 1}))
    return Path("run")


def change(folder, edit):
    path = folder / "model.safetensors"
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


def of(folder):
    return fingerprint(open_base(ModelSection(name=str(folder))))


class TestFingerprints:
    def test_it_does_not_depend_on_how_the_files_are_cut(self, own_base, model_folder):
        from transformers import AutoModelForCausalLM

        before = of(own_base)
        (own_base / "model.safetensors").unlink()
        AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(own_base, max_shard_size="20KB")
        assert len(list(own_base.glob("*.safetensors"))) > 5
        assert of(own_base) == before

    def test_it_depends_on_each_tensor(self, own_base):
        found = [of(own_base)]
        for key in load_file(own_base / "model.safetensors"):
            change(own_base, lambda tensors, key=key: tensors[key].add_(1e-3))
            found.append(of(own_base))
        assert len(set(found)) == len(found)

    def test_it_depends_on_names_shapes_and_dtypes(self, own_base):
        def rename(tensors):
            tensors["x"] = tensors.pop("model.norm.weight")

        def reshape(tensors):
            tensors["x"] = tensors["x"][None]

        def narrow(tensors):
            tensors["x"] = tensors["x"].bfloat16()

        found = [of(own_base)]
        for edit in (rename, reshape, narrow):
            change(own_base, edit)
            found.append(of(own_base))
        assert len(set(found)) == 4

    def test_files_that_are_not_there_have_none(self, own_base):
        (own_base / "model.safetensors").unlink()
        assert of(own_base) is None


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_asks_the_seal(command, run, own_base, cli):
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1.5}))
    change(own_base, lambda tensors: tensors["model.norm.weight"].mul_(1.01))
    code, stdout, stderr = cli(command, "run", *COMMANDS[command])
    assert (code, stdout, stderr.count("error:")) == (4, "", 2)
    for words in ("lora_alpha was 8, is 1.5", "are not those that the adapter was trained on"):
        assert words in " ".join(stderr.split())
    code, _, stderr = cli(command, "run", *COMMANDS[command], "--force")
    assert code == 0, stderr
    assert " ".join(stderr.split()).count("--force: ") == 2


def test_a_run_is_not_resumed_on_another_base(run, own_base, train):
    shutil.rmtree(run / "checkpoint-2")
    change(own_base, lambda tensors: tensors["model.norm.weight"].mul_(1.01))
    with pytest.raises(ModelError, match=r"checkpoint-1 cannot be resumed: .*base are not those") as caught:
        train(Path("recipe.yaml"), resume=True)
    assert "new run" in caught.value.problems[0].hint


def test_checkpoints_and_exports_are_sealed_too(run, own_base):
    assert open_subject(None, run / "checkpoint-1", None).remarks == ()
    export_as_lora(open_subject(run, None, None), Path("lora"), None, Recorder(), lossy=False, overwrite=False)
    assert open_subject(None, Path("lora"), None).remarks == ()
    assert {seals.read(folder).base for folder in (run, run / "checkpoint-1", Path("lora"))} == {of(own_base)}


def test_a_seal_that_knows_no_base_says_so(run):
    seal = seals.read(run)
    seals.write(run, seal.config, None)
    (remark,) = open_subject(run, None, None).remarks
    assert "names no base" in remark


def test_the_base_is_not_read_for_an_adapter_that_does_not_fit(run, monkeypatch):
    """What takes long comes after what can be known at once."""
    tensors = load_file(run / "adapter_model.safetensors")
    save_file({key: torch.cat([one, one]) for key, one in tensors.items()}, run / "adapter_model.safetensors")
    monkeypatch.setattr("peftcli.models.load_model", None)
    with pytest.raises(ModelError, match="has shape"):
        open_subject(run, None, None)
