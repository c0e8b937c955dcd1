"""What goes where: data to stdout, all else to stderr; `--json` is JSON and nothing but."""

import json
import re

import pytest
from rich.console import Console

import peftcli
from peftcli.cli import console
from peftcli.recipe import Recipe, method_names
from peftcli.recipe.shorthands import SHORTHANDS

LONGEST_LINE = 100


@pytest.fixture
def run(cli, recipe_file):
    recipe_file(training={"max_steps": 2, "learning_rate": 0.1}, evaluation={"generate": {"max_new_tokens": 4}})
    code, stdout, stderr = cli("train", "recipe.yaml")
    assert code == 0, stderr
    return stdout, stderr


class TestTraining:
    def test_people_read_stderr(self, run):
        stdout, stderr = run
        assert stdout == ""
        assert "⟦" in stderr  # the first sample, with what is learned marked
        assert re.search(r"step 1/2  loss \d+\.\d{4}  lr \S+  grad \S+  \S+ tokens/s  \S+ GB  0:00 left\n", stderr)
        assert re.search(r"step 2/2  eval loss \d+\.\d{4}  perplexity \S+  token accuracy \S+ %\n", stderr)
        assert re.search(r"done: 2 steps in \d+ s, evaluation loss \d+\.\d{4}; adapter in run\n", stderr)
        assert "next: peftcli eval run · peftcli merge run · peftcli generate run PROMPT\n" in stderr

    def test_programs_read_the_manifest(self, cli, recipe_file, tmp_path):
        recipe_file(training={"max_steps": 1})
        code, stdout, _ = cli("train", "recipe.yaml", "output_dir=other", "--json")
        assert code == 0
        assert json.loads(stdout) == json.loads((tmp_path / "other" / "manifest.json").read_text())

    def test_overrides_are_applied(self, cli, recipe_file):
        recipe_file(training={"max_steps": 1})
        _, stdout, _ = cli("train", "recipe.yaml", "method.r=2", "data.eval=null", "training.seed=5", "--json")
        facts = json.loads(stdout)
        assert (facts["seed"], facts["data"]["eval"], facts["parameters"]["trainable_params"]) == (5, None, 2880)


class TestApplying:
    def test_eval(self, cli, run):
        code, stdout, stderr = cli("eval", "run", "--json")
        found = json.loads(stdout)
        assert (code, set(found)) == (0, {"base", "adapter"})
        assert "loading the base model" in stderr
        code, table, _ = cli("eval", "run")
        assert code == 0
        title, header, base, adapter = (line.rstrip() for line in table.splitlines())
        assert title == "49 supervised tokens"
        assert header.split() == ["model", "loss", "perplexity", "token", "accuracy", "change", "in", "loss"]
        first, second = (found[name]["eval_loss"] for name in ("base", "adapter"))
        assert base.split()[:2] == ["base", f"{first:.4f}"]
        assert adapter.split()[:2] == ["adapter", f"{second:.4f}"]
        assert adapter.endswith(f"{100 * (second / first - 1):+.1f} %")

    def test_eval_options(self, cli, run, tmp_path):
        (tmp_path / "one.jsonl").write_text('{"prompt": "the cat ? ", "completion": "a b"}\n')
        _, stdout, _ = cli("eval", "run", "--data", "one.jsonl", "--batch-size", "1", "--device", "cpu", "--json")
        assert json.loads(stdout)["adapter"]["eval_tokens"] == 3

    def test_merge(self, cli, run, tmp_path):
        code, stdout, stderr = cli("merge", "run", "-o", "there", "--json")
        report = json.loads(stdout)
        assert (code, report["folder"], report["merged_weights"], report["layers"]) == (0, "there", 14, 14)
        assert "same_choice" not in report
        assert "merging the weights" in stderr
        code, stdout, _ = cli("merge", "run", "--dtype", "bfloat16", "--verify", "logits")
        assert code == 0
        said = stdout.splitlines()
        assert said[0] == "merged 14 weights into run/merged"
        assert said[1].startswith("verified 14 layers: largest difference ")
        assert said[2].startswith("verified on 45 positions: ")
        assert json.loads((tmp_path / "run" / "merged" / "config.json").read_text())["dtype"] == "bfloat16"

    def test_generate(self, cli, run, tmp_path):
        (tmp_path / "prompts.txt").write_text("the dog ?\n\nthe\\ncat ?\n")
        arguments = ("generate", "run", "the cat ?", "--prompt-file", "prompts.txt", "--base")
        code, stdout, stderr = cli(*arguments, "--json")
        answers = json.loads(stdout)
        assert code == 0
        assert [answer["prompt"] for answer in answers] == ["the cat ?", "the dog ?", "the\ncat ?"]
        assert all(set(answer) == {"prompt", "base", "adapter"} for answer in answers)
        assert "loading the base model" in stderr
        code, stdout, _ = cli(*arguments)
        assert code == 0
        assert f"prompt   the cat ?\nbase     {answers[0]['base'] or '(nothing)'}\n" in stdout
        assert "prompt   the\n         cat ?\n" in stdout

    def test_an_adapters_prompt_needs_no_run(self, cli, run):
        code, stdout, _ = cli("generate", "--adapter", "run", "the cat ?", "--max-new-tokens", "2", "--json")
        assert code == 0
        (answer,) = json.loads(stdout)
        assert (answer["prompt"], set(answer)) == ("the cat ?", {"prompt", "adapter"})
        assert len(answer["adapter"].split()) <= 2


class TestInspecting:
    def test_validate(self, cli, recipe_file):
        recipe_file()
        code, stdout, _ = cli("validate", "recipe.yaml", "--json")
        assert (code, json.loads(stdout)["adapted_modules"]) == (0, 14)
        code, stdout, _ = cli("validate", "recipe.yaml")
        assert stdout == (
            "recipe.yaml is valid: method lora, adapted modules 14, format prompt-completion, train samples 32, "
            "eval samples 8\n"
        )
        assert cli("validate", "--form-only", "recipe.yaml") == (0, "recipe.yaml is valid: method lora\n", "")

    def test_the_form_alone_needs_no_model_and_no_data(self, cli, recipe_file):
        recipe_file(model={"name": "./nowhere"}, data={"train": "nowhere.jsonl", "eval": None})
        assert cli("validate", "--form-only", "recipe.yaml")[0] == 0
        assert cli("validate", "recipe.yaml")[0] == 3

    def test_preview(self, cli, recipe_file):
        recipe_file()
        code, stdout, _ = cli("preview", "recipe.yaml", "-n", "2", "--json")
        found = json.loads(stdout)
        assert (code, len(found["samples"])) == (0, 2)
        assert found["samples"][0] == [
            {"text": "the a ?", "supervised": False},
            {"text": " the of </s>", "supervised": True},
        ]
        code, stdout, _ = cli("preview", "recipe.yaml", "-n", "2")
        assert "sample 2 (trained on: ⟦…⟧)\nand to in ?⟦ in that was </s>⟧\n" in stdout
        assert stdout.startswith("32 rows gave 32 samples of 330 tokens")


class TestReference:
    def test_methods(self, cli):
        code, stdout, stderr = cli("methods", "--json")
        assert (code, stderr, list(json.loads(stdout))) == (0, "", sorted((*method_names(), *SHORTHANDS)))
        _, table, _ = cli("methods")
        assert all(f"\n{name} " in table for name in method_names())
        assert all(len(line) <= LONGEST_LINE for line in json.loads(stdout).values())

    @pytest.mark.parametrize("name", method_names())
    def test_a_method(self, cli, name):
        from peftcli import methods

        code, stdout, _ = cli("methods", name, "--json")
        found = json.loads(stdout)
        assert (code, found["method"]) == (0, name)
        assert set(found["fields"]) == set(methods.load(name).Config.model_fields)
        _, text, _ = cli("methods", name)
        assert text.startswith(found["description"].splitlines()[0])
        assert all(f"\n{field} " in text for field in found["fields"] if field != "type")
        method = methods.load(name)
        assert found["default_learning_rate"] == method.default_learning_rate
        assert re.search(rf"\nlearning rate +{method.default_learning_rate:g} *\n", text)
        assert (found["merge"] is True) == (method.unmergeable(method.Config()) is None)
        assert (found["lora_export"] is True) == (method.not_low_rank(method.Config()) is None)
        assert found["papers"] or name == "head"

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("dora", r"r +16 +integer ≥ 1 +Rank"),
            ("dora", r"dropout +0\.0 +number ≥ 0, < 1 "),
            ("dora", r"dropout_mode +branch +branch \| paper "),
            ("dora", r"detach_norm +true +true \| false "),
            ("dora", r"layers +\[integer, …\] "),
            ("dora", r"adapts +modules of kind linear, conv1d, embedding; target_modules: all-linear"),
            ("dora", r"merges +yes"),
            ("dora", r"exports to LoRA +no: .*; --rank N writes the nearest"),
            ("dora", r"peft_type of its files +LORA, which PEFT reads and writes too"),
            ("dora", r"papers +https://arxiv\.org/abs/2402\.09353"),
            ("hydralora", r"num_heads +3 +integer ≥ 1 \| auto "),
            ("hydralora", r"exports to LoRA +no: .*; --lossy writes its mean"),
            ("prompt", r"adapts +the input embedding"),
            ("prompt", r"tasks +causal-lm, seq2seq-lm, sequence-classification, token-classification *\n"),
            ("bitfit", r"peft_type of its files +BITFIT, which PEFT does not have"),
            ("lora", r"exports to LoRA +yes"),
        ],
    )
    def test_what_is_said_of_a_method(self, cli, name, said, monkeypatch):
        monkeypatch.setattr(console, "stdout", Console(highlight=False, soft_wrap=True, emoji=False, width=200))
        assert re.search(rf"\n{said}", cli("methods", name)[1])

    def test_recipes(self, cli, tmp_path, monkeypatch):
        code, stdout, _ = cli("recipes", "--json")
        titles = json.loads(stdout)
        assert code == 0
        assert {"quickstart", "papers/glue_roberta_lora"} <= titles.keys()
        _, table, stderr = cli("recipes")
        assert all(f"{name} " in table for name in titles)
        assert "peftcli recipes NAME prints one" in stderr
        monkeypatch.chdir(tmp_path)
        for name in titles:
            _, text, stderr = cli("recipes", name)
            assert stderr == ""
            (tmp_path / f"{name}.yaml").parent.mkdir(exist_ok=True)
            (tmp_path / f"{name}.yaml").write_text(text)
            assert cli("validate", "--form-only", f"{name}.yaml")[0] == 0

    def test_schema(self, cli):
        for arguments in (("schema",), ("schema", "--json")):
            code, stdout, stderr = cli(*arguments)
            assert (code, stderr) == (0, "")
            assert set(json.loads(stdout)["properties"]) == {*Recipe.model_fields, "extends"}

    def test_env(self, cli):
        code, stdout, stderr = cli("env", "--json")
        assert (code, stderr, json.loads(stdout)["peftcli"]) == (0, "", peftcli.__version__)
        _, stdout, _ = cli("env")
        assert re.search(rf"peftcli +{re.escape(peftcli.__version__)}", stdout)

    def test_version(self, cli):
        assert cli("--version") == (0, f"peftcli {peftcli.__version__}\n", "")
