"""`peftcli plan`: what a recipe would train, told from the model's configuration alone."""

import contextlib
import json
import shutil
import time
from pathlib import Path

import pytest

from peftcli import inject, models
from peftcli.errors import EXIT_BUG
from peftcli.training import memory
from tests.conftest import tiny_llama_config
from tests.run.tasks import FAMILY, recipe_of, save_families, tensors_on_file

COUNTED = (
    "trainable_params",
    "head_params",
    "router_params",
    "base_params",
    "total_params",
    "trainable_percent",
)
SECONDS_7B = 60
"""Far more than a plan for 7 billion parameters takes; less than making them would."""


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return save_families(tmp_path_factory.mktemp("families"))


@pytest.fixture
def plan(cli):
    """Runs `peftcli plan --json`; returns what it prints."""

    def run(path, *overrides):
        code, stdout, stderr = cli("plan", path, *overrides, "--json")
        assert code == 0, stderr
        return json.loads(stdout)

    return run


@pytest.fixture
def config_only(tmp_path):
    """Saves a configuration into a folder that holds nothing else; returns the folder."""

    def save(config, name="empty"):
        config.save_pretrained(tmp_path / name)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["config.json"]
        return str(tmp_path / name)

    return save


CASES = {
    "lora": ("lora", "causal-lm", {}),
    "lora with fa": ("lora", "causal-lm", {"lora_fa": True}),
    "lora from pissa": ("lora", "causal-lm", {"init": "pissa"}),
    "lora of several ranks": ("lora", "causal-lm", {"rank_pattern": {"q_proj": 2}}),
    "dora": ("dora", "seq2seq-lm", {}),
    "vera": ("vera", "causal-lm", {}),
    "vera unsaved": ("vera", "sequence-classification", {"save_projection": False}),
    "dvora": ("dvora", "sequence-classification", {}),
    "vblora": ("vblora", "causal-lm", {}),
    "vblora thrifty": ("vblora", "token-classification", {"save_topk_only": True}),
    "adalora": ("adalora", "causal-lm", {}),
    "hydralora": ("hydralora", "sequence-classification", {}),
    "split with a router": ("split_lora", "causal-lm", {"combine": "router"}),
    "split, summed": ("split_lora", "causal-lm", {"combine": "sum"}),
    "waveft": ("waveft", "causal-lm", {}),
    "ia3": ("ia3", "sequence-classification", {}),
    "adapter": ("adapter", "sequence-classification", {}),
    "bitfit": ("bitfit", "token-classification", {}),
    "head": ("head", "sequence-classification", {}),
    "full": ("full", "seq2seq-lm", {}),
    "prompt": ("prompt", "seq2seq-lm", {}),
    "prompts": ("prompt", "sequence-classification", {"num_prompts": 3}),
    "prefix": ("prefix", "causal-lm", {}),
    "prefix from a network": ("prefix", "causal-lm", {"reparametrize": True, "init": "random"}),
}


@pytest.mark.parametrize(("name", "task", "fields"), CASES.values(), ids=CASES)
def test_a_plan_is_what_training_then_finds(name, task, fields, families, recipe_file, tmp_path, plan, train):
    path = recipe_file(**recipe_of(name, task, families, tmp_path, **fields))
    facts = plan(path)
    manifest = train(path)
    assert {key: facts[key] for key in COUNTED} == manifest["parameters"]
    assert facts["adapted_modules"] == manifest["adapted_modules"]
    tensors = tensors_on_file(tmp_path / "run").values()
    assert facts["adapter_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert sum(group["params"] for group in facts["modules"]) == facts["trainable_params"]


def test_the_counts_add_up(families, recipe_file, tmp_path, plan):
    """By hand: a head of 2 labels, and at each site A [4, I], B [O, 8] and a router [2, I]."""
    sections = recipe_of("hydralora", "sequence-classification", families, tmp_path, target_modules=["query", "value"])
    facts = plan(recipe_file(**sections))
    assert facts["head_params"] == 2 * 32 + 2
    assert facts["router_params"] == 4 * 2 * 32
    assert facts["trainable_params"] - facts["head_params"] == 4 * (4 * 32 + 8 * 32 + 2 * 32)
    assert facts["total_params"] == facts["base_params"] + facts["trainable_params"]
    assert facts["trainable_percent"] == 100 * facts["trainable_params"] / facts["total_params"]
    assert facts["modules"] == [
        {"modules": f"bert.encoder.layer.*.attention.self.{leaf}", "count": 2, "shape": "32 × 32", "params": 896}
        for leaf in ("query", "value")
    ] + [
        {"modules": "classifier.weight", "count": 1, "shape": "2 × 32", "params": 64},
        {"modules": "classifier.bias", "count": 1, "shape": "2", "params": 2},
    ]


def test_what_is_frozen_counts_but_does_not_train(families, recipe_file, tmp_path, plan):
    sections = recipe_of("lora", "causal-lm", families, tmp_path, target_modules=["q_proj"])
    both, frozen = plan(recipe_file(**sections)), plan(recipe_file(**sections), "method.lora_fa=true")
    assert both["trainable_params"] == 2 * 4 * (48 + 48)
    assert frozen["trainable_params"] == 2 * 4 * 48
    assert frozen["total_params"] == both["total_params"]
    assert frozen["adapter_bytes"] == both["adapter_bytes"], "A is in the file all the same"


def test_what_all_modules_share_is_listed_once(families, recipe_file, tmp_path, plan):
    facts = plan(recipe_file(**recipe_of("vblora", "causal-lm", families, tmp_path, target_modules=["q_proj"])))
    assert facts["modules"][-1] == {"modules": "(shared by all 2)", "count": 1, "shape": "", "params": 12 * 8}
    vera = plan(recipe_file(**recipe_of("vera", "causal-lm", families, tmp_path, target_modules=["q_proj"])))
    assert vera["adapter_bytes"] == 4 * (vera["trainable_params"] + 2 * 4 * 48), "A and B, which do not train"


def test_the_number_of_labels_is_the_recipes(families, recipe_file, tmp_path, plan):
    sections = recipe_of("head", "sequence-classification", families, tmp_path, model={"num_labels": 5})
    assert plan(recipe_file(**sections))["trainable_params"] == 5 * 32 + 5


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_configuration_is_enough(task, recipe_file, config_only, plan, monkeypatch):
    """No tokenizer, no weights, no data, no network."""

    def refused(*arguments, **named):
        raise AssertionError("a plan needs none of this")

    for name in ("load_tokenizer", "load_model", "load_image_processor"):
        monkeypatch.setattr(models, name, refused)
    monkeypatch.setattr("peftcli.data.read", refused)
    monkeypatch.setattr("socket.socket.connect", refused)
    data = {"train": "nowhere.jsonl", "eval": None}
    path = recipe_file(model={"name": config_only(tiny_llama_config()), "task": task}, data=data)
    assert plan(path)["adapted_modules"] == 14


def test_a_head_in_half_precision_is_saved_in_full(families, recipe_file, tmp_path, plan):
    """Training holds in float32 what it trains of the base, whatever the checkpoint's dtype."""
    sections = recipe_of("lora", "sequence-classification", families, tmp_path)
    folder = shutil.copytree(families[FAMILY["sequence-classification"]], tmp_path / "half")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    sections["model"]["name"] = str(folder)
    path = recipe_file(**sections)
    facts = plan(path)
    assert facts["adapter_bytes"] == 4 * facts["trainable_params"]


def test_nothing_of_a_models_size_is_made(recipe_file, config_only, plan, monkeypatch):
    """Seven billion parameters, all of them on the meta device, adapters and heads included."""
    from transformers import LlamaConfig

    seen, original = [], inject.graft

    def spied(model, *arguments, **named):
        sites = original(model, *arguments, **named)
        seen.append(model)
        return sites

    monkeypatch.setattr(inject, "graft", spied)
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008)
    name = config_only(config)
    for method in (
        {"type": "lora", "r": 8, "init": "pissa"},
        {"type": "vera"},
        {"type": "waveft"},
        {"type": "adalora"},
    ):
        started = time.process_time()
        facts = plan(recipe_file(model={"name": name}, data={"train": "none", "eval": None}, method=method))
        assert time.process_time() - started < SECONDS_7B
        assert facts["base_params"] == 6_738_415_616
        assert facts["adapted_modules"] == 32 * 7
        (model,) = seen
        seen.clear()
        tensors = [*model.named_parameters(), *model.named_buffers()]
        assert sum(tensor.numel() for _, tensor in tensors) > facts["base_params"]
        real = {name for name, tensor in tensors if tensor.device.type != "meta"}
        assert not real


def test_the_table(families, recipe_file, tmp_path, cli, plan):
    path = recipe_file(**recipe_of("hydralora", "sequence-classification", families, tmp_path))
    facts = plan(path)
    code, stdout, stderr = cli("plan", path)
    assert (code, stderr) == (0, "reading the model's configuration …\n")
    lines = [" ".join(line.split()) for line in stdout.splitlines()]
    assert lines[0].startswith("hydralora on ")
    assert lines[1] == "trained count shape parameters"
    for group in facts["modules"]:
        assert " ".join(f"{group['modules']} {group['count']:,} {group['shape']} {group['params']:,}".split()) in lines
    trainable, head, router = (facts[key] for key in ("trainable_params", "head_params", "router_params"))
    for text in (
        f"trained {trainable:,} ({facts['trainable_percent']:.4f} % of all)",
        f"in the task's head {head:,}",
        f"less those in the task's head {trainable - head:,}",
        f"in routers {router:,}",
        f"less those in routers {trainable - router:,}",
        f"base model {facts['base_params']:,}",
        f"all {facts['total_params']:,}",
        f"adapter on disk {facts['adapter_bytes'] / 1e6:.2f} MB",
    ):
        assert text in lines


def test_a_table_leaves_out_what_there_is_not(families, recipe_file, tmp_path, cli):
    _, stdout, _ = cli("plan", recipe_file(**recipe_of("lora", "causal-lm", families, tmp_path)))
    assert "head" not in stdout
    assert "router" not in stdout
    _, stdout, _ = cli("plan", recipe_file(**recipe_of("prefix", "causal-lm", families, tmp_path)))
    assert "(the model)" in stdout


IMAGES = {"name": "vit", "task": "image-classification"}
WRONG = {
    "no such module": ({}, {"type": "lora", "target_modules": ["q_porj"]}, "target_modules", 'did you mean "q_proj"'),
    "a rank too large": ({}, {"type": "lora", "r": 49}, '"r"', "49 is more than the"),
    "heads too large": ({}, {"type": "hydralora", "r": 100}, '"r"', "100 is more than the"),
    "vectors too long": ({}, {"type": "vblora", "vector_length": 7}, "vector_length", "7 does not divide"),
    "heads not known": ({}, {"type": "hydralora", "num_heads": "auto"}, "num_heads", "give a number"),
    "a prompt on images": (IMAGES, {"type": "prompt"}, "prompt", "prompt does not do model.task: image-classification"),
    "a prefix on images": (IMAGES, {"type": "prefix"}, "prefix", "prefix does not do model.task: image-classification"),
    "a field too many": ({}, {"type": "lora", "num_heads": 3}, "num_heads", "unknown key"),
    "not this task": ({"name": "vit"}, {"type": "lora"}, None, "vit models cannot be used as causal-lm"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_planned(case, recipe_file, config_only, cli):
    from transformers import ViTConfig

    model, method, key, text = WRONG[case]
    folder = config_only(ViTConfig() if model else tiny_llama_config(tie_word_embeddings=True))
    data = {"train": "none", "eval": None, **({"max_length": 1024} if "task" in model else {})}
    path = recipe_file(model={**model, "name": folder}, data=data, method=method)
    code, stdout, stderr = cli("plan", path)
    assert (code, stdout, stderr.count("error:")) == (2 if key else 4, "", 1)
    assert text in stderr
    if key is not None:
        line = next(number for number, row in enumerate(Path(path).read_text().splitlines(), 1) if key in row)
        assert f"recipe.yaml:{line}: method." in stderr


def test_a_folder_without_a_configuration(recipe_file, tmp_path, cli):
    (tmp_path / "empty").mkdir()
    code, _, stderr = cli("plan", recipe_file(model={"name": str(tmp_path / "empty")}))
    assert code == 4 != EXIT_BUG
    assert "has no config.json" in stderr


def test_every_field_is_there(families, recipe_file, tmp_path, plan):
    facts = plan(recipe_file(**recipe_of("lora", "causal-lm", families, tmp_path)))
    sizes = ["adapter_bytes", "base_bytes", "training_bytes"]
    assert list(facts) == ["method", "model", *COUNTED, "adapted_modules", *sizes, "modules"]
    assert {key for group in facts["modules"] for key in group} == {"modules", "count", "shape", "params"}


@pytest.mark.parametrize("packed", [None, "nf4", "int8"])
@pytest.mark.parametrize("method", ["lora", "dora", "ln_tuning"])
def test_the_memory_that_is_planned_is_what_is_held(method, packed, recipe_file, plan, train, monkeypatch):
    found = {}

    @contextlib.contextmanager
    def noted(model, settings, *_):
        found["held"] = memory.held(model, settings)
        yield

    monkeypatch.setattr(memory, "explained", noted)
    sections = {"method": {"type": method}, "training": {"max_steps": 1}}
    path = recipe_file(**sections, **({"quantization": {"type": packed}} if packed else {}))
    facts = plan(path)
    train(path)
    assert facts["training_bytes"] == found["held"].trained
    # Tables of code values, and scales of layers that are no multiple of a block, are not in a plan.
    assert facts["base_bytes"] == pytest.approx(found["held"].base, rel=0.1 if packed else 0.01)
