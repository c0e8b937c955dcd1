"""Writes docs/methods.md: what every method can do, as the tests that have just passed show it.

    make support

Runs the tests that note what a method can do, and writes a cell for each note. A test that fails leaves no cell and
ends the script with an error, so the table cannot say what was not shown.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest

import peftcli
from peftcli.recipe import method_names

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "methods.md"
TASKS = ("causal-lm", "seq2seq-lm", "sequence-classification", "token-classification", "image-classification")
TESTS = ("tests/run/test_support.py", "tests/distributed/test_same_adapter.py")
"""Where tests note what they found."""
FEATURES = {
    "merge": "merge",
    "export": "export as LoRA",
    "PEFT": "PEFT reads and writes it",
    "NF4": "on an NF4 base",
    "resume": "resumes bit for bit",
    "ddp": "on two processes",
    "fsdp2": "its base spread over two",
}
HEAD = """# What every method can do

Written by `make support` from the tests that passed; do not edit. `yes` was run from a recipe to its last command on a
tiny model of that task, `no` is refused before any work is done, or was never shown. `peftcli methods NAME` has a
method's equation, fields and defaults.

Methods are shown with their default fields: `split_lora` merges and exports where it sums its heads, `hydralora` where
it has one. What two processes train was compared with what one does, on a CPU; see [distributed.md](distributed.md).
"""


class Notes:
    """A pytest plugin that keeps what the tests noted."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keeps the notes of a test that passed."""
        for key, value in report.user_properties:
            if key == "support" and report.when == "call" and report.passed:
                name, feature, reason = value
                self.found[name, feature] = reason


def main() -> None:
    """Runs the tests and writes the page."""
    notes = Notes()
    tests = [str(ROOT / path) for path in TESTS]
    of_the_page = "test_the_page_has_every_method"  # which is about to be written
    code = pytest.main(["-q", "-p", "no:cacheprovider", "-k", f"not {of_the_page}", *tests], [notes])
    if code != 0:
        sys.exit("error: tests failed; docs/methods.md is as it was")
    TARGET.write_text(page(notes.found), encoding="utf-8")
    print(f"wrote {TARGET}")


def page(found: dict[tuple[str, str], str]) -> str:
    """Returns the page for what was found: (method, feature) → why not, or nothing where it works."""
    columns = (*TASKS, *FEATURES)
    reasons: list[str] = []
    rows = []
    for name in method_names():
        cells = [_cell(found.get((name, column), "no"), reasons) for column in columns]
        rows.append(f"| [`{name}`](#{name}) | {' | '.join(cells)} |")
    titles = [*TASKS, *FEATURES.values()]
    table = [f"| method | {' | '.join(titles)} |", "| --- " * (len(titles) + 1) + "|", *rows]
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    methods = [f"## {name}\n\n{_first_lines(name)}" for name in method_names()]
    return "\n\n".join([HEAD.rstrip(), "\n".join(table), "\n".join(notes), *methods]) + "\n"


def _cell(reason: str, reasons: list[str]) -> str:
    if reason in ("", "no"):
        return reason or "yes"
    if reason not in reasons:
        reasons.append(reason)
    return f"no ({reasons.index(reason) + 1})"


def _first_lines(name: str) -> str:
    """Returns a method's first line and paper, from its file's docstring."""
    source = Path(peftcli.__file__).parent / "methods" / f"{name}.py"
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n")[:2]).removesuffix(":")


if __name__ == "__main__":
    main()
