"""What a run says about itself: true, complete, and nothing that is secret."""

import hashlib
import json
import math
from importlib.metadata import version

import pytest

from peftcli import manifest
from peftcli.recipe import DataSection, ModelSection, Recipe, TrainingSection
from peftcli.run.fingerprint import fingerprint
from peftcli.run.opening import open_base

VALUES = {
    "model": {"name": "org/model"},
    "data": {"train": "train.jsonl", "eval": "eval.jsonl", "format": "text"},
    "method": {"type": "lora", "r": 4},
    "output_dir": "run",
}


def changed(**sections):
    values = {key: {**value} if isinstance(value, dict) else value for key, value in VALUES.items()}
    for section, fields in sections.items():
        values[section] = {**values.get(section, {}), **fields} if isinstance(fields, dict) else fields
    return set(manifest.changed_fields(Recipe.model_validate(values), Recipe.model_validate(VALUES)))


class TestChangedFields:
    def test_nothing(self):
        assert changed() == set()

    def test_each_key_with_its_values(self):
        now = Recipe.model_validate({**VALUES, "method": {"type": "dora", "r": 8}})
        found = manifest.changed_fields(now, Recipe.model_validate(VALUES))
        assert found == {"method.type": ("lora", "dora"), "method.r": (4, 8)}

    def test_a_key_that_only_one_has(self):
        assert changed(method={"type": "lora", "r": 4, "alpha": 8.0}) == {"method.alpha"}

    @pytest.mark.parametrize(
        "sections",
        [
            {"training": {"logging_steps": 3, "save_steps": 4, "save_total_limit": 9, "eval_steps": 5}},
            {"training": {"per_device_eval_batch_size": 2}},
            {"logging": {"report_to": ["tensorboard"]}},
            {"evaluation": {"generate": {"max_new_tokens": 3}}},
            {"output_dir": "elsewhere"},
        ],
    )
    def test_what_changes_no_step(self, sections):
        assert changed(**sections) == set()

    def test_every_free_key_is_one(self):
        keys = manifest._flat(Recipe.model_validate(VALUES).model_dump())
        for free in manifest.FREE_TO_CHANGE:
            assert any(key == free or key.startswith(f"{free}.") for key in keys), free

    # The stand-in is of no field's type.
    @pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
    @pytest.mark.parametrize(
        ("section", "model"), [("training", TrainingSection), ("data", DataSection), ("model", ModelSection)]
    )
    def test_every_other_field_counts(self, section, model):
        """A field added later counts unless it is named as free."""
        base = Recipe.model_validate(VALUES)
        for field in model.model_fields:
            part = getattr(base, section)
            other = base.model_copy(update={section: part.model_copy(update={field: "something else"})})
            free = f"{section}.{field}" in manifest.FREE_TO_CHANGE
            assert set(manifest.changed_fields(other, base)) == (set() if free else {f"{section}.{field}"}), field

    def test_a_format_that_was_settled(self):
        assert changed(data={"format": "auto"}) == set()
        assert changed(data={"format": "messages"}) == {"data.format"}


@pytest.fixture
def finished(recipe_file, train, tmp_path):
    path = recipe_file(training={"max_steps": 3, "eval_steps": 1}, data={"eval": "eval.jsonl"})
    return train(path), tmp_path / "run"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_manifest_is_true(finished, make_model, tmp_path, model_folder):
    facts, run = finished
    assert json.loads((run / "manifest.json").read_text()) == facts
    assert facts["recipe_sha256"] == sha256(run / "recipe.yaml")
    assert facts["adapter_sha256"] == sha256(run / "adapter_model.safetensors")
    known = fingerprint(open_base(ModelSection(name=str(model_folder))))
    assert facts["base_model"] == {"name": str(model_folder), "revision": None, "type": "llama", "fingerprint": known}
    assert (facts["method"], facts["seed"], facts["device"], facts["adapted_modules"]) == ("lora", 42, "cpu", 14)
    base = sum(parameter.numel() for parameter in make_model(tie_word_embeddings=True).parameters())
    # Per layer: q and o 48 x 48, k and v 48 x 24, gate, up and down 48 x 80; r (I + O) of each.
    trained = 2 * 4 * (2 * 96 + 2 * 72 + 3 * 128)
    assert facts["parameters"] == {
        "trainable_params": trained,
        "head_params": 0,
        "router_params": 0,
        "base_params": base,
        "total_params": base + trained,
        "trainable_percent": pytest.approx(100 * trained / (base + trained)),
    }
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_loss" in line]
    best = min(evaluations, key=lambda line: line["eval_loss"])
    result = facts["result"]
    assert (result["steps"], result["best_step"]) == (3, best["step"])
    assert (result["best_eval_loss"], result["eval"]["eval_loss"]) == (best["eval_loss"], evaluations[-1]["eval_loss"])
    assert result["train"]["loss"] == [line for line in lines if "loss" in line][-1]["loss"]
    assert 0 < result["seconds"] < 100
    template = (run / "chat_template.jinja").read_text()
    assert facts["data"]["chat_template_sha256"] == hashlib.sha256(template.encode()).hexdigest()
    assert facts["data"]["format"] == "prompt-completion"
    assert (facts["data"]["train"]["samples"], facts["data"]["eval"]["samples"]) == (32, 8)
    assert facts["environment"]["torch"] == version("torch")
    assert {*manifest.PACKAGES, "peftcli", "python", "platform"} == set(facts["environment"])


def test_hashes_tell_data_apart(finished, recipe_file, train, rows, tmp_path):
    facts, _ = finished
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[1:33]))
    other = train(tmp_path / "recipe.yaml", "output_dir=other")
    assert other["data"]["train"]["samples"] == facts["data"]["train"]["samples"]
    assert other["data"]["train"]["sha256"] != facts["data"]["train"]["sha256"]
    assert other["data"]["eval"] == facts["data"]["eval"]
    assert other["data"]["chat_template_sha256"] == facts["data"]["chat_template_sha256"]


def test_no_secret_is_written(recipe_file, train, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "hf_canary0123456789")
    train(recipe_file(training={"max_steps": 1}, logging={"report_to": ["tensorboard"]}))
    for file in (tmp_path / "run").rglob("*"):
        assert file.is_dir() or b"canary0123456789" not in file.read_bytes(), file


def test_a_package_that_is_missing_is_said_to_be(monkeypatch):
    monkeypatch.setattr(manifest, "PACKAGES", ("torch", "no-such-package"))
    assert manifest.environment()["no-such-package"] == "not installed"


def test_the_model_card(finished, model_folder):
    facts, run = finished
    card = (run / "README.md").read_text()
    head, front, _ = card.split("---\n", 2)
    assert head == ""
    assert f"base_model: {model_folder}\nlibrary_name: peft\n" in front
    assert f"| Evaluation loss | {facts['result']['eval']['eval_loss']:.4f} |" in card
    assert f"| Training loss | {facts['result']['train']['loss']:.4f} |" in card
    assert f"| Optimizer steps | 3 over {facts['result']['supervised_tokens']:,} supervised tokens |" in card
    assert (run / "recipe.yaml").read_text().rstrip() in card


def test_a_card_of_a_run_without_evaluation(recipe_file, train, tmp_path):
    facts = train(recipe_file(data={"eval": None}, training={"max_steps": 1, "logging_steps": 50}))
    assert (facts["result"]["eval"], facts["data"]["eval"], facts["result"]["best_step"]) == ({}, None, 0)
    assert math.isfinite(facts["result"]["train"]["loss"])  # the last step is logged whatever logging_steps is
    assert "| Evaluation loss | not evaluated |" in (tmp_path / "run" / "README.md").read_text()


# PEFT asks transformers for a property by its old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_cards_code_loads_the_adapter(finished, monkeypatch):
    """What the card tells people to do is done here, word for word."""
    _, run = finished
    code = (run / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope = {}
    monkeypatch.chdir(run.parent)
    exec(code.replace("path/to/this/folder", str(run)), scope)
    assert scope["model"].peft_config["default"].r == 4


def test_what_a_run_writes_is_what_replacing_it_removes(recipe_file, train, tmp_path):
    path = recipe_file(training={"max_steps": 2, "save_steps": 1}, logging={"report_to": ["tensorboard"]})
    train(path)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    before = {entry.name for entry in (tmp_path / "run").iterdir()}
    owned = {entry.name for pattern in manifest.RUN_FILES for entry in (tmp_path / "run").glob(pattern)}
    assert before - owned == {"notes.txt", ".lock"}
    train(path, "training.max_steps=1", overwrite=True)
    assert {entry.name for entry in (tmp_path / "run").iterdir()} == before - {"checkpoint-2"}
