"""YAML syntax errors said in plain English, with what to do about them."""

from __future__ import annotations

import re
from collections.abc import Callable

import yaml

from peftcli.errors import Problem

_NO_SPACE = re.compile(r"\s*[\w.-]+:[^\s:/\\]")
_COLON = "put a space after the colon, as in `key: value`"

# What the parser says (libyaml's or PyYAML's words) -> whether the place is where the construct began -> message, hint.
_TABLE: tuple[tuple[str, bool, str, str], ...] = (
    (
        r"cannot start any token",
        False,
        "a value cannot begin with {char}",
        "put the value in quotes",
    ),
    (r"could not find expected ':'", True, "this line is not a `key: value` pair", _COLON),
    (
        r"mapping values are not allowed",
        False,
        "a `key:` is not expected here",
        "start it on its own line in the same column as its neighbours; a value that holds `: ` needs quotes",
    ),
    (r"unexpected end of stream", True, "the quote that opens here is never closed", "close it on the same line"),
    (r"',' or '\]'", True, "the `[` that opens here is not closed properly", "separate items by `,` and end with `]`"),
    (
        r"',' or '\}'",
        True,
        "the `{` that opens here is not closed properly",
        "separate entries by `,` and end with `}`",
    ),
    (
        r"sequence entries are not allowed",
        False,
        "a list item `- ` is not expected here",
        "start it on a line of its own; a value that begins with `- ` needs quotes",
    ),
    (
        r"node content",
        False,
        "a value is missing here",
        "close every `[` and `{` above, and leave no value out between commas",
    ),
    (
        r"alphabetic or numeric character",
        False,
        "`*` and `&` have a meaning of their own in YAML",
        "put the value in quotes",
    ),
    (
        r"escape|hexa?decimal",
        False,
        "a backslash in double quotes starts an escape, and this is not a known one",
        "use single quotes, or `/` in paths",
    ),
    (r"<document start>", False, "there is text after the end of the document", "a recipe is one YAML document"),
    (
        r"expected (<block end>|key|'-' indicator)",
        False,
        "this does not fit the lines around it",
        "keys of one section start in the same column; a value in quotes ends with its closing quote",
    ),
)


def explain(error: yaml.YAMLError, text: str, place: Callable[[int], str]) -> Problem:
    """Returns the problem that a parser's `error` on `text` stands for; `place` names a line, counted from 0."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return Problem("this is not valid YAML", place(0), str(error).splitlines()[0])
    mark = error.problem_mark
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return Problem("a tab is used to indent this line", place(mark.line), "YAML is indented with spaces only")
    said = error.problem or ""
    previous = lines[mark.line - 1] if 0 < mark.line <= len(lines) else ""
    if "mapping values" in said and _NO_SPACE.match(previous) and ": " not in previous:
        return Problem("this line is not a `key: value` pair", place(mark.line - 1), _COLON)
    for pattern, at_start, message, hint in _TABLE:
        if re.search(pattern, said):
            start = error.context_mark if at_start and error.context_mark is not None else mark
            return Problem(
                message.replace("{char}", line[mark.column : mark.column + 1] or "this"), place(start.line), hint
            )
    return Problem(
        f"this is not valid YAML: {said}", place(mark.line), "check the indentation, quotes and brackets here"
    )
