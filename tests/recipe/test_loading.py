"""From a file to a checked recipe: values, and every problem at once with its place and hint."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from peftcli.errors import RecipeError
from peftcli.recipe import Source, TrainingSection, dump, load, method_names
from peftcli.recipe.shorthands import SHORTHANDS

from .conftest import GOOD, lines


def test_a_recipe_and_its_defaults(folder):
    loaded = folder.load(GOOD)
    recipe = loaded.recipe
    assert (recipe.model.name, recipe.model.dtype) == ("org/tiny-model", "auto")
    assert recipe.data.train == (Source(path="data/train.jsonl", name=None, split="train"),)
    assert recipe.method == {"type": "lora", "r": 8}
    assert recipe.training.learning_rate == 1e-4
    assert recipe.training.seed == 42
    assert recipe.output_dir == "runs/r"
    assert loaded.path == Path("r.yaml")
    assert loaded.locate(("method", "r")) == "r.yaml:7"
    assert loaded.locate(("method", "alpha")) is None
    assert loaded.where("method", "alpha") == "r.yaml:5"
    assert loaded.where("logging", "report_to") == "r.yaml:1"


def test_recipes_are_frozen(folder):
    recipe = folder.load(GOOD).recipe
    with pytest.raises(ValueError, match="frozen"):
        recipe.training.seed = 1


@pytest.mark.parametrize(
    ("train", "sources"),
    [
        ("a.jsonl", (Source(path="a.jsonl"),)),
        ("{path: org/set, name: en, split: test}", (Source(path="org/set", name="en", split="test"),)),
        ("[a.jsonl, {path: b.jsonl}]", (Source(path="a.jsonl"), Source(path="b.jsonl"))),
    ],
)
def test_the_forms_of_data(folder, train, sources):
    assert folder.load(GOOD.replace("data/train.jsonl", train)).recipe.data.train == sources


def test_a_section_with_nothing_in_it_has_its_defaults(folder):
    text = GOOD.replace("  learning_rate: 1e-4\n", "  # learning_rate: 1e-4\n") + "evaluation:\n  generate:\nlogging:\n"
    recipe = folder.load(text).recipe
    assert recipe.training.learning_rate is None
    assert recipe.evaluation.generate.max_new_tokens == 64


def test_a_whole_number_will_do_for_a_fraction(folder):
    assert folder.load(GOOD + "  weight_decay: 1\n").recipe.training.weight_decay == 1.0


def test_one_reporter_needs_no_list(folder):
    assert folder.load(GOOD + "logging: {report_to: tensorboard}\n").recipe.logging.report_to == ("tensorboard",)


def test_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    text = GOOD.replace("org/tiny-model", "~/m").replace("data/train.jsonl", "~/d.csv") + "output_dir: ~/out\n"
    recipe = folder.load(text).recipe
    assert recipe.model.name == "/home/somebody/m"
    assert recipe.data.train[0].path == "/home/somebody/d.csv"
    assert recipe.output_dir == "/home/somebody/out"


def test_every_problem_at_once_in_the_order_of_lines(folder):
    text = """\
modle: {}
model:
  revision: 123
data:
  train: [a.jsonl, {pth: b}]
  eval: []
  max_length: 1
  padding_free: 5
  columns: {text: 3}
method:
  type: lora
  rnk: 8
  detach_norm: true
training:
  num_train_epochs: 0
  per_device_train_batch_size: "8"
  max_steps: 1e3
  learning_rate: .nan
  lr_scheduler_type: cosin
  seed: true
  seed: 4
  gradient_checkpointing: yes
  weight_decay: -0.1
  save_steps: abc
"""
    assert lines(folder.problems(text)) == [
        "r.yaml:1: modle: unknown key",
        "r.yaml:2: model.name is required",
        "r.yaml:3: model.revision: expected text, got 123",
        "r.yaml:5: data.train[1].path is required",
        "r.yaml:5: data.train[1].pth: unknown key",
        "r.yaml:6: data.eval: must not be empty",
        "r.yaml:7: data.max_length: must be greater than 1, got 1",
        "r.yaml:8: data.padding_free: expected auto or true or false, got 5",
        "r.yaml:9: data.columns.text: expected text, got 3",
        "r.yaml:12: method.rnk: unknown key for lora",
        "r.yaml:13: method.detach_norm: unknown key for lora",
        "r.yaml:15: training.num_train_epochs: must be greater than 0, got 0",
        'r.yaml:16: training.per_device_train_batch_size: expected auto or a whole number, got "8"',
        "r.yaml:17: training.max_steps: expected a whole number, got 1000.0",
        "r.yaml:17: training.max_steps and training.num_train_epochs exclude each other",
        "r.yaml:18: training.learning_rate: .nan is not a finite number",
        'r.yaml:19: training.lr_scheduler_type: must be one of cosine, linear, constant, got "cosin"',
        "r.yaml:20: training.seed: expected a whole number, got true",
        "r.yaml:21: training.seed: is given twice",
        'r.yaml:22: training.gradient_checkpointing: expected true or false, got "yes"',
        "r.yaml:23: training.weight_decay: must be at least 0, got -0.1",
        'r.yaml:24: training.save_steps: expected a whole number, got "abc"',
    ]


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("  seed: 1e3", "write 1000"),
        ('  seed: "8"', "write 8, without quotes"),
        ("  seed: 1_000", "write 1000, without quotes"),
        ('  weight_decay: "1e-2"', "write 1e-2, without quotes"),
        ("  gradient_checkpointing: yes", "write true"),
        ("  gradient_checkpointing: off", "write false"),
        ("  lr_scheduler_type: cosin", 'did you mean "cosine"?'),
        ("  lr_scheduler_type: Linear", 'did you mean "linear"?'),
        ("  mixed_precision: false", "write no"),
        ("  mixed_precision: bfloat16", "write bf16"),
        ("  optim: adamw_torch", "write adamw"),
        ("  optim: adamw_bnb_8bit", "write adamw_8bit"),
        ("  optim: paged_adamw", "write paged_adamw_32bit"),
        ("  optim: lion", "write lion_8bit"),
        ("model:\n  name: a\n  dtype: bf16", "write bfloat16"),
        ("model:\n  name: 7", 'put it in quotes if it is meant as text: "7"'),
        ("data: {train: a, format: sharegpt}", "write messages"),
        ("logging: {report_to: [wandb]}", "logging.report_to takes tensorboard"),
    ],
)
def test_hints_on_values(folder, line, hint):
    section = line.split(":")[0]
    text = _without_section(GOOD, section) if section in ("model", "data") else GOOD
    (problem,) = folder.problems(f"{text.rstrip()}\n{line}\n")
    assert (problem.hint or "").startswith(hint)


def _without_section(text, section):
    kept, inside = [], False
    for row in text.splitlines():
        inside = row.startswith(f"{section}:") or (inside and row.startswith(" "))
        kept += [] if inside else [row]
    return "\n".join(kept)


@pytest.mark.parametrize("name", ["../w.gguf", "a/b.gguf", "a\\b.gguf", "..", "/etc/w.gguf"])
def test_a_gguf_file_stays_in_the_models_folder(folder, name):
    (problem,) = folder.problems(GOOD.replace("data:\n", f"  gguf_file: '{name}'\ndata:\n"))
    assert problem.where == "r.yaml:3"
    assert "without a path" in problem.message
    assert folder.load(GOOD.replace("data:\n", "  gguf_file: w..Q4.gguf\ndata:\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml: the file is empty"),
        ("data: {train: a}\nmethod: {type: lora}\n", "r.yaml:1: model is required"),
        ("model:\ndata: {train: a}\nmethod: {type: lora}\n", "r.yaml:1: model.name is required"),
        ("model: {name: a}\nmethod: {type: lora}\ndata:\n", "r.yaml:3: data.train is required"),
        ("model: {name: a}\ndata: {train: a}\nmethod:\n", "r.yaml:3: method.type is required"),
        ("model: {name: a}\ndata: {train: a}\nmethod: {r: 8}\n", "r.yaml:3: method.type is required"),
        (
            "model: {name: a}\ndata: {train: a}\nmethod: lora\n",
            'r.yaml:3: method: expected `key: value` lines, got "lora"',
        ),
        ("model: {name: a}\ndata: {train: a}\nmethod: {type: 5}\n", "r.yaml:3: method.type: expected text, got 5"),
        ("model: {name: ''}\ndata: {train: a}\nmethod: {type: lora}\n", "r.yaml:1: model.name: must not be empty"),
        (
            "model: {name: a}\ndata: {train: 5}\nmethod: {type: lora}\n",
            "expected a path, a mapping with `path`, or a list",
        ),
        (
            "model: {name: a}\ndata: {train: [5]}\nmethod: {type: lora}\n",
            "expected a path, a mapping with `path`, or a list",
        ),
        (
            "model: {name: a}\ndata: {train: {split: x}}\nmethod: {type: lora}\n",
            "r.yaml:2: data.train.path is required",
        ),
        (
            "model: [a]\ndata: {train: a}\nmethod: {type: lora}\n",
            "r.yaml:1: model: expected `key: value` lines, got a list",
        ),
    ],
)
def test_what_is_missing_or_of_another_form(folder, text, expected):
    (problem,) = folder.problems(text)
    assert expected in f"{problem.where}: {problem.message}"


def test_an_unknown_method(folder):
    (problem,) = folder.problems(GOOD.replace("lora", "lorra"))
    assert problem.where == "r.yaml:6"
    assert problem.message == 'method.type: unknown method "lorra"'
    assert problem.hint is not None
    assert problem.hint.startswith('did you mean "lora"? methods: ')
    assert all(name in problem.hint for name in (*method_names(), *SHORTHANDS))


class TestShorthands:
    """`type: qlora` is `type: lora` on a base in NF4, and nothing that comes after can tell the two apart."""

    QLORA = GOOD.replace("lora", "qlora")
    LONG = GOOD + "quantization: {type: nf4}\n"

    def test_it_is_the_long_form(self, folder):
        short, long = folder.load(self.QLORA), folder.load(self.LONG)
        assert short.recipe == long.recipe
        assert short.recipe.quantization is not None
        assert (short.recipe.method["type"], short.recipe.quantization.type) == ("lora", "nf4")
        assert short.where("quantization", "type") == short.where("method", "type") == "r.yaml:6"
        assert "qlora" not in dump(short.recipe)

    def test_what_else_the_section_says_stands(self, folder):
        loaded = folder.load(self.QLORA + "quantization:\n  double_quant: false\n")
        assert loaded.recipe.quantization is not None
        assert (loaded.recipe.quantization.type, loaded.recipe.quantization.double_quant) == ("nf4", False)
        assert loaded.where("quantization", "double_quant") == "r.yaml:11"

    @pytest.mark.parametrize(
        ("section", "key", "said"),
        [
            ("quantization: {type: fp4}\n", "quantization.type", '"fp4"'),
            ("quantization: null\n", "quantization", "null"),
        ],
    )
    def test_a_section_that_says_otherwise(self, folder, section, key, said):
        (problem,) = folder.problems(self.QLORA + section)
        assert str(problem.where) == "r.yaml:10"
        assert problem.message == f"{key}: {said} does not go with method.type: qlora at r.yaml:6"

    def test_a_section_of_another_form(self, folder):
        (problem,) = folder.problems(self.QLORA + "quantization: nf4\n")
        assert problem.message.startswith("quantization: expected `key: value` lines")

    def test_on_the_command_line(self, folder):
        found = folder.load(GOOD, "method.type=qlora").recipe
        assert (found.method["type"], found.method["r"], found.quantization is not None) == ("lora", 8, True)


def test_a_field_of_another_method_names_that_method(folder):
    (problem,) = folder.problems(GOOD.replace("r: 8", "detach_norm: true"))
    assert problem.hint == "only dora and dvora have it"
    assert folder.load(GOOD.replace("r: 8", "detach_norm: true").replace("lora", "dora"))


def test_method_names_are_those_of_the_package():
    from peftcli import methods

    assert method_names() == methods.names()
    assert {"lora", "dora"} <= set(method_names())


_BETAS = {"adam_beta1": 0.8, "adam_beta2": 0.99}
NOT_READ = {
    "sgd": {**_BETAS, "adam_epsilon": 1e-6},
    "adafactor": {**_BETAS, "adam_epsilon": 1e-6},
    "lion_8bit": {"adam_epsilon": 1e-6},
}


@pytest.mark.parametrize(
    ("add", "message", "where"),
    [
        ("  max_steps: 5\n  num_train_epochs: 2\n", "training.max_steps and training.num_train_epochs", 10),
        ("  warmup_steps: 5\n  warmup_ratio: 0.1\n", "training.warmup_steps and training.warmup_ratio", 10),
        ("  load_best_at_end: true\n", "training.load_best_at_end needs evaluation data", 10),
        ("  early_stopping_patience: 2\n", "training.early_stopping_patience needs evaluation data", 10),
        ("  eval_steps: 2\n", "training.eval_steps needs evaluation data", 10),
        *(
            (
                f"  optim: {optim}\n  {field}: {value}\n",
                f"training.{field} does nothing with training.optim: {optim}",
                11,
            )
            for optim, fields in NOT_READ.items()
            for field, value in fields.items()
        ),
        *(
            (
                f"quantization:\n  type: int8\n  {key}: {value}\n",
                f"quantization.{key} does nothing without quantization.type: nf4 or fp4",
                12,
            )
            for key, value in (("double_quant", "false"), ("compute_dtype", "float32"), ("storage_dtype", "float32"))
        ),
        (
            "quantization:\n  outlier_threshold: 5.0\n",
            "quantization.outlier_threshold does nothing without quantization.type: int8",
            11,
        ),
        (
            "evaluation:\n  generate:\n    top_p: 0.9\n",
            "evaluation.generate.top_p does nothing without evaluation.generate.do_sample: true",
            12,
        ),
        (
            "distributed:\n  deepspeed_config: ds.json\n",
            "distributed.deepspeed_config does nothing without distributed.strategy: deepspeed",
            11,
        ),
        (
            "distributed:\n  strategy: deepspeed\n",
            "distributed.strategy: deepspeed needs distributed.deepspeed_config",
            11,
        ),
    ],
)
def test_rules_between_fields(folder, add, message, where):
    (problem,) = folder.problems(GOOD + add)
    assert problem.message.startswith(message)
    assert problem.where == f"r.yaml:{where}"
    assert problem.hint


def test_eval_and_eval_fraction_exclude_each_other(folder):
    (problem,) = folder.problems(GOOD.replace("method:", "  eval: b\n  eval_fraction: 0.1\nmethod:"))
    assert problem.message == "data.eval and data.eval_fraction exclude each other"
    assert (problem.where, "r.yaml:6" in problem.hint) == ("r.yaml:5", True)


@pytest.mark.parametrize("evaluation", ["eval: b.jsonl", "eval_fraction: 0.1"])
def test_rules_that_are_kept(folder, evaluation):
    text = GOOD.replace("method:", f"  {evaluation}\nmethod:")
    text += (
        "  load_best_at_end: true\n  early_stopping_patience: 2\n  max_steps: 3\n  warmup_steps: 0\n  eval_steps: 1\n"
    )
    text += (
        "  optim: sgd\n  adam_beta1: 0.9\n  adam_beta2: 0.999\nevaluation: {generate: {do_sample: true, top_p: 0.9}}\n"
    )
    assert folder.load(text).recipe.training.max_steps == 3


OPTIMIZERS = get_args(TrainingSection.model_fields["optim"].annotation)


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_what_an_optimizer_reads_may_be_set(folder, optim):
    fields = {**_BETAS, "adam_epsilon": 1e-6, "weight_decay": 0.1, "max_grad_norm": 0.5}
    for field in NOT_READ.get(optim, {}):
        fields.pop(field)
    text = GOOD + f"  optim: {optim}\n" + "".join(f"  {field}: {value}\n" for field, value in fields.items())
    training = folder.load(text).recipe.training
    assert {field: getattr(training, field) for field in fields} == fields


def test_an_optimizer_that_is_none_is_one_problem(folder):
    (problem,) = folder.problems(GOOD + "  optim: lyon_8bit\n  adam_epsilon: 1.0e-6\n  adam_beta1: 0.8\n")
    assert (problem.where, problem.hint) == ("r.yaml:10", 'did you mean "lion_8bit"?')


@pytest.mark.parametrize(
    ("optim", "beta2"), [*((optim, 0.99 if optim == "lion_8bit" else 0.999) for optim in OPTIMIZERS), (None, 0.999)]
)
def test_beta2_left_out_is_the_optimizers_own(folder, optim, beta2):
    text = GOOD + (f"  optim: {optim}\n" if optim else "")
    loaded = folder.load(text).recipe
    assert (loaded.training.adam_beta1, loaded.training.adam_beta2) == (0.9, beta2)
    written = folder.load(dump(loaded)).recipe.training
    assert written.adam_beta2 == beta2
    if beta2 == 0.99:
        assert folder.load(text + "  adam_beta2: 0.999\n").recipe.training.adam_beta2 == 0.999


def test_rules_are_checked_even_where_values_are_wrong(folder):
    found = folder.problems(GOOD + "  max_steps: -1\n  num_train_epochs: x\n  load_best_at_end: true\n  oops: 1\n")
    assert len(found) == 5


def test_a_thousand_problems_are_cut_short_and_quick(folder):
    found = folder.problems(GOOD + "".join(f"  k{i}: 1\n" for i in range(20_000)))
    assert len(found) == 100 + 1
    assert "more" in found[-1].message


def test_no_control_characters_in_messages(folder):
    found = folder.problems(GOOD + '  "\\e[31m\\n": 1\n  seed: "\\e[2J"\n')
    assert len(found) == 2
    assert all(problem.message.isprintable() for problem in found)


@pytest.mark.parametrize("name", ["goood.yaml", "good", "good.yml"])
def test_a_missing_file_names_the_one_that_was_meant(folder, name):
    folder.write(GOOD, "recipes/good.yaml")
    folder.write(GOOD, "recipes/other.yaml")
    with pytest.raises(RecipeError) as raised:
        load(Path("recipes", name))
    assert str(raised.value) == f"there is no recipe recipes/{name}\n  hint: did you mean recipes/good.yaml?"
    with pytest.raises(RecipeError) as raised:
        load(Path(name))
    assert raised.value.problems[0].hint == "did you mean recipes/good.yaml?"


def test_a_missing_file_lists_what_is_there(folder):
    for index in range(7):
        folder.write(GOOD, f"r{index}.yaml")
    with pytest.raises(RecipeError) as raised:
        load(Path("something-else"))
    assert raised.value.problems[0].hint == "recipes here: r0.yaml, r1.yaml, r2.yaml, r3.yaml, r4.yaml and 2 more"


def test_files_that_cannot_be_read(folder):
    folder.write(GOOD, "runs/a/recipe.yaml")
    with pytest.raises(RecipeError, match="is a folder, not a recipe") as raised:
        load(Path("runs/a"))
    assert raised.value.problems[0].hint == "did you mean runs/a/recipe.yaml?"
    with pytest.raises(RecipeError, match="not a directory"):
        load(Path("runs/a/recipe.yaml/x"))
    with pytest.raises(RecipeError, match="cannot be read"):
        load(Path("a\0b"))
    with pytest.raises(RecipeError, match="cannot be read: file name too long"):
        load(Path("a" * 5000))
    Path("circle.yaml").symlink_to("circle.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load(Path("circle.yaml"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(folder):
    (folder.path / folder.write(GOOD)).chmod(0)
    with pytest.raises(RecipeError, match="permission denied"):
        load(Path("r.yaml"))


def test_importing_and_loading_bring_no_torch(folder):
    folder.write(GOOD)
    code = (
        "import json, sys, pathlib, peftcli.recipe as r; r.dump(r.load(pathlib.Path('r.yaml')).recipe);"
        "r.json_schema(); print(json.dumps([m.split('.')[0] for m in sys.modules]))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert not {"torch", "transformers", "numpy", "datasets", "typer", "rich"} & set(json.loads(done.stdout))
