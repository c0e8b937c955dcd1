from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from peftcli.errors import Problem, RecipeError
from peftcli.recipe import LoadedRecipe, load

GOOD = """\
model:
  name: org/tiny-model
data:
  train: data/train.jsonl
method:
  type: lora
  r: 8
training:
  learning_rate: 1e-4
"""


class Folder:
    """A current directory with recipe files in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str, name: str = "r.yaml") -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return Path(name)

    def load(self, text: str, *overrides: str) -> LoadedRecipe:
        return load(self.write(text), overrides)

    def problems(self, text: str, *overrides: str) -> tuple[Problem, ...]:
        with pytest.raises(RecipeError) as raised:
            load(self.write(text), overrides)
        return raised.value.problems


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.chdir(tmp_path)
    return Folder(tmp_path)


def lines(problems: Sequence[Problem]) -> list[str]:
    """Every problem without its hint."""
    return [f"{problem.where}: {problem.message}" for problem in problems]


Problems = Callable[..., tuple[Problem, ...]]
