"""What a benchmark found, as text, Markdown or JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

Cell: TypeAlias = "str | int | float | None"


@dataclass(frozen=True)
class Options:
    """How much to measure.

    Attributes:
        rounds: Interleaved rounds; each part may need more of them for one figure, never fewer.
        smoke: Whether to do as little as there can be, to see that it measures.
        threads: CPU threads of every process that is started.
        model: The folder of the model that whole runs train.
        only: A regular expression; of the parts that go row by row, those rows are measured in whose names it is found.
    """

    rounds: int
    smoke: bool
    threads: int
    model: Path
    only: str = ""

    def wants(self, row: str) -> bool:
        """Returns whether the row is to be measured."""
        return re.search(self.only, row) is not None


@dataclass(frozen=True)
class Table:
    """One table of figures.

    Attributes:
        title: What was measured.
        rows: The figures by row and column. A column's name ends with its unit: `seconds`, `peak MB`. A figure that is
            not there is None.
        notes: What a reader must know to repeat or judge it.
    """

    title: str
    rows: Mapping[str, Mapping[str, Cell]]
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def columns(self) -> list[str]:
        """The names of the columns, in the order in which rows bring them up."""
        return list(dict.fromkeys(name for row in self.rows.values() for name in row))

    def markdown(self) -> str:
        """Returns the table with its title and notes as Markdown."""
        lines = [["", *self.columns], ["---", *("---:" for _ in self.columns)]]
        lines += [[name, *(shown(row.get(column)) for column in self.columns)] for name, row in self.rows.items()]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([f"### {self.title}", body, *self.notes])

    def text(self) -> str:
        """Returns the table for a terminal."""
        lines = [["", *self.columns]]
        lines += [[name, *(shown(row.get(column)) for column in self.columns)] for name, row in self.rows.items()]
        widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
        body = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        ]
        return "\n".join([self.title, *body, *self.notes])


def shown(cell: Cell) -> str:
    """Returns a figure with three or four digits that count."""
    if cell is None:
        return "–"
    if not isinstance(cell, float):
        return f"{cell:,}" if isinstance(cell, int) else cell
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.1f}" if abs(cell) >= 100 else f"{cell:#.3g}".rstrip(".")
