import pytest
import torch
from pydantic import ValidationError

from peftcli.methods.full import Full, FullConfig
from tests.methods.building import adapt, trainable

MEDIUM = {"n_layer": 24, "n_embd": 1024, "n_head": 16}
LARGE = {"n_layer": 36, "n_embd": 1280, "n_head": 20}


@pytest.mark.parametrize(
    ("sizes", "layers", "count"),
    [(MEDIUM, None, 354_823_168), (LARGE, None, 774_030_080), (MEDIUM, [22, 23], 25_192_448)],
)
def test_published_counts(sizes, layers, count):
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(**sizes))
    config, _ = adapt(model, "full", layers=layers)
    assert Full.check_model(config, model) == []
    trained = trainable(model)
    assert sum(parameter.numel() for parameter in trained.values()) == count
    assert layers is None or {name.split(".")[2] for name in trained} == {"22", "23"}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_everything_trains(family, make_model, ids):
    model = make_model(family)
    _, sites = adapt(model, "full")
    assert sites == []
    assert set(trainable(model)) == set(dict(model.named_parameters()))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_the_other_layers_stay_as_they_are(make_model, ids):
    model = make_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapt(model, "full", layers=[1])
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if name.startswith("model.layers.1.")}


def test_a_layer_that_is_not_there_is_refused(make_model):
    config = FullConfig(layers=[1, 2, -1])
    assert Full.check_model(config, make_model()) == [
        f"layers: there is no layer {layer}; the model's are 0 to 1" for layer in (2, -1)
    ]


@pytest.mark.parametrize("fields", [{"layers": []}, {"layers": ["last"]}, {"r": 4}])
def test_impossible_fields(fields):
    with pytest.raises(ValidationError, match=next(iter(fields))):
        FullConfig.model_validate({"type": "full", **fields})


@pytest.mark.parametrize("config", [FullConfig(layers=None), FullConfig(layers=[0, 3])])
def test_the_file_says_every_field(config):
    assert Full.config_from_peft(Full.peft_config(config)) == config
