"""The shipped JSON schema: valid, current, and of one mind with `load`."""

import importlib.util
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from peftcli.errors import RecipeError
from peftcli.recipe import Recipe, json_schema, method_names
from peftcli.recipe.document import parse
from peftcli.recipe.shipped import SCHEMA_FILE

from .conftest import GOOD

WRONG = [
    GOOD + "oops: 1\n",
    GOOD + "  oops: 1\n",
    GOOD.replace("r: 8", "oops: 8"),
    GOOD.replace("r: 8", "detach_norm: true"),
    GOOD.replace("lora", "lorra"),
    GOOD + "quantization: {type: int3}\n",
    GOOD + "quantization: {type: int8, outlier_threshold: -1.0}\n",
    GOOD + "quantization: {skip_modules: 3}\n",
    GOOD.replace("  type: lora\n", ""),
    GOOD.replace("  name: org/tiny-model\n", "  dtype: auto\n"),
    GOOD.replace("  train: data/train.jsonl\n", "  max_length: 5\n"),
    GOOD.replace("data/train.jsonl", "[]"),
    GOOD.replace("data/train.jsonl", "[{split: a}]"),
    GOOD + "  seed: -1\n",
    GOOD + "  seed: x\n",
    GOOD + "  optim: lion\n",
    GOOD + "logging: {report_to: [wandb]}\n",
]
RIGHT = [
    GOOD,
    GOOD.replace("lora", "dora").replace("r: 8", "detach_norm: false"),
    GOOD.replace("data/train.jsonl", "{path: a, split: b}"),
    GOOD.replace("data/train.jsonl", "[a, {path: b}]"),
    GOOD + "logging: {report_to: tensorboard}\n",
    GOOD + "  max_grad_norm: null\n",
    GOOD.replace("lora", "qlora"),
    GOOD + "quantization: {type: fp4, double_quant: false}\n",
    GOOD + "quantization: null\n",
    GOOD + "quantization: {type: int8, outlier_threshold: 0}\n",
    GOOD + "quantization: {storage_dtype: bfloat16, skip_modules: [a.b, c]}\n",
    GOOD + "quantization: {skip_modules: '.*gate'}\n",
]


@pytest.fixture(scope="module")
def validator():
    return Draft202012Validator(json_schema())


def values(text):
    node, _ = parse(text, str)
    assert node is not None
    return node.data()


def test_it_is_a_valid_schema():
    Draft202012Validator.check_schema(json_schema())


def test_it_is_up_to_date():
    script = Path(__file__).parents[2] / "scripts" / "write_schema.py"
    spec = importlib.util.spec_from_file_location("write_schema", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert SCHEMA_FILE.read_text(encoding="utf-8") == module.schema_text(), "run `make schema`"


@pytest.mark.parametrize("text", RIGHT)
def test_right_recipes_are_right_by_both(folder, validator, text):
    assert folder.load(text)
    validator.validate(values(text))


@pytest.mark.parametrize("text", WRONG)
def test_wrong_recipes_are_wrong_by_both(folder, validator, text):
    with pytest.raises(RecipeError):
        folder.load(text)
    assert not validator.is_valid(values(text))


def test_a_part_of_a_recipe_is_right_where_it_extends_another(validator):
    validator.validate(values("extends: a.yaml\nmethod: {r: 4}\nmodel: {dtype: float32}\n"))
    validator.validate(values("extends: [a.yaml, b.yaml]\n"))
    assert not validator.is_valid(values("extends: a.yaml\ntraining: {sed: 4}\n"))


def test_every_method_and_every_field_is_described():
    schema = json_schema()
    assert {f"method-{name}" for name in method_names()} <= set(schema["$defs"])
    assert set(schema["properties"]) == {"extends", *Recipe.model_fields}
    sections = [schema, *(definition for definition in schema["$defs"].values() if "properties" in definition)]
    for section in sections:
        for name, field in section["properties"].items():
            described = "description" in field or "$ref" in field or (name == "type" and {"const", "enum"} & set(field))
            assert described, f"{section['title']}: {name}"
