"""What the terminal shows: stdout carries data, stderr everything else, and no meaning hangs on a colour."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from peftcli.cli.secrets import redacted
from peftcli.errors import printable

if TYPE_CHECKING:
    from peftcli.data.preview import Segment
    from peftcli.errors import PeftcliError

stderr = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
stdout = Console(highlight=False, soft_wrap=True, emoji=False)


def shown(text: str) -> str:
    """Returns a text as it is printed: without secrets and control codes, and with its brackets kept."""
    return escape(printable(redacted(text)))


def print_error(error: PeftcliError, *, to: Console = stderr) -> None:
    """Prints every problem of an error: `error: where: what`, and its `hint:` below."""
    for problem in error.problems:
        place = f"{problem.where}: " if problem.where else ""
        to.print(f"[bold red]error:[/] {shown(place + problem.message)}")
        if problem.hint:
            to.print(f"\n[bold cyan]hint:[/] {shown(problem.hint)}")
        if len(error.problems) > 1:
            to.print()
    if len(error.problems) > 1:
        to.print(f"{len(error.problems)} problems")


def print_json(value: Any) -> None:
    """Prints a value as JSON on stdout, for programs."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """Prints a table on stdout: the first column to the left, numbers to the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = index > 0 and all(_is_number(row[index]) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    stdout.print(table)


def _is_number(text: str) -> bool:
    return text.strip("+-% ").replace(",", "").replace(".", "", 1).isdigit()


def print_sample(segments: Sequence[Segment], title: str, *, to: Console = stderr) -> None:
    """Prints a decoded sample with what will be learned in ⟦double brackets⟧, bold where there are colours."""
    text = Text()
    for segment in segments:
        if segment.supervised:
            text.append(f"⟦{printable(segment.text)}⟧", style="bold green")
        else:
            text.append(printable(segment.text), style="dim")
    to.print(f"[bold]{escape(title)}[/] (trained on: ⟦…⟧)")
    to.print(text)
    to.print()
