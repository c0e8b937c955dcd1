"""`extends` and command-line overrides: what wins, and where each value says it came from."""

from pathlib import Path

import pytest

from peftcli.errors import RecipeError
from peftcli.recipe import Source, load

from .conftest import GOOD, lines

MINIMAL = "model: {name: m}\ndata: {train: a}\nmethod: {type: lora}\n"


def test_extends_merges_sections_and_keeps_where_each_value_came_from(folder):
    folder.write(GOOD, "base/sft.yaml")
    loaded = folder.load("extends: base/sft.yaml\nmethod:\n  alpha: 4\ntraining:\n  seed: 1\n")
    assert loaded.recipe.method == {"type": "lora", "r": 8, "alpha": 4}
    assert loaded.recipe.training.learning_rate == 1e-4
    assert loaded.recipe.training.seed == 1
    assert loaded.recipe.output_dir == "runs/r"
    assert loaded.locate(("method", "r")) == "base/sft.yaml:7"
    assert loaded.locate(("method", "alpha")) == "r.yaml:3"
    assert loaded.where("model", "dtype") == "base/sft.yaml:1"


def test_later_bases_win_and_the_file_itself_wins_over_all(folder):
    folder.write(MINIMAL + "training: {seed: 1, max_steps: 1, logging_steps: 1}\n", "a.yaml")
    folder.write("training: {seed: 2, max_steps: 2}\n", "b.yaml")
    recipe = folder.load("extends: [a.yaml, b.yaml]\ntraining: {seed: 3}\n").recipe
    assert (recipe.training.seed, recipe.training.max_steps, recipe.training.logging_steps) == (3, 2, 1)


def test_bases_are_relative_to_the_file_that_names_them(folder):
    folder.write(MINIMAL, "x/y/root.yaml")
    folder.write("extends: y/root.yaml\n", "x/middle.yaml")
    folder.write("extends: ../x/middle.yaml\n", "z/top.yaml")
    loaded = load(folder.write("extends: z/top.yaml\ntraining: {}\n"))
    assert loaded.locate(("model", "name")) == "x/y/root.yaml:1"


def test_errors_in_a_base_name_the_base(folder):
    folder.write(MINIMAL + "training:\n  lr: 1\n  seed: x\n  seed: x\n", "base.yaml")
    found = folder.problems("extends: base.yaml\ntraining:\n  epochs: 3\n")
    assert lines(found) == [
        "base.yaml:5: training.lr: unknown key",
        'base.yaml:6: training.seed: expected a whole number, got "x"',
        "base.yaml:7: training.seed: is given twice",
        "r.yaml:3: training.epochs: unknown key",
    ] or lines(found) == [
        "base.yaml:5: training.lr: unknown key",
        "base.yaml:6: training.seed: is given twice",
        'base.yaml:6: training.seed: expected a whole number, got "x"',
        "r.yaml:3: training.epochs: unknown key",
    ]


def test_a_broken_base_is_reported_with_what_was_found_before(folder):
    folder.write("a: [\n", "base.yaml")
    found = folder.problems("extends: base.yaml\nx: 1\nx: 2\n")
    assert [problem.where for problem in found] == ["base.yaml:2", "r.yaml:3"]


def test_lists_are_replaced_whole(folder):
    folder.write(MINIMAL.replace("train: a", "train: [a, b]"), "base.yaml")
    assert folder.load("extends: base.yaml\ndata: {train: [c]}\n").recipe.data.train == (Source(path="c"),)


def test_another_method_leaves_nothing_of_the_bases_method(folder):
    folder.write(GOOD, "base.yaml")
    assert folder.load("extends: base.yaml\nmethod: {type: dora}\n").recipe.method == {"type": "dora"}
    same = folder.load("extends: base.yaml\nmethod: {type: lora, alpha: 2}\n").recipe.method
    assert same == {"type": "lora", "r": 8, "alpha": 2}


def test_null_takes_a_bases_value_back(folder):
    folder.write(MINIMAL.replace("train: a", "train: a, eval: b"), "base.yaml")
    assert folder.load("extends: base.yaml\ndata: {eval: null}\n").recipe.data.eval is None


def test_an_empty_section_takes_nothing_back(folder):
    folder.write(GOOD, "base.yaml")
    assert folder.load("extends: base.yaml\ntraining:\n  # seed: 1\n").recipe.training.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("below", "above", "field"),
    [
        ("training: {num_train_epochs: 2}", "training: {max_steps: 5}", ("training", "max_steps", 5)),
        ("training: {max_steps: 5}", "training: {num_train_epochs: 2}", ("training", "max_steps", None)),
        ("training: {warmup_ratio: 0.1}", "training: {warmup_steps: 5}", ("training", "warmup_ratio", 0.03)),
    ],
)
def test_a_later_choice_puts_aside_the_one_that_it_excludes(folder, below, above, field):
    folder.write(f"{MINIMAL}{below}\n", "base.yaml")
    section, name, value = field
    assert getattr(getattr(folder.load(f"extends: base.yaml\n{above}\n").recipe, section), name) == value
    override = above.replace(": {", ".").replace(": ", "=").rstrip("}")
    assert getattr(getattr(folder.load(f"{MINIMAL}{below}\n", override).recipe, section), name) == value


def test_circles_are_refused_and_named(folder):
    folder.write("extends: b.yaml\n", "a.yaml")
    folder.write("\nextends: [c/c.yaml]\n", "b.yaml")
    folder.write("extends: ../a.yaml\n", "c/c.yaml")
    with pytest.raises(RecipeError) as raised:
        load(Path("a.yaml"))
    (problem,) = raised.value.problems
    assert problem.where == "c/c.yaml:1"
    assert problem.message.endswith("in a circle: a.yaml -> b.yaml -> c/c.yaml -> a.yaml")


def test_a_file_that_extends_itself_is_refused(folder):
    (problem,) = folder.problems("extends: ./r.yaml\n")
    assert "r.yaml -> r.yaml" in problem.message


def test_two_files_may_share_a_base(folder):
    folder.write(MINIMAL, "root.yaml")
    folder.write("extends: root.yaml\ntraining: {seed: 1}\n", "a.yaml")
    folder.write("extends: root.yaml\ntraining: {logging_steps: 2}\n", "b.yaml")
    recipe = folder.load("extends: [a.yaml, b.yaml]\n").recipe
    assert (recipe.training.seed, recipe.training.logging_steps) == (1, 2)


def test_too_many_files_are_refused(folder):
    folder.write(MINIMAL, "root.yaml")
    (problem,) = folder.problems(f"extends: [{'root.yaml, ' * 60}]\n")
    assert problem.message == "extends: more than 50 files"


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("5", "extends: expected a path or a list of paths, got 5"),
        ("[a.yaml, {}]", "extends: expected a path or a list of paths, got a mapping"),
        ("''", 'extends: expected a path or a list of paths, got ""'),
        ("nowhere.yaml", "extends: there is no recipe nowhere.yaml"),
        ("folder", "extends: folder is a folder, not a recipe"),
        ('"a\\0b"', "extends: a\\x00b cannot be read: this is not a usable path"),
    ],
)
def test_wrong_extends(folder, extends, message):
    (folder.path / "folder").mkdir()
    folder.write(MINIMAL, "a.yaml")
    found = folder.problems(f"{MINIMAL}\nextends: {extends}\n")
    assert [f"{problem.where}: {problem.message}" for problem in found] == [f"r.yaml:5: {message}"]


def test_extends_belongs_at_the_top(folder):
    (problem,) = folder.problems(MINIMAL + "training: {extends: a.yaml}\n")
    assert problem.hint == "extends belongs at the top level"


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("method.r=4", ("method", "r"), 4),
        ("method.target_modules=[q_proj,v_proj]", ("method", "target_modules"), ["q_proj", "v_proj"]),
        ("method.target_modules=all-linear", ("method", "target_modules"), "all-linear"),
        ("method.rank_pattern={q_proj: 4}", ("method", "rank_pattern"), {"q_proj": 4}),
        ("training.learning_rate=5e-5", ("training", "learning_rate"), 5e-5),
        ("training.learning_rate=null", ("training", "learning_rate"), None),
        ("training.learning_rate=", ("training", "learning_rate"), None),
        ("training.mixed_precision=no", ("training", "mixed_precision"), "no"),
        ("training.gradient_checkpointing=true", ("training", "gradient_checkpointing"), True),
        ("data.padding_free=false", ("data", "padding_free"), False),
        ("data.train=b.jsonl", ("data", "train"), (Source(path="b.jsonl"),)),
        ("data.train=[b.jsonl, c.jsonl]", ("data", "train"), (Source(path="b.jsonl"), Source(path="c.jsonl"))),
        ("data.train={path: b, split: x}", ("data", "train"), (Source(path="b", split="x"),)),
        ("data.train=*.jsonl", ("data", "train"), (Source(path="*.jsonl"),)),
        ("data.columns.text=1", ("data", "columns"), {"text": "1"}),
        ("model.name=123", ("model", "name"), "123"),
        ("model.name=1e-4", ("model", "name"), "1e-4"),
        ("model.name='123'", ("model", "name"), "123"),
        ("model.name=./a: b", ("model", "name"), "./a: b"),
        ("model.name=a=b", ("model", "name"), "a=b"),
        ("model.revision=007", ("model", "revision"), "007"),
        ("model.revision=null", ("model", "revision"), None),
        ("--training.seed=7", ("training", "seed"), 7),
        ("evaluation.generate.max_new_tokens=5", ("evaluation", "generate", "max_new_tokens"), 5),
        ("output_dir=runs/1", ("output_dir",), "runs/1"),
    ],
)
def test_overrides(folder, override, path, value):
    loaded = folder.load(GOOD, override)
    found = loaded.recipe
    for part in path:
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert (found, type(found)) == (value, type(value))
    assert loaded.where(*path).startswith("command line: ")


def test_overrides_apply_in_order_and_change_nothing_else(folder):
    recipe = folder.load(GOOD, "method.r=2", "method.alpha=3", "method.r=4").recipe
    assert recipe.method == {"type": "lora", "r": 4, "alpha": 3}
    assert recipe.training.learning_rate == 1e-4


def test_another_method_on_the_command_line_keeps_the_fields(folder):
    assert folder.load(GOOD, "method.type=dora").recipe.method == {"type": "dora", "r": 8}


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("method.r", "this is not a setting", "key.path=value"),
        ("=4", "this is not a setting", "key.path=value"),
        ("a..b=4", "this is not a setting", "key.path=value"),
        (".".join("a" * 1000) + "=4", "this is not a setting", "key.path=value"),
        ("extends=a.yaml", "extends: only a recipe file can extend another", ""),
        ("trainin.seed=4", "trainin: unknown key", 'did you mean "training"?'),
        ("training.sed=4", "training.sed: unknown key", 'did you mean "seed"?'),
        ("training.lr=4", "training.lr: unknown key", "training.learning_rate"),
        ("method.lora_alpha=4", "method.lora_alpha: unknown key for lora", "method.alpha"),
        ("training.seed=abc", 'training.seed: expected a whole number, got "abc"', ""),
        ("training.seed=-1", "training.seed: must be at least 0, got -1", ""),
        ("training.learning_rate=.inf", "training.learning_rate: .inf is not a finite number", ""),
        ("model.name=null", "model.name: expected text, got null", ""),
        ("model.name.x=1", "model.name: expected text, got a mapping", ""),
        ("training=null", "training: expected `key: value` lines, got null", ""),
        ("method.target_modules=[a", "the `[` that opens here is not closed properly", "`]`"),
        ("method.target_modules=[!!python/name:os.system a]", "the tag tag:yaml.org,2002:python/name:os.system", ""),
        ("training.eval_steps=5", "training.eval_steps needs evaluation data", "eval_fraction"),
    ],
)
def test_wrong_overrides(folder, override, message, hint):
    (problem,) = folder.problems(GOOD, override)
    assert problem.where is not None
    assert problem.where.startswith(f"command line: {override[:20]}")
    assert problem.message.startswith(message)
    assert hint in (problem.hint or "")


def test_an_override_does_not_move_what_is_missing_to_the_command_line(folder):
    found = folder.problems("model: {dtype: auto}\nmethod: {type: lora}\n", "model.revision=x", "method.r=8")
    assert lines(found) == ["r.yaml:1: data is required", "r.yaml:1: model.name is required"] or lines(found) == [
        "r.yaml:1: model.name is required",
        "r.yaml:1: data is required",
    ]


def test_wrong_overrides_are_reported_with_the_files_problems(folder):
    found = folder.problems(GOOD + "  oops: 1\n", "x", "training.seed=-1")
    assert len(found) == 3
