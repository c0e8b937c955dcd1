"""What the columns of a dataset mean: detects the format and turns a row into a prompt and the answer to learn.

Chats are the exception: their text is the chat template's to write, see `chat.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peftcli.data.readers import type_name
from peftcli.data.rows import Row, Rows
from peftcli.errors import DataError, RecipeError, did_you_mean
from peftcli.recipe.rules import TASK_FORMATS


@dataclass(frozen=True)
class Format:
    """The columns that a format reads: all of `required`, and those of `optional` that are there."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), ("tools", "task")),
    "prompt-completion": Format(("prompt", "completion"), ("task",)),
    "instruction": Format(("instruction", "output"), ("input", "task")),
    "text": Format(("text",), ("task",)),
    "classification": Format(("text", "label"), ("text_pair", "task")),
    "token-classification": Format(("tokens", "tags"), ("task",)),
    "image": Format(("image", "label"), ("task",)),
}

# What other datasets call our columns, for hints only: a guess must never decide what is trained.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "messages": ("conversation", "chat", "dialogue", "dialog", "turns"),
    "prompt": ("question", "query", "instruction", "input", "source", "context"),
    "completion": ("answer", "response", "output", "target", "reply", "chosen"),
    "instruction": ("question", "query", "task", "prompt"),
    "output": ("answer", "response", "target", "completion"),
    "text": ("content", "sentence", "document", "body", "premise", "sentence1"),
    "label": ("labels", "class", "category", "target", "score", "answer"),
    "tokens": ("words",),
    "tags": ("ner_tags", "pos_tags", "labels"),
    "image": ("img", "picture", "file", "path", "file_name"),
}

# The two prompts of Stanford Alpaca, letter for letter: models tuned on them elsewhere expect exactly these.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


class BadRow(Exception):  # noqa: N818 - never leaves this package: it becomes a DataError that names the row
    """One row that cannot be used; the message names the field and says why."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class Example:
    """What a row says: a prompt, which may be empty, and the answer to learn."""

    prompt: str
    answer: str


def resolve_format(rows: Rows, wanted: str, columns: Mapping[str, str], task: str = "causal-lm") -> str:
    """Returns the format to read `rows` in.

    Args:
        rows: The dataset; its columns decide where `wanted` is `auto`.
        wanted: The recipe's `data.format`, which suits the task.
        columns: The recipe's `data.columns`, {column that a format reads: column of the file}.
        task: The recipe's `model.task`.

    Raises:
        DataError: The columns fit no format or several, or lack one that the wanted format needs.
        RecipeError: `data.columns` names a column that no format, or not the wanted one, reads.
    """
    forms = {name: FORMATS[name] for name in (TASK_FORMATS[task] if wanted == "auto" else (wanted,))}
    _check_columns(rows, wanted, forms.values(), columns)
    found = _available(rows, columns)
    if wanted == "auto":
        fits = [name for name, form in forms.items() if _fits(form, found) and set(columns) <= _read_by(form)]
        if len(fits) == 1:
            return fits[0]
        raise _several(rows, fits) if fits else _none(rows, found, forms)
    if not _fits(FORMATS[wanted], found):
        raise _none(rows, found, {wanted: FORMATS[wanted]})
    return wanted


def _check_columns(rows: Rows, wanted: str, forms: Iterable[Format], columns: Mapping[str, str]) -> None:
    """Raises where `data.columns` maps a column that nothing reads or that the data does not have."""
    known = list(dict.fromkeys(name for form in forms for name in form.required + form.optional))
    for ours, theirs in columns.items():
        if ours not in known:
            raise RecipeError(
                f'data.columns: no column "{ours}" is read in format {wanted}',
                hint=did_you_mean(ours, known) or f"the columns are {', '.join(known)}",
            )
        if theirs not in rows.columns:
            raise DataError(
                f'data.columns.{ours}: there is no column "{theirs}"; the columns are {_listing(rows.columns)}',
                where=rows.name,
                hint=did_you_mean(theirs, rows.columns),
            )


def _available(rows: Rows, columns: Mapping[str, str]) -> list[str]:
    """Returns the column names after renaming; ShareGPT's `conversations` counts as `messages`."""
    found = [name for name in rows.columns if name not in columns.values()] + list(columns)
    return ["messages" if name == "conversations" else name for name in found]


def _fits(form: Format, found: Iterable[str]) -> bool:
    return set(form.required) <= set(found)


def _read_by(form: Format) -> set[str]:
    return {*form.required, *form.optional}


def _listing(names: Iterable[str]) -> str:
    """Returns names as a list for a message, short even where a CSV file without a header made them of data."""
    short = [name if len(name) <= 40 else f"{name[:37]}..." for name in names]
    return ", ".join([*short[:12], f"and {len(short) - 12} more"] if len(short) > 12 else short) or "(none)"


def _several(rows: Rows, fits: list[str]) -> DataError:
    return DataError(
        f"data.format: the columns {_listing(rows.columns)} fit {' and '.join(fits)}",
        where=rows.name,
        hint=f"say which is meant, for example `format: {fits[0]}`",
    )


def _none(rows: Rows, found: list[str], forms: Mapping[str, Format]) -> DataError:
    """Returns the error for columns that fit no format, with the mapping that was probably meant."""
    needs = "; ".join(f"{name} reads {', '.join(form.required)}" for name, form in forms.items())
    guesses = [guess for form in forms.values() if (guess := _guess(form, found))]
    if guesses:
        pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in guesses[0].items())
        hint = f"map them in the data section: `columns: {{{pairs}}}`"
    elif rows.name.endswith((".csv", ".tsv")):
        hint = "the first line of a CSV file must name the columns, for example prompt,completion"
    else:
        hint = "name the column of the file for each in data.columns, as in `columns: {prompt: my_question}`"
    return DataError(f"data.format: the columns are {_listing(rows.columns)}, but {needs}", where=rows.name, hint=hint)


def _guess(form: Format, found: list[str]) -> dict[str, str]:
    """Returns the mapping that would make `form` fit by well-known other names; empty where there is none."""
    lower = {name.lower(): name for name in found}
    guess: dict[str, str] = {}
    for ours in form.required:
        if ours in found:
            continue
        names = (name for name in (ours, *SYNONYMS[ours]) if name in lower and lower[name] not in guess.values())
        theirs = next(names, None)
        if theirs is None:
            return {}
        guess[ours] = lower[theirs]
    return guess


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """Returns a row under the names that the formats read."""
    if not columns:
        return row
    taken = {name: value for name, value in row.items() if name not in columns.values()}
    return taken | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def example(row: Row, form: str) -> Example:
    """Returns the prompt and answer of one row of a format other than `messages`.

    Raises:
        BadRow: A field is missing, empty or not text.
    """
    if form == "text":
        return Example("", text_field(row, "text"))
    if form == "prompt-completion":
        return Example(text_field(row, "prompt"), text_field(row, "completion"))
    given = text_field(row, "input") if row.get("input") not in (None, "") else ""
    return Example(alpaca_prompt(text_field(row, "instruction"), given), text_field(row, "output"))


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """Returns the text that comes before the answer in Alpaca's format."""
    if given:
        return ALPACA_WITH_INPUT.format(instruction=instruction, input=given)
    return ALPACA_WITHOUT_INPUT.format(instruction=instruction)


def text_field(row: Row, name: str) -> str:
    """Returns a field that must be text and not blank."""
    if name not in row:
        raise missing(row, name)
    value = checked_text(row[name], name)
    if not value.strip():
        raise BadRow(f"{name} is empty", "fill in the field or take the row out")
    return value


def missing(row: Row, name: str) -> BadRow:
    """Returns what to say of a row without the field `name`."""
    columns = [str(column) for column in row]
    has = f"the row has {', '.join(columns)}" if columns else "the row has no fields"
    return BadRow(f"{name} is missing", did_you_mean(name, columns) or f"{has}; fill the field in or take the row out")


def checked_text(value: Any, name: str) -> str:
    """Returns `value`, which must be text that can be written as UTF-8; `name` is the field it is from."""
    if not isinstance(value, str):
        raise BadRow(f"{name} is {type_name(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(value[error.start]):04x}"
        raise BadRow(f"{name} holds half a character, {code}, at position {error.start + 1}") from None
    return value
