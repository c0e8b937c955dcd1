"""The errors of any pydantic model, such as a method's `Config`, as problems with places."""

from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from peftcli.recipe import problems_from_pydantic


class Config(BaseModel):
    """As the methods' own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    type: Literal["lora"] = "lora"
    r: int = Field(16, ge=1)
    alpha: float | None = Field(None, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    layers: list[int] | None = Field(None, min_length=2)
    bits: Literal[4, 8] = 8
    mode: Literal["a", "b"] | int = "a"

    @model_validator(mode="after")
    def _together(self):
        if self.r == 13:
            raise ValueError("r and alpha do not go together")
        return self


def problems(**fields):
    locations = {(): "r.yaml:1", ("method",): "r.yaml:2"}

    def note(path, value):
        locations[path] = f"r.yaml:{len(locations) + 1}"
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, child in children:
            note((*path, key), child)

    for key, value in fields.items():
        note(("method", key), value)
    with pytest.raises(ValidationError) as raised:
        Config.model_validate(fields)
    return problems_from_pydantic(raised.value, ("method",), locations.get)


@pytest.mark.parametrize(
    ("fields", "message", "line", "hint"),
    [
        ({"r": "8"}, 'method.r: expected a whole number, got "8"', 3, "write 8, without quotes"),
        ({"r": 0}, "method.r: must be at least 1, got 0", 3, None),
        ({"r": 8.0}, "method.r: expected a whole number, got 8.0", 3, "write 8"),
        ({"r": 8.5}, "method.r: expected a whole number, got 8.5", 3, None),
        ({"alpha": True}, "method.alpha: expected a number, got true", 3, None),
        ({"alpha": 0}, "method.alpha: must be greater than 0, got 0", 3, None),
        ({"dropout": 1.0}, "method.dropout: must be less than 1, got 1.0", 3, None),
        (
            {"target_modules": 5},
            "method.target_modules: expected text or a list, got 5",
            3,
            'put it in quotes if it is meant as text: "5"',
        ),
        (
            {"target_modules": ["q", 5]},
            "method.target_modules[1]: expected text, got 5",
            5,
            'put it in quotes if it is meant as text: "5"',
        ),
        ({"rank_pattern": {"q": "x"}}, 'method.rank_pattern.q: expected a whole number, got "x"', 4, None),
        ({"rank_pattern": 5}, "method.rank_pattern: expected `key: value` lines, got 5", 3, None),
        ({"layers": 3}, "method.layers: expected a list, got 3", 3, "write it as a list: [3]"),
        ({"layers": [3]}, "method.layers: must have at least 2", 3, None),
        ({"bits": 5}, "method.bits: must be one of 4, 8, got 5", 3, None),
        ({"mode": "c"}, 'method.mode: expected a or b or a whole number, got "c"', 3, None),
        ({"type": "x"}, 'method.type: must be lora, got "x"', 3, None),
        ({"r": 13}, "method: r and alpha do not go together", 2, None),
        ({"lora_alpha": 13}, "method.lora_alpha: unknown key", 3, "peftcli calls this method.alpha"),
    ],
)
def test_messages(fields, message, line, hint):
    (problem,) = problems(**fields)
    assert (problem.message, problem.where, problem.hint) == (message, f"r.yaml:{line}", hint)


def test_all_at_once():
    found = problems(r="x", alpha=-1, target_modules=[1, 2], oops=3)
    assert [problem.message.split(":")[0] for problem in found] == [
        "method.r",
        "method.alpha",
        "method.target_modules[0]",
        "method.target_modules[1]",
        "method.oops",
    ]


def test_every_method_config_is_placed(folder):
    from peftcli import methods
    from peftcli.recipe import load

    file = folder.write("model: {name: a}\ndata: {train: a}\nmethod:\n  type: lora\n  r: x\n  target_modules: [3]\n")
    loaded = load(file)
    with pytest.raises(ValidationError) as raised:
        methods.load("lora").Config.model_validate(dict(loaded.recipe.method))
    found = problems_from_pydantic(raised.value, ("method",), loaded.locate)
    assert [(problem.where, problem.message) for problem in found] == [
        ("r.yaml:6", "method.target_modules[0]: expected text, got 3"),
        ("r.yaml:5", 'method.r: expected a whole number, got "x"'),
    ]
