"""What can be said of a recipe before it is trained, and that no weights are needed for it."""

import pytest

from peftcli import recipe
from peftcli.errors import DataError, ModelError, RecipeError
from peftcli.run.inspecting import preview, validate
from tests.conftest import Recorder


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch):
    monkeypatch.setattr("peftcli.models.load_model", None)


def test_what_a_recipe_would_do(recipe_file):
    path = recipe_file(method={"type": "dora", "target_modules": ["q_proj", "v_proj"]})
    assert validate(recipe.load(path), Recorder()) == {
        "recipe": str(path),
        "method": "dora",
        "adapted_modules": 4,
        "format": "prompt-completion",
        "train_samples": 32,
        "eval_samples": 8,
    }
    assert validate(recipe.load(recipe_file(data={"eval": None})), Recorder())["eval_samples"] == 0


@pytest.mark.parametrize(
    ("sections", "kind", "message"),
    [
        ({"method": {"r": 0}}, RecipeError, "method.r"),
        ({"method": {"target_modules": ["q_porj"]}}, RecipeError, "no module matches"),
        ({"data": {"max_length": 5000}}, RecipeError, "data.max_length"),
        ({"data": {"train": "nowhere.jsonl"}}, DataError, "nowhere.jsonl"),
        ({"model": {"name": "./nowhere"}}, ModelError, "no such folder"),
    ],
)
def test_what_is_wrong_with_it(recipe_file, sections, kind, message):
    with pytest.raises(kind, match=message):
        validate(recipe.load(recipe_file(**sections)), Recorder())


def test_samples_as_training_sees_them(recipe_file):
    samples, lines = preview(recipe.load(recipe_file()), Recorder(), 3)
    assert lines[0].startswith("32 rows gave 32 samples")
    assert [[(part.text, part.supervised) for part in sample] for sample in samples[:2]] == [
        [("the a ?", False), (" the of </s>", True)],
        [("and to in ?", False), (" in that was </s>", True)],
    ]
    assert len(preview(recipe.load(recipe_file()), Recorder(), 500)[0]) == 32


def test_previewing_checks_the_methods_fields(recipe_file):
    with pytest.raises(RecipeError, match=r"method\.r"):
        preview(recipe.load(recipe_file(method={"r": 0})), Recorder(), 1)
