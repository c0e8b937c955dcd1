"""Recipes back to YAML, and with absolute paths."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peftcli.recipe import (
    DataSection,
    EvaluationSection,
    GenerateSection,
    LoggingSection,
    ModelSection,
    Recipe,
    Source,
    TrainingSection,
    document,
    dump,
    load,
    resolve_paths,
)

from .conftest import GOOD

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
TRICKY = st.sampled_from(
    ["1e-4", "no", "null", "0x1F", "0123", "1_0", "12:30", "2026-01-01", "<<", "=", "~", "- a", "a: b"]
)
NAMES = TEXT | TRICKY
PATHS = (st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60) | TRICKY).filter(
    lambda path: not path.startswith("~")
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False, min_value=0, exclude_min=True)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | NUMBERS | NAMES
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))
SOURCES = st.lists(
    st.builds(Source, path=PATHS, name=st.none() | NAMES, split=NAMES),
    min_size=1,
    max_size=3,
).map(tuple)


@st.composite
def recipes(draw):
    evaluation = draw(st.sampled_from(["none", "eval", "fraction"]))
    with_eval = evaluation != "none"
    steps = draw(st.none() | st.integers(1, 2**40))
    warmup = draw(st.none() | st.integers(0, 2**40))
    training = {
        **({"max_steps": steps} if steps else {"num_train_epochs": draw(NUMBERS)}),
        **({"warmup_ratio": draw(st.floats(0, 0.99))} if warmup is None else {"warmup_steps": warmup}),
    }
    return Recipe(
        model=ModelSection(
            name=draw(PATHS),
            revision=draw(st.none() | NAMES),
            dtype=draw(st.sampled_from(["auto", "bfloat16"])),
        ),
        data=DataSection(
            train=draw(SOURCES),
            eval=draw(SOURCES) if evaluation == "eval" else None,
            eval_fraction=draw(st.floats(0.01, 0.99)) if evaluation == "fraction" else None,
            columns=draw(st.dictionaries(NAMES, NAMES, max_size=3)),
            padding_free=draw(st.sampled_from(["auto", True, False])),
        ),
        method={"type": "not-known-to-the-schema", **draw(st.dictionaries(NAMES, VALUES, max_size=3))},
        training=TrainingSection(
            **training,
            learning_rate=draw(st.none() | NUMBERS),
            load_best_at_end=with_eval,
            mixed_precision=draw(st.sampled_from(["auto", "no"])),
        ),
        evaluation=EvaluationSection(generate=GenerateSection(do_sample=True, top_p=draw(st.floats(0.01, 1)))),
        logging=LoggingSection(report_to=draw(st.sampled_from([(), ("tensorboard",)]))),
        output_dir=draw(PATHS),
    )


@pytest.fixture
def any_method(monkeypatch):
    """Lets a recipe have a method whose fields the schema does not know, so that they can be anything."""
    monkeypatch.setattr("peftcli.recipe.loading.method_names", lambda: ("not-known-to-the-schema",))


@pytest.mark.parametrize("loader", ["SafeLoader", "CSafeLoader"])
def test_what_is_written_is_read_back(tmp_path, any_method, monkeypatch, loader):
    monkeypatch.setattr(document, "_LOADER", getattr(yaml, loader, yaml.SafeLoader))
    file = tmp_path / "r.yaml"

    @settings(max_examples=50, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
    @given(recipes())
    def check(recipe):
        file.write_text(dump(recipe), encoding="utf-8", newline="")
        assert load(file).recipe == recipe

    check()


def test_every_value_is_written_in_the_order_of_the_schema(folder):
    recipe = folder.load(GOOD + "  max_steps: 5\n").recipe
    values = yaml.safe_load(dump(recipe))
    assert list(values) == list(Recipe.model_fields)
    assert set(TrainingSection.model_fields) - set(values["training"]) == {"num_train_epochs"}
    assert list(values["method"]) == ["type", "r"]
    assert values["data"]["train"] == [{"path": "data/train.jsonl", "name": None, "split": "train"}]
    assert dump(recipe) == dump(load(folder.write(dump(recipe))).recipe)


def test_small_numbers_stay_numbers(folder):
    recipe = folder.load(GOOD, "training.learning_rate=2e-5").recipe
    assert "learning_rate: 2.0e-05\n" in dump(recipe)
    assert load(folder.write(dump(recipe))).recipe.training.learning_rate == 2e-5


def test_an_extended_recipe_is_written_whole(folder):
    folder.write(GOOD, "base.yaml")
    recipe = folder.load("extends: base.yaml\n").recipe
    assert "extends" not in dump(recipe)
    assert load(folder.write(dump(recipe), "copy.yaml")).recipe == recipe


def test_paths_become_absolute(folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    (folder.path / "model").mkdir()
    folder.write("{}", "data/train.jsonl")
    text = GOOD.replace("org/tiny-model", "model")
    text = text.replace("method:", "  eval: [org/set, ./nowhere.csv, ~/d.csv]\nmethod:")
    text += "distributed: {strategy: deepspeed, deepspeed_config: ds.json}\n"
    recipe = resolve_paths(folder.load(text).recipe)
    here = Path.cwd()
    assert recipe.model.name == str(here / "model")
    assert recipe.data.train[0].path == str(here / "data/train.jsonl")
    assert recipe.data.eval is not None
    assert [source.path for source in recipe.data.eval] == [
        "org/set",
        str(here / "nowhere.csv"),
        "/home/somebody/d.csv",
    ]
    assert recipe.output_dir == str(here / "runs/r")
    assert recipe.distributed.deepspeed_config == str(here / "ds.json")
    assert resolve_paths(recipe) == recipe


@pytest.mark.parametrize("name", ["org/model", "a" * 255, "~nobody-of-this-name/x"])
def test_what_is_no_path_stays(folder, name):
    recipe = folder.load(GOOD.replace("org/tiny-model", name)).recipe
    assert resolve_paths(recipe).model.name == name
