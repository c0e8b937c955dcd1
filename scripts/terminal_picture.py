"""Draws the output of a command as the README's picture, an SVG of a terminal.

    python scripts/terminal_picture.py docs/demo.svg 'peftcli train recipes/quickstart.yaml' < output.txt

Reads the output, colours and all, from stdin: record it with `script -qec COMMAND output.txt`.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

CLEARED = re.compile(r"\x1b\[2K")
"""What a live display writes before it draws a line again: only what follows the last one stays."""
STYLES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
BAR = re.compile(r"\s*(training|evaluat\w*…?)\s.*\d+/\d")


def main() -> None:
    """Reads a terminal's output and writes the picture."""
    parser = argparse.ArgumentParser(description="Draw a command's output as an SVG of a terminal.")
    parser.add_argument("picture", type=Path)
    parser.add_argument("command", help="what was typed")
    parser.add_argument("--width", type=int, default=118)
    args = parser.parse_args()
    console = Console(record=True, width=args.width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.assemble(("$ ", "bold green"), args.command))
    for line in kept_lines(sys.stdin.read()):
        console.print(Text.from_ansi(line))
    args.picture.write_text(console.export_svg(title="peftcli"), encoding="utf-8")


def kept_lines(output: str) -> list[str]:
    """Returns the lines that remain on the screen when the command is done."""
    kept = []
    for line in output.replace("\r\n", "\n").split("\n"):
        *redrawn, last = CLEARED.split(line)
        plain = STYLES.sub("", last).strip()
        if line.startswith("Script ") or BAR.match(plain) or (redrawn and not plain):
            continue
        kept.append(last.replace("\r", ""))
    return kept


if __name__ == "__main__":
    main()
