"""What each method can do with each task, from a recipe to its last command: the rows of the support matrix.

A test here either shows that something works, or that it is refused before any work is done, with the reason. Each
records what it found, and `make support` writes the tests that passed into docs/methods.md.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from peftcli import methods, recipe
from peftcli.checkpoint.adapter import attach, read_adapter, save_adapter
from tests.conftest import WORDS, Recorder, write_jsonl
from tests.families import save_family
from tests.methods.building import (
    SMALL,
    adapt,
    assert_close,
    logits,
    origin_of,
    randomise,
    token_ids,
)
from tests.tolerances import EXACT as TOLERANCES

NAMES = methods.names()
FAMILY = {
    "causal-lm": "llama",
    "seq2seq-lm": "t5",
    "sequence-classification": "bert",
    "token-classification": "bert",
    "image-classification": "vit",
}
FLOAT32 = TOLERANCES[torch.float32]
NUM_LESSONS = 300
NUM_STEPS = 300
EXACT = 1e-4
"""How far logits may be apart, relative to the largest, where two models are meant to be one."""


@pytest.fixture
def record(record_property):
    """Notes for the matrix what a method can do: `record("lora", "merge")`, or why it cannot."""

    def note(name, feature, reason=""):
        record_property("support", [name, feature, reason])

    return note


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {name: save_family(name, folder / name) for name in set(FAMILY.values())}


def sentence(i):
    words = WORDS.split()
    return [words[(3 * i + 5 * j) % 25] for j in range(3 + i % 4)]


ROWS = {
    "causal-lm": lambda i: {"prompt": f"{' '.join(sentence(i))} ? ", "completion": sentence(i)[0]},
    "seq2seq-lm": lambda i: {"prompt": " ".join(sentence(i)), "completion": sentence(i)[0]},
    "sequence-classification": lambda i: {"text": " ".join(sentence(i)), "label": "cat" in sentence(i)},
    "token-classification": lambda i: {"tokens": sentence(i), "tags": [word[0] < "m" for word in sentence(i)]},
}


def write_data(task, folder):
    """Writes eight samples of a task; returns what a recipe's data section says of them."""
    if task != "image-classification":
        rows = [{name: _plain(value) for name, value in ROWS[task](i).items()} for i in range(8)]
        return {"train": str(write_jsonl(folder / "rows.jsonl", rows)), "eval": str(folder / "rows.jsonl")}
    for label, channel in (("red", 0), ("blue", 2)):
        (folder / "images" / label).mkdir(parents=True)
        for seed in range(4):
            pixels = np.random.default_rng(seed).integers(0, 90, (12, 12, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / "images" / label / f"{seed}.png")
    return {"train": str(folder / "images"), "eval": str(folder / "images"), "max_length": 1024}


def _plain(value):
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return "yes" if value is True else "no" if value is False else value


def fields_of(name):
    """Returns a method section for models as tiny as these."""
    config = methods.load(name).Config
    return {"type": name, **{field: value for field, value in SMALL.items() if field in config.model_fields}}


@pytest.fixture
def write(recipe_file, families, tmp_path):
    """Writes the recipe of a method and a task; returns its path."""

    def one(name, task, quantization=None, **training):
        settings = {
            "max_steps": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": None,
            "save_steps": 2,
            **training,
        }
        data = {"eval": None, "max_length": 64, **write_data(task, tmp_path)}
        return recipe_file(
            model={"name": str(families[FAMILY[task]]), "task": task},
            data=data,
            method=fields_of(name),
            training=settings,
            **({} if quantization is None else {"quantization": quantization}),
        )

    return one


def supports(name, task):
    """Returns whether the method says that it can do the task on its family's tiny model."""
    method = methods.load(name)
    # T5 has a head that is its embedding too, and not one bias.
    impossible = {("head", "seq2seq-lm"), ("bitfit", "seq2seq-lm")}
    return (method.tasks is None or task in method.tasks) and (name, task) not in impossible


def test_the_page_has_every_method():
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\w+)$", page, re.MULTILINE) == list(NAMES)


@pytest.mark.parametrize("task", FAMILY)
@pytest.mark.parametrize("name", NAMES)
def test_task(name, task, write, train, cli, record):
    """A run trains, and its adapter, read again, measures what it measured in memory."""
    path = write(name, task)
    if not supports(name, task):
        code, _, stderr = cli("train", path)
        assert code == 2
        assert f"{name}" in stderr or "model.task" in stderr or "lm_head" in stderr
        record(name, task, "no")
        return
    found = train(path)["result"]["eval"]
    code, stdout, stderr = cli("eval", "run", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["adapter"] == pytest.approx(found, rel=1e-4)
    record(name, task)


@pytest.mark.parametrize("name", NAMES)
def test_merge(name, write, train, cli, record):
    """The merged folder is the same model, or the method says that there is none before it loads a weight."""
    train(write(name, "causal-lm", learning_rate=0.01))
    method = methods.load(name)
    config = method.Config.model_validate(recipe.load(Path("run/recipe.yaml")).recipe.method)
    code, stdout, stderr = cli("merge", "run", "--verify", "logits", "--json")
    if method.unmergeable(config) is None:
        assert code == 0, stderr
        assert json.loads(stdout)["max_difference"] < EXACT
    else:
        assert code == 2
        assert f"{name} cannot be merged: " in stderr
        assert "loading" not in stderr
    record(name, "merge", method.unmergeable(config) or "")


@pytest.mark.parametrize("name", NAMES)
def test_export(name, write, train, cli, record):
    """What is exactly a LoRA comes out as one; the rest is refused with the reason."""
    train(write(name, "causal-lm", learning_rate=0.01))
    method = methods.load(name)
    config = method.Config.model_validate(recipe.load(Path("run/recipe.yaml")).recipe.method)
    code, stdout, stderr = cli("export", "run", "--to", "lora", "--output", "lora", "--json")
    if method.not_low_rank(config) is None:
        assert code == 0, stderr
        assert json.loads(stdout)["exact"] is True
        assert json.loads(stdout)["agreement"]["max_difference"] < EXACT
        assert cli("eval", "--adapter", "lora", "--data", "rows.jsonl", "--json")[0] == 0
    else:
        assert code == 2
        assert f"{name} is not exactly a LoRA: " in stderr
    record(name, "export", method.not_low_rank(config) or "")


@pytest.mark.parametrize("name", NAMES)
def test_resume(name, write, train, tensors_of, record):
    """A run that was stopped after its first step ends as one that was not."""
    path = write(name, "causal-lm", save_steps=1, max_steps=3)
    train(path)
    expected = tensors_of("run")
    train(path, overwrite=True)
    for step in (2, 3):
        shutil.rmtree(f"run/checkpoint-{step}")
    train(path, resume=True)
    found = tensors_of("run")
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert tensor.equal(found[key]), key
    record(name, "resume")


@pytest.fixture
def tensors_of():
    """Returns the tensors of a run's adapter file."""
    from safetensors.torch import load_file

    return lambda run: load_file(f"{run}/adapter_model.safetensors")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:::peft", "ignore::UserWarning", "ignore::FutureWarning:transformers")
def test_files_of_peft(name, make_model, tmp_path, record):
    """PEFT loads what we write, and we load what PEFT writes, with the same logits."""
    from peft import PeftConfig, PeftModel, PeftType, get_peft_model

    model, ids = make_model(), token_ids()
    config, _ = adapt(model, name, "all-linear")
    if methods.load(name).peft_type_of(config) not in set(PeftType):
        record(name, "PEFT", "PEFT has no such method")
        return
    randomise(model, 0.1)
    (tmp_path / "ours").mkdir()
    save_adapter(tmp_path / "ours", model, origin_of(name, config, base_model=""))
    theirs = PeftModel.from_pretrained(make_model(), tmp_path / "ours").eval()
    assert_close(peft_logits(theirs, ids), logits(model, ids), FLOAT32)
    written = PeftConfig.from_pretrained(tmp_path / "ours")
    written.inference_mode = False
    theirs = get_peft_model(make_model(), written).eval()
    randomise(theirs, 0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    again = make_model()
    attach(again, read_adapter(tmp_path / "theirs"))
    assert_close(logits(again, ids), peft_logits(theirs, ids), FLOAT32)
    record(name, "PEFT")


def peft_logits(model, ids):
    """Returns the logits of the ordinary tokens: PEFT puts virtual ones in front by itself."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :]


@pytest.mark.parametrize("name", NAMES)
def test_nf4(name, write, train, cli, record):
    """On a base held in 4 bits a run trains and measures what its adapter, read again, measures; or says why not.

    That an adapter on a packed layer computes what it should is shown by the contract of all methods.
    """
    path = write(name, "causal-lm", quantization={"type": "nf4"})
    code, _, stderr = cli("train", path)
    if name == "full":
        assert code == 2
        assert "quantization" in stderr
        record(name, "NF4", "packed weights cannot train")
        return
    assert code == 0, stderr
    found = json.loads(Path("run/manifest.json").read_text())["result"]["eval"]
    code, stdout, stderr = cli("eval", "run", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["adapter"] == pytest.approx(found, rel=1e-4)
    record(name, "NF4")


@pytest.fixture(scope="module")
def taught(tmp_path_factory, families):
    """A tiny Llama that has learned to repeat a sentence's first word after a question mark."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("taught")
    tokenizer = AutoTokenizer.from_pretrained(families["llama"])
    model = AutoModelForCausalLM.from_pretrained(families["llama"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    words, random = WORDS.split(), np.random.default_rng(0)
    for _ in range(NUM_LESSONS):
        picked = [[words[i] for i in random.integers(0, 25, 4)] for _ in range(32)]
        ids = torch.tensor([tokenizer(f"{' '.join(one)} ? {one[0]}")["input_ids"] for one in picked])
        labels = ids.clone()
        labels[:, :-1] = -100
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_one_batch_is_learned(name, taught, recipe_file, train, tmp_path):
    """A model that answers with the first word learns to answer with the last, at the method's own learning rate."""
    rows = [{"prompt": f"{' '.join(one)} ? ", "completion": one[-1]} for one in map(sentence, range(8))]
    settings = {"max_steps": NUM_STEPS, "per_device_train_batch_size": 8, "learning_rate": None, "warmup_ratio": 0.0}
    recorder = Recorder()
    path = recipe_file(
        model={"name": str(taught)},
        data={"train": str(write_jsonl(tmp_path / "batch.jsonl", rows)), "eval": None, "max_length": 64},
        method={key: value for key, value in fields_of(name).items() if key != "num_virtual_tokens"},
        training={**settings, "lr_scheduler_type": "constant", "logging_steps": NUM_STEPS, "save_steps": NUM_STEPS},
    )
    train(path, reporter=recorder)
    assert recorder.losses[NUM_STEPS] < recorder.losses[1] / 2
