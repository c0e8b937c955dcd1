"""What cannot be spread over processes is found with the recipe's line, before a weight is loaded."""

import pytest

from peftcli import methods, recipe
from peftcli.errors import RecipeError
from peftcli.run.fitting import check_spreading
from peftcli.run.opening import open_base


@pytest.mark.parametrize(
    ("sections", "precision", "message"),
    [
        ({"quantization": {"type": "int8"}}, "no", "int8 keeps each weight's scales beside it"),
        ({"method": {"type": "full"}}, "fp16", "a loss scale cannot follow gradients that are spread"),
        ({"method": {"type": "full"}, "training": {"optim": "adamw_8bit"}}, "no", "training.optim: adamw_8bit works"),
        ({"method": {"type": "bitfit"}, "training": {"optim": "adafactor"}}, "no", "training.optim: adafactor works"),
    ],
)
def test_what_cannot_be_spread(sections, precision, message, recipe_file):
    path = recipe_file(**sections, distributed={"strategy": "fsdp2"})
    loaded = recipe.load(path)
    wanted = loaded.recipe
    base = open_base(wanted.model, packed=wanted.quantization)
    with pytest.raises(RecipeError) as caught:
        check_spreading(loaded, base, methods.load(wanted.method["type"]), precision)
    (problem,) = caught.value.problems
    assert message in problem.message
    assert "ddp" in problem.hint
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if '"strategy"' in text)
    assert problem.where.endswith(f":{line}")


@pytest.mark.parametrize(
    ("sections", "precision"),
    [
        ({"quantization": {"type": "nf4"}}, "bf16"),
        ({"training": {"optim": "adamw_8bit"}}, "fp16"),
        ({"method": {"type": "full"}, "training": {"optim": "sgd"}}, "bf16"),
    ],
)
def test_what_can(sections, precision, recipe_file):
    loaded = recipe.load(recipe_file(**sections, distributed={"strategy": "fsdp2"}))
    wanted = loaded.recipe
    base = open_base(wanted.model, packed=wanted.quantization)
    check_spreading(loaded, base, methods.load(wanted.method["type"]), precision)
