"""Every task but the causal language model's from its recipe to a merged model."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from peftcli.errors import DataError, ModelError
from peftcli.run.opening import open_base
from tests.conftest import WORDS, Recorder, write_jsonl
from tests.families import save_family


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {name: save_family(name, folder / name) for name in ("bert", "roberta", "llama", "t5", "vit")}


def sentence(i):
    words = WORDS.split()
    return " ".join(words[(3 * i + 5 * j) % 25] for j in range(3 + i % 4))


def has_cat(i):
    return "cat" in sentence(i).split()


ROWS = {
    "single": lambda i: {"text": sentence(i), "label": ["no", "yes"][has_cat(i)]},
    "pairs": lambda i: {"text": sentence(i), "text_pair": sentence(i + 1), "label": int(has_cat(i))},
    "several": lambda i: {
        "text": sentence(i),
        "label": [word for word in ("cat", "dog") if word in sentence(i).split()],
    },
    "number": lambda i: {"text": sentence(i), "label": len(sentence(i)) / 10},
    "words": lambda i: {"tokens": sentence(i).split(), "tags": [w[0] < "m" for w in sentence(i).split()]},
    "answers": lambda i: {"prompt": sentence(i), "completion": sentence(i).split()[0]},
}
CASES = {
    "bert-single": ("bert", "sequence-classification", "single", {"accuracy", "macro_f1", "samples"}),
    "llama-single": ("llama", "sequence-classification", "single", {"accuracy", "macro_f1", "samples"}),
    "bert-pairs": ("bert", "sequence-classification", "pairs", {"accuracy", "macro_f1", "samples"}),
    "roberta-several": ("roberta", "sequence-classification", "several", {"micro_f1", "macro_f1", "samples"}),
    "bert-number": ("bert", "sequence-classification", "number", {"mse", "pearson", "spearman", "samples"}),
    "bert-words": ("bert", "token-classification", "words", {"token_accuracy", "macro_f1", "tokens"}),
    "t5-answers": ("t5", "seq2seq-lm", "answers", {"perplexity", "token_accuracy", "tokens"}),
}


@pytest.fixture
def task_recipe(recipe_file, families, tmp_path):
    """Writes the recipe of one of `CASES`; returns its path."""

    def write(case, **sections):
        family, task, rows, _ = CASES[case]
        write_jsonl(tmp_path / "rows.jsonl", [ROWS[rows](i) for i in range(40)])
        data = {
            "train": "rows.jsonl",
            "eval": None,
            "eval_fraction": 0.25,
            "max_length": 32,
            **sections.pop("data", {}),
        }
        model = {"name": str(families[family]), "task": task, **sections.pop("model", {})}
        return recipe_file(model=model, data=data, **sections)

    return write


@pytest.mark.parametrize("case", CASES)
def test_from_recipe_to_merged_model(case, task_recipe, train, cli):
    path = task_recipe(case, training={"max_steps": 8, "per_device_train_batch_size": 8})
    facts = train(path)
    found = facts["result"]["eval"]
    assert found.keys() - {"eval_loss"} == {f"eval_{name}" for name in CASES[case][3]}
    assert all(math.isfinite(value) for value in found.values())
    code, stdout, _ = cli("merge", "run", "--verify", "logits", "--json")
    assert code == 0
    assert json.loads(stdout)["max_difference"] < 1e-4
    code, stdout, _ = cli("eval", "run", "--json")
    assert code == 0
    results = json.loads(stdout)
    assert results["adapter"] == pytest.approx(found, rel=1e-4)
    assert results["merged"] == pytest.approx(found, rel=1e-3)
    assert results["adapter"]["eval_loss"] < results["base"]["eval_loss"]
    code, stdout, stderr = cli("generate", "run", "the cat", "--json")
    if CASES[case][1] == "seq2seq-lm":
        assert code == 0
        assert isinstance(json.loads(stdout)[0]["adapter"], str)
    else:
        assert code == 2
        assert f"model.task: {CASES[case][1]} models write no text" in stderr


def test_images(recipe_file, families, tmp_path, train, cli):
    for label, channel in (("red", 0), ("blue", 2)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for seed in range(8):
            pixels = np.random.default_rng(seed).integers(0, 90, (12, 12, 3), dtype=np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{seed}.png")
    path = recipe_file(
        model={"name": str(families["vit"]), "task": "image-classification"},
        data={"train": "images", "eval": "images", "max_length": 1024},
        training={"max_steps": 8, "per_device_train_batch_size": 8},
    )
    found = train(path)["result"]["eval"]
    assert found["eval_accuracy"] == 1
    code, stdout, _ = cli("merge", "run", "--verify", "logits", "--json")
    assert code == 0
    assert json.loads(stdout)["max_difference"] < 1e-4
    code, stdout, _ = cli("eval", "run", "--json")
    assert code == 0
    assert json.loads(stdout)["adapter"] == pytest.approx(found, rel=1e-4)
    assert json.loads(stdout)["merged"] == pytest.approx(found, rel=1e-3)
    code, stdout, _ = cli("preview", path, "-n", "1")
    assert (code, "images/blue/0.png (12 × 12 RGB) → ⟦blue⟧" in stdout) == (0, True)


def test_what_comes_next_is_only_what_the_task_can_do(task_recipe, cli):
    for case, writes in (("bert-single", False), ("t5-answers", True)):
        code, _, stderr = cli("train", task_recipe(case, training={"max_steps": 1}), "--overwrite")
        assert code == 0
        assert ("peftcli generate" in stderr) == writes


def test_resuming_notices_changed_labels(task_recipe, train, tmp_path):
    path = task_recipe("bert-single", training={"max_steps": 4, "save_steps": 2})
    train(path)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["label"] = "yes" if row["label"] == "no" else "no"
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"data.train: it has changed"):
        train(path, resume=True)


def test_evaluation_knows_the_runs_labels(task_recipe, train, cli, tmp_path):
    train(task_recipe("bert-single", training={"max_steps": 1}))
    write_jsonl(tmp_path / "other.jsonl", [{"text": "the cat", "label": "yes"}] * 3)
    code, stdout, _ = cli("eval", "run", "--data", "other.jsonl", "--json")
    assert code == 0
    assert json.loads(stdout)["adapter"]["eval_samples"] == 3
    write_jsonl(tmp_path / "other.jsonl", [{"text": "the cat", "label": "yse"}])
    code, _, stderr = cli("eval", "run", "--data", "other.jsonl")
    assert code == 3
    assert 'other.jsonl:1: label is "yse"' in stderr


def test_a_decoder_is_told_what_padding_is(task_recipe, train):
    recorder = Recorder()
    train(task_recipe("llama-single", training={"max_steps": 1}), reporter=recorder)
    assert "texts are padded with </s>: the model names no padding token" in recorder.notes


def test_a_decoder_that_labels_cannot_do_without_padding(families, tmp_path, monkeypatch):
    from peftcli import models, recipe

    section = recipe.ModelSection(name=str(families["llama"]), task="sequence-classification")
    real = models.load_tokenizer

    def without_end(*arguments):
        tokenizer = real(*arguments)
        tokenizer.eos_token = None
        return tokenizer

    monkeypatch.setattr(models, "load_tokenizer", without_end)
    with pytest.raises(ModelError, match="needs a padding or end-of-sequence token"):
        open_base(section)


def test_a_head_in_the_models_own_order_keeps_it(task_recipe, train, tmp_path):
    from tests.families import BERT_TEMPLATE, piece_tokenizer, tiny_model

    names = {"id2label": {0: "yes", 1: "no"}, "label2id": {"yes": 0, "no": 1}}
    tiny_model("bert", "BertForSequenceClassification", **names).save_pretrained(tmp_path / "tuned")
    piece_tokenizer(BERT_TEMPLATE).save_pretrained(tmp_path / "tuned")
    train(task_recipe("bert-single", model={"name": "tuned"}, training={"max_steps": 1}))
    assert json.loads((tmp_path / "run/labels.json").read_text())["labels"] == ["yes", "no"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"format": "text"}}, "data.format: text does not suit model.task: sequence-classification"),
        ({"data": {"train_on": "all"}}, "data.train_on does nothing with model.task: sequence-classification"),
        ({"data": {"padding_free": True}}, "data.padding_free does nothing with model.task: sequence-classification"),
        (
            {"evaluation": {"generate": {"max_new_tokens": 3}}},
            "evaluation.generate.max_new_tokens does nothing with model.task: sequence-classification",
        ),
    ],
)
def test_what_does_not_suit_the_task(task_recipe, sections, message, cli):
    code, _, stderr = cli("validate", "--form-only", task_recipe("bert-single", **sections))
    assert code == 2
    assert message in stderr
