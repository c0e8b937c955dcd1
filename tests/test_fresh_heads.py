"""Models for tasks that their checkpoint was not made for: what is missing starts anew, and only what may."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcli import models
from peftcli.errors import ModelError
from peftcli.recipe import ModelSection
from tests.families import save_family, tiny_model
from tests.tolerances import STANDARD_ERRORS

CPU = torch.device("cpu")


def load(folder, task, names=("a", "b", "c"), seed=0, kind="single-label"):
    section = ModelSection(name=str(folder), task=task)
    source = models.locate(section)
    config = models.load_config(section, source)
    models.set_labels(config, names, kind)
    return models.load_model(section, source, config, CPU, seed)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_family("bert", tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize(
    ("family", "task", "head"),
    [
        ("bert", "sequence-classification", {"classifier.weight", "classifier.bias"}),
        ("bert", "token-classification", {"classifier.weight", "classifier.bias"}),
        ("llama", "sequence-classification", {"score.weight"}),
        ("vit", "image-classification", {"classifier.weight", "classifier.bias"}),
    ],
)
def test_the_head_is_fresh_and_the_rest_is_the_checkpoints(family, task, head, tmp_path):
    folder = save_family(family, tmp_path)
    model, fresh = load(folder, task)
    assert set(fresh) == head
    assert (model.config.num_labels, model.config.id2label[2]) == (3, "c")
    stored = {one.numpy().tobytes() for one in load_file(folder / "model.safetensors").values()}
    own = [one.detach().numpy().tobytes() for name, one in model.named_parameters() if name not in head]
    assert set(own) <= stored
    assert len(own) > 10


def test_a_head_starts_from_seed_and_name_alone(bert):
    first, _ = load(bert, "sequence-classification", seed=1)
    torch.manual_seed(99)
    again, _ = load(bert, "sequence-classification", seed=1)
    other, _ = load(bert, "sequence-classification", seed=2)
    weight = first.classifier.weight
    assert weight.equal(again.classifier.weight)
    assert not weight.equal(other.classifier.weight)
    assert first.classifier.bias.tolist() == [0, 0, 0]
    count, deviation = weight.numel(), first.config.initializer_range
    assert abs(weight.std() / deviation - 1) < STANDARD_ERRORS / (2 * count) ** 0.5
    assert abs(weight.mean()) < STANDARD_ERRORS * deviation / count**0.5


def test_a_missing_pooler_starts_anew_too(bert, tmp_path):
    tensors = load_file(bert / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
    assert len(kept) == len(tensors) - 2
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    _, fresh = load(tmp_path, "sequence-classification")
    assert set(fresh) == {
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    }


def test_a_head_for_other_labels_starts_anew_and_one_for_as_many_stays(tmp_path):
    tiny_model("bert", "BertForSequenceClassification", num_labels=3).save_pretrained(tmp_path)
    assert load(tmp_path, "sequence-classification")[1] == []
    model, fresh = load(tmp_path, "sequence-classification", ("a", "b"))
    assert set(fresh) == {"classifier.weight", "classifier.bias"}
    assert model.classifier.weight.shape == (2, 32)


def test_a_hole_in_the_encoder_is_still_an_error(bert, tmp_path):
    tensors = load_file(bert / "model.safetensors")
    name = next(name for name in tensors if name.endswith("attention.self.query.weight"))
    save_file({k: v for k, v in tensors.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((bert / "config.json").read_text())
    with pytest.raises(ModelError, match=f"lacks weights that the model needs: bert.{name}"):
        load(tmp_path, "sequence-classification")
    config = json.loads((bert / "config.json").read_text()) | {"max_position_embeddings": 65}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="has weights that misfit"):
        load(tmp_path, "sequence-classification")


def test_roberta_numbers_its_positions_from_the_padding_on():
    from tests.families import tiny_config

    assert models.max_positions(tiny_config("bert")) == 64
    assert models.max_positions(tiny_config("roberta", pad_token_id=1)) == 64
    assert models.max_positions(tiny_config("t5")) is None
