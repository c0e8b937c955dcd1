"""What rows are labelled with: found once in the training data, before anything is encoded, and fixed from then on.

Names are sorted, so a label's number depends on which labels there are and not on the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from peftcli.data.dataset import Target
from peftcli.data.formats import BadRow, missing, renamed
from peftcli.data.readers import MAX_PROBLEMS, type_name
from peftcli.data.rows import Row, Rows
from peftcli.errors import DataError, Problem, RecipeError, did_you_mean

Kind: TypeAlias = Literal["single-label", "multi-label", "regression"]
T = TypeVar("T")

LARGEST = float(np.finfo(np.float32).max)
"""The largest number that a regression label can be: targets are in float32."""

LABEL_COLUMN = {"classification": "label", "image": "label", "token-classification": "tags"}
"""The column that holds the labels, for each format that has them."""
TASK_COLUMN = "task"
CHUNK_ROWS = 512
SHOWN_LABELS = 12


@dataclass(frozen=True)
class Labels:
    """What a labelling model can answer.

    Attributes:
        kind: `single-label` also for the tags of words.
        names: The K labels, by number; for regression, one name for each number that is predicted.
    """

    kind: Kind
    names: tuple[str, ...]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    def number(self, value: Any, field: str = "label") -> int:
        """Returns the number of one label as it is in the data.

        Raises:
            BadRow: It is no label, or none that the model knows.
        """
        name = label_name(value, field)
        if name not in self._ids:
            listing = ", ".join(self.names[:SHOWN_LABELS]) + (" …" if len(self.names) > SHOWN_LABELS else "")
            hint = did_you_mean(name, self.names) or "the model only learns labels of the training data"
            raise BadRow(f'{field} is "{name}", which is not among the {len(self.names)} labels {listing}', hint)
        return self._ids[name]

    def target(self, value: Any) -> Target:
        """Returns a row's label as the loss takes it: its number [1], 0 and 1 for each label [K], or numbers [K].

        Raises:
            BadRow: It is no such label.
        """
        if self.kind == "single-label":
            return np.array([self.number(value)], np.int32)
        if self.kind == "regression":
            numbers = _numbers(value)
            if len(numbers) != len(self.names):
                raise BadRow(f"label has {len(numbers)} numbers, and others have {len(self.names)}")
            return np.array(numbers, np.float32)
        chosen = np.zeros(len(self.names), np.float32)
        chosen[[self.number(one) for one in _checked_list(value)]] = 1.0
        return chosen

    def shown(self, target: npt.NDArray[Any]) -> str:
        """Returns a target as people read it."""
        if self.kind == "single-label":
            return self.names[int(target[0])]
        if self.kind == "regression":
            return ", ".join(f"{value:g}" for value in target.tolist())
        return ", ".join(self.names[i] for i in np.flatnonzero(target)) or "(none)"

    def summary(self, values: npt.NDArray[Any]) -> str:
        """Returns in words what the labels are and how often each of them occurs in `values`, all samples' targets."""
        if self.kind == "regression":
            return f"the labels are numbers from {values.min():g} to {values.max():g}, {values.mean():g} on average"
        if self.kind == "multi-label":
            counts = values.reshape(-1, len(self.names)).sum(axis=0).astype(int)
        else:
            counts = np.bincount(values[values >= 0], minlength=len(self.names))
        pairs = [f"{name} {count:,}" for name, count in zip(self.names, counts, strict=True)]
        more = f", and {len(pairs) - SHOWN_LABELS} more" if len(pairs) > SHOWN_LABELS else ""
        return f"{len(pairs)} {'label' if len(pairs) == 1 else 'labels'}: {', '.join(pairs[:SHOWN_LABELS])}{more}"


def label_name(value: Any, field: str) -> str:
    """Returns the name of a label, which is text, a whole number, or true or false.

    Raises:
        BadRow: It is something else.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        what = f"{value}, not a whole number" if isinstance(value, float) else f"{type_name(value)}, not a name"
        raise BadRow(f"{field} is {what} or text", "give every row a label, or take the row out")
    if not value.strip():
        raise BadRow(f"{field} is empty", "give every row a label, or take the row out")
    return value


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Returns names in order: by value where all are whole numbers, else by character."""
    found = list(names)
    numeric = all(name.isascii() and name.removeprefix("-").isdigit() for name in found)
    return tuple(sorted(found, key=lambda name: (int(name), name)) if numeric else sorted(found))


def task_names(rows: Rows, columns: Mapping[str, str]) -> tuple[str, ...]:
    """Returns the distinct values of the column `task`, in order; () where the data has no such column.

    Raises:
        DataError: A row's task is not a name or a whole number.
    """
    if columns.get(TASK_COLUMN, TASK_COLUMN) not in rows.columns:
        return ()
    return sorted_names(set(_each(rows, columns, task_name)))


def task_name(row: Row) -> str:
    """Returns which task a row belongs to."""
    if TASK_COLUMN not in row:
        raise BadRow("task is missing", "give every row a task, or remove the column")
    return label_name(row[TASK_COLUMN], TASK_COLUMN)


def find_labels(rows: Rows, form: str, columns: Mapping[str, str], problem_type: str, wanted: int | None) -> Labels:
    """Returns the labels that `rows` have.

    Args:
        rows: The training data.
        form: Its format, one of `LABEL_COLUMN`.
        columns: The recipe's `data.columns`.
        problem_type: The recipe's `model.problem_type`.
        wanted: The recipe's `model.num_labels`.

    Raises:
        DataError: Rows have no label, or labels of different kinds.
        RecipeError: There are not as many as `model.num_labels` says.
    """
    field = LABEL_COLUMN[form]
    kind: Kind = "single-label"
    if form == "classification":
        kind = _kind_of(rows, columns) if problem_type == "auto" else problem_type  # type: ignore[assignment]
    found = _each(rows, columns, lambda row: _found(row, field, form, kind))
    if kind == "regression":
        width = max((len(numbers) for numbers in found), default=0)
        return Labels(kind, _checked_count(tuple(f"LABEL_{i}" for i in range(width)), wanted, rows.name))
    names = {label_name(value, field): type(value) is int for values in found for value in values}
    if not names:
        raise DataError("no row has a label", where=rows.name)
    ints = all(names.values()) and wanted is not None and all(0 <= int(name) < wanted for name in names)
    if ints and wanted is not None:  # the data need not have every number
        return Labels(kind, tuple(map(str, range(wanted))))
    return Labels(kind, _checked_count(sorted_names(names), wanted, rows.name))


def _found(row: Row, field: str, form: str, kind: Kind) -> list[Any]:
    """Returns all label values of one row, checked."""
    if field not in row:
        raise missing(row, field)
    value = row[field]
    if form == "token-classification" or kind == "multi-label":
        found = _checked_list(value, field)
        for one in found:
            label_name(one, field)
        return found
    if kind == "regression":
        return _numbers(value)
    label_name(value, field)
    return [value]


def _checked_list(value: Any, field: str = "label") -> list[Any]:
    if not isinstance(value, list):
        raise BadRow(f"{field} is {type_name(value)}, not a list")
    return value


def _numbers(value: Any) -> list[float]:
    """Returns the numbers of a regression label; text such as a CSV file's is read as a number."""
    numbers = []
    for one in value if isinstance(value, list) else [value]:
        try:
            number = float("nan") if isinstance(one, bool) or not isinstance(one, (int, float, str)) else float(one)
        except (ValueError, OverflowError):
            number = float("nan")
        if not abs(number) <= LARGEST:
            shown = f'"{one}"' if isinstance(one, str) else str(one)
            raise BadRow(f"label is {shown[:80]}, not a finite number", "model.problem_type is regression")
        numbers.append(number)
    if not numbers:
        raise BadRow("label is an empty list")
    return numbers


def _kind_of(rows: Rows, columns: Mapping[str, str]) -> Kind:
    """Returns what the labels of a classification dataset are, which every row must agree on."""
    first: dict[str, int] = {}
    for index, row in _rows(rows, columns):
        value = row.get("label")
        if value is not None:  # a row without a label is named, with all others, when labels are read
            first.setdefault("a fraction" if type(value) is float else type_name(value), index)
    kinds = first.keys() - ({"a number"} if "a fraction" in first else set())
    if len(kinds) > 1:
        places = ", ".join(f"{kind} at {rows.where(index)}" for kind, index in first.items())
        hint = "give every row a label of one kind; model.problem_type says which is meant"
        raise DataError(f"labels are of different kinds: {places}", where=rows.name, hint=hint)
    return "multi-label" if "a list" in kinds else "regression" if "a fraction" in kinds else "single-label"


def _checked_count(names: tuple[str, ...], wanted: int | None, where: str) -> tuple[str, ...]:
    if wanted is not None and wanted != len(names):
        listing = ", ".join(names[:SHOWN_LABELS]) + (" …" if len(names) > SHOWN_LABELS else "")
        raise RecipeError(
            f"model.num_labels is {wanted}, but data.train has {len(names)} labels: {listing}",
            where=where,
            hint="leave model.num_labels out: the data decides",
        )
    return names


def _rows(rows: Rows, columns: Mapping[str, str]) -> Iterator[tuple[int, Row]]:
    """Yields each row under our names, with its index, holding a chunk at a time."""
    for at in range(0, len(rows), CHUNK_ROWS):
        indices = range(at, min(at + CHUNK_ROWS, len(rows)))
        for index, row in zip(indices, rows.take(indices), strict=True):
            yield index, renamed(row, columns)


def _each(rows: Rows, columns: Mapping[str, str], read: Callable[[Row], T]) -> Iterator[T]:
    """Yields what `read` makes of each row; raises the first few bad rows together, at the end."""
    problems: list[Problem] = []
    for index, row in _rows(rows, columns):
        try:
            yield read(row)
        except BadRow as bad:
            problems.append(Problem(str(bad), rows.where(index), bad.hint))
            if len(problems) == MAX_PROBLEMS:
                break
    if problems:
        raise DataError.of(problems)
