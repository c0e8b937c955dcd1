"""Every field that a recipe may have does something: code outside `peftcli/recipe` reads it.

A setting that is accepted and ignored is the worst kind of wrong: the run is not what its recipe says.
"""

import ast
import inspect
import sys
from pathlib import Path

import pytest

import peftcli
from peftcli import methods, recipe
from peftcli.errors import PeftcliError
from peftcli.methods._protocol import MethodConfig
from peftcli.recipe import Recipe, schema
from peftcli.run import applying, merging
from peftcli.run.subject import open_subject
from tests.conftest import Recorder, write_jsonl
from tests.methods.building import SMALL

PACKAGE = Path(peftcli.__file__).parent
NO_USE = {"peft_config"}
"""Functions of methods that only pass a field on to a file."""


def sections():
    """Returns every section class of the recipe."""
    return [
        value
        for value in vars(schema).values()
        if isinstance(value, type) and issubclass(value, schema.Section) and value is not schema.Section
    ]


@pytest.fixture
def reads(monkeypatch):
    """The fields that peftcli's own code has read so far: (class, field)."""
    found = set()

    def watch(base, is_use):
        def read(self, name):
            if name in type(self).model_fields:
                code = sys._getframe(1).f_code
                file = Path(code.co_filename)
                if file.is_relative_to(PACKAGE) and is_use(type(self), code, file):
                    found.add((type(self).__name__, name))
            return object.__getattribute__(self, name)

        monkeypatch.setattr(base, "__getattribute__", read, raising=False)

    def outside_recipe(kind, code, file):
        return not file.is_relative_to(PACKAGE / "recipe")

    def in_the_methods_work(kind, code, file):
        validators = {*kind.__pydantic_decorators__.model_validators, *kind.__pydantic_decorators__.field_validators}
        return code.co_name not in validators | NO_USE

    watch(schema.Section, outside_recipe)
    watch(MethodConfig, in_the_methods_work)
    return found


def test_every_field_of_every_section(recipe_file, train, reads, rows, tmp_path, monkeypatch):
    path = recipe_file(training={"max_steps": 2})
    train(path)
    other = recipe_file(
        "other.yaml",
        data={"eval": None, "eval_fraction": 0.25, "max_length": 8},  # shorter than some rows
        training={"max_steps": None, "num_train_epochs": 0.5, "warmup_ratio": 0.1, "learning_rate": None},
        evaluation={"generate": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 2}},
        logging={"report_to": ["tensorboard"]},
        quantization={"type": "fp4"},
        output_dir="other",
    )
    train(other)
    for run in ("run", "other"):
        subject = open_subject(Path(run), None, None)
        applying.evaluate(subject, None, None, "cpu", Recorder())
        list(applying.generate(subject, ["the cat"], {}, "cpu", Recorder(), with_base=False))
    merging.merge(open_subject(Path("run"), None, None), Path("merged"), None, Recorder(), overwrite=False)
    labelled = [{"text": row["prompt"], "label": len(row["prompt"]) / 9} for row in rows]
    model = {"task": "sequence-classification", "problem_type": "regression", "num_labels": 1}
    data = {"train": str(write_jsonl(tmp_path / "labelled.jsonl", labelled)), "eval": None}
    small = {"model": model, "data": data, "training": {"max_steps": 1}, "quantization": {"type": "int8"}}
    train(recipe_file("labels.yaml", **small, output_dir="labels"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PeftcliError):  # what only a hub's data has
        train(recipe_file("hub.yaml", data={"train": {"path": "org/no-such-set", "name": "en"}}, output_dir="hub"))
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 3}}')
    spread = {"strategy": "deepspeed", "deepspeed_config": "ds.json"}
    with pytest.raises(PeftcliError, match="this run has one"):  # process
        train(recipe_file("spread.yaml", distributed=spread, output_dir="spread"))

    declared = {(section.__name__, field) for section in sections() for field in section.model_fields}
    assert len(declared) > 50
    unread = declared - reads
    assert not unread, f"accepted but never read: {sorted(unread)}"


@pytest.mark.parametrize("name", [name for name in methods.names() if len(methods.load(name).Config.model_fields) > 1])
def test_every_field_of_every_method(recipe_file, train, reads, name):
    config = methods.load(name).Config
    small = {field: value for field, value in SMALL.items() if field in config.model_fields}
    train(recipe_file(method={"type": name, **small}, training={"max_steps": 1}))
    unread = {field for field in config.model_fields if (config.__name__, field) not in reads} - {"type"}
    unread -= read_in_the_source(config)  # what only another value of another field leads to
    assert not unread, f"{name} accepts but never reads {sorted(unread)}"


def read_in_the_source(config):
    """Returns the attributes that the files of a Config's classes read outside validators and `NO_USE`."""
    found = set()
    for module in {
        sys.modules[one.__module__] for one in config.__mro__ if one.__module__.startswith("peftcli.methods")
    }:
        for function in ast.walk(ast.parse(inspect.getsource(module))):
            if not isinstance(function, ast.FunctionDef) or function.name in NO_USE:
                continue
            if not any("validator" in ast.unparse(one) for one in function.decorator_list):
                found |= {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
    return found


def test_a_field_that_nothing_reads_is_found(recipe_file, train, reads):
    """The watch sees what is read, and does not count the recipe package's own reading or a validator's."""
    loaded = recipe.load(recipe_file())
    recipe.dump(recipe.resolve_paths(loaded.recipe))
    methods.load("lora").Config.model_validate({"type": "lora", "init": "orthogonal"})
    assert reads == set()
    assert Recipe.model_fields.keys() >= {"model", "data", "training"}
    train(recipe_file(training={"max_steps": 1}))
    assert ("TrainingSection", "seed") in reads
    assert ("TrainingSection", "no_such_field") not in reads
