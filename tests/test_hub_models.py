"""Models of the hub, out of its cache: they are checked as strictly as a folder, and known by their content."""

import json
import shutil
import struct

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from peftcli import headers, models
from peftcli.errors import ModelError
from peftcli.recipe import ModelSection
from peftcli.run import fingerprint
from peftcli.run.opening import open_base

CPU = torch.device("cpu")
NAME = "some-org/tiny"


@pytest.fixture
def cached(model_folder, tmp_path, monkeypatch):
    """The folder in the hub's cache that has the tiny model's files, its weights in two shards."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    kept = tmp_path / "hub" / "models--some-org--tiny"
    folder = kept / "snapshots" / ("a" * 40)
    shutil.copytree(model_folder, folder)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("a" * 40)
    split(folder)
    return folder


def split(folder):
    tensors = load_file(folder / headers.SINGLE_FILE)
    names = {key: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, key in enumerate(sorted(tensors))}
    for name in set(names.values()):
        save_file({key: tensors[key] for key in tensors if names[key] == name}, folder / name, {"format": "pt"})
    (folder / headers.SINGLE_FILE).unlink()
    (folder / headers.INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": names}))


def open_model(name=NAME):
    section = ModelSection(name=str(name))
    source = models.locate(section)
    return models.load_model(section, source, models.load_config(section, source), CPU)[0]


def base_of(name=NAME):
    return open_base(ModelSection(name=str(name)))


def test_it_is_the_model_that_a_folder_has(cached, model_folder):
    found, expected = open_model().state_dict(), open_model(model_folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def twice(raw):
    """Returns a shard's bytes with the first tensor named twice: readers differ in which of the two they keep."""
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].decode().strip()
    name, facts = next((key, facts) for key, facts in json.loads(header).items() if key != "__metadata__")
    header = f"{header[:-1]},{json.dumps(name)}:{json.dumps(facts)}}}"
    return struct.pack("<Q", len(header)) + header.encode() + raw[8 + length :]


def test_each_shard_is_checked(cached):
    shard = cached / "model-00002-of-00002.safetensors"
    shard.write_bytes(twice(shard.read_bytes()))
    with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors: its header gives '.*' twice"):
        open_model()


@pytest.mark.parametrize("name", ["../../elsewhere.safetensors", "pytorch_model.bin"])
def test_an_index_leads_nowhere_else(name, cached):
    index = cached / headers.INDEX_FILE
    index.write_text(json.dumps({"weight_map": dict.fromkeys(json.loads(index.read_text())["weight_map"], name)}))
    with pytest.raises(ModelError, match="which is not a safetensors file in its folder"):
        open_model()


def test_a_shard_that_was_not_fetched(cached):
    (cached / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match="not in the local cache, and the model hub cannot be reached"):
        open_model()


class TestFingerprints:
    def test_it_is_that_of_the_same_model_in_a_folder(self, cached, model_folder):
        """Wherever it lies, and however many files it is in."""
        assert fingerprint.fingerprint(base_of()) == fingerprint.fingerprint(base_of(model_folder)) is not None

    def test_it_is_another_for_other_weights(self, cached, model_folder):
        shard = cached / "model-00001-of-00002.safetensors"
        tensors = load_file(shard)
        key = next(iter(tensors))
        save_file({**tensors, key: tensors[key] + 0.01}, shard, {"format": "pt"})
        assert fingerprint.fingerprint(base_of()) != fingerprint.fingerprint(base_of(model_folder))

    def test_there_is_none_where_a_file_lacks(self, cached):
        base = base_of()
        (cached / "model-00002-of-00002.safetensors").unlink()
        assert fingerprint.fingerprint(base) is None

    def test_a_damaged_index_is_said(self, cached):
        base = base_of()
        (cached / headers.INDEX_FILE).write_text("{")
        with pytest.raises(ModelError, match=r"the files of some-org.*: it is not an index"):
            fingerprint.fingerprint(base)


def test_an_adapter_trained_on_it_is_merged_and_read_there(cached, recipe_file, cli, tmp_path):
    path = recipe_file(model={"name": NAME}, training={"max_steps": 2})
    for command in (["train", path], ["merge", tmp_path / "run"], ["eval", tmp_path / "run"]):
        code, _, said = cli(*command)
        assert code == 0, said
    assert not (tmp_path / "run" / "merged" / headers.SINGLE_FILE).is_symlink()
    other = cached / "model-00001-of-00002.safetensors"
    tensors = load_file(other)
    save_file({key: tensor + 0.01 for key, tensor in tensors.items()}, other, {"format": "pt"})
    code, _, said = cli("eval", tmp_path / "run")
    assert code == 4, said
    assert "not those that the adapter was trained on" in " ".join(said.split())
