"""What a part of the torture is asked for, and what it found."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from scripts.bench.table import Cell


@dataclass(frozen=True)
class Order:
    """What a part is to do.

    Attributes:
        count: How many times, in the part's own unit.
        folder: An empty folder to work in.
        seed: What its random choices follow from.
        cases: The cases to take, for a part that has some; none for all of them.
    """

    count: int
    folder: Path
    seed: int = 0
    cases: tuple[str, ...] = ()

    def chosen(self, known: Mapping[str, object]) -> list[str]:
        """Returns which of the `known` cases to take; ends the program where one is not known."""
        unknown = [name for name in self.cases if name not in known]
        if unknown:
            sys.exit(f"error: no such case: {unknown[0]}; there are {'; '.join(known)}")
        return [name for name in known if not self.cases or name in self.cases]

    def random(self, *names: object) -> random.Random:
        """Returns a source of numbers that follow from the seed and `names`."""
        return random.Random(f"{self.seed} {' '.join(map(str, names))}")


@dataclass
class Outcome:
    """What a part found.

    Attributes:
        title: What was tried.
        rows: Figures by row and column.
        failures: A sentence on each thing that did not survive; empty where all is well.
    """

    title: str
    rows: dict[str, dict[str, Cell]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def count(self, row: str, *columns: str) -> None:
        """Adds one to each of these columns of a row; an empty name is none of them."""
        for column in filter(None, columns):
            self.rows[row][column] = int(self.rows[row].get(column) or 0) + 1

    def sum_up(self, summed: tuple[str, ...]) -> None:
        """Adds a row `all` with the sums of the columns named."""
        rows = [row for name, row in self.rows.items() if name != "all"]
        self.rows["all"] = {name: sum(int(row.get(name) or 0) for row in rows) for name in summed}


class Progress:
    """One line on stderr that tells how far a part is: rewritten on a terminal, else a new one now and then."""

    def __init__(self, part: str, total: int) -> None:
        self._part, self._total = part, total
        self._begun = self._told = time.monotonic()
        self._failures = 0
        self._every = 0.2 if sys.stderr.isatty() else 20.0

    def tell(self, done: int, failures: list[str], what: str = "") -> None:
        """Says which `failures` are new, at once, and that `done` of all are done, if it is time to say so."""
        now = time.monotonic()
        start, end = ("\r", "\x1b[K") if sys.stderr.isatty() else ("", "\n")
        for failure in failures[self._failures :]:
            print(f"{start}{self._part}: FAILED: {failure}", file=sys.stderr, flush=True)
        self._failures = len(failures)
        if now - self._told < self._every:
            return
        self._told = now
        text = f"{self._part}: {done:,} of {self._total:,}, {len(failures)} failures, {now - self._begun:.0f} s {what}"
        print(f"{start}{text}", end=end, file=sys.stderr, flush=True)
