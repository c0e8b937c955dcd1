"""Rows of a dataset as plain dictionaries, each of which knows the file and line that it came from.

Nothing here is cached on disk. Text is parsed when a row is taken, so that a row
means exactly what the file says: no column is retyped, and no key of a nested object is filled in for other rows.
"""

from __future__ import annotations

import bisect
import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """A dataset, read.

    Attributes:
        name: The file or hub dataset, as messages name it; several are joined by commas.
        columns: The names of all fields, in the order in which the data first uses them.
        count: How many rows there are.
        take: Returns the rows at the given indices, in that order.
        where: Returns the place of one row: `train.jsonl:17`, or `train.parquet row 17` where there are no lines.
        digest: Returns a SHA-256 of all rows' content and order; None where nothing tells it.
        num_bytes: How large the rows are, about.
    """

    name: str
    columns: tuple[str, ...]
    count: int
    take: Callable[[Sequence[int]], list[Row]]
    where: Callable[[int], str]
    digest: Callable[[], str | None] = lambda: None
    num_bytes: int = 0

    def __len__(self) -> int:
        """Returns the number of rows."""
        return self.count

    def select(self, indices: Sequence[int]) -> Rows:
        """Returns the rows at `indices` as a dataset of their own; each keeps the place it came from."""
        return Rows(
            self.name,
            self.columns,
            len(indices),
            lambda wanted: self.take([indices[i] for i in wanted]),
            lambda i: self.where(indices[i]),
            lambda: combined([self.digest(), array("q", indices).tobytes().hex()]),
            self.num_bytes * len(indices) // max(len(self), 1),
        )


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Returns the rows of all `parts`, one part after the other; they must have the same columns."""
    if len(parts) == 1:
        return parts[0]
    ends = list(accumulate(len(part) for part in parts))

    def locate(index: int) -> tuple[int, int]:
        part = bisect.bisect_right(ends, index)
        return part, index - (ends[part - 1] if part else 0)

    def take(wanted: Sequence[int]) -> list[Row]:
        found: list[Row] = [{}] * len(wanted)
        places: dict[int, list[tuple[int, int]]] = {}
        for slot, index in enumerate(wanted):
            part, inner = locate(index)
            places.setdefault(part, []).append((slot, inner))
        for part, pairs in places.items():
            taken = parts[part].take([inner for _, inner in pairs])
            for (slot, _), row in zip(pairs, taken, strict=True):
                found[slot] = row
        return found

    def where(index: int) -> str:
        part, inner = locate(index)
        return parts[part].where(inner)

    return Rows(
        ", ".join(part.name for part in parts),
        parts[0].columns,
        ends[-1],
        take,
        where,
        lambda: combined([part.digest() for part in parts]),
        sum(part.num_bytes for part in parts),
    )


def combined(digests: Sequence[str | None]) -> str | None:
    """Returns one digest of several; None where one of them is not known."""
    if None in digests:
        return None
    return hashlib.sha256("\n".join(map(str, digests)).encode()).hexdigest()


def without_nulls(value: Any) -> Any:
    """Returns a nested value without the null members of its objects.

    Arrow gives all objects of a column the same keys and fills those that a row never had with nulls; a chat template
    would print them.
    """
    if isinstance(value, dict):
        return {key: without_nulls(member) for key, member in value.items() if member is not None}
    return [without_nulls(member) for member in value] if isinstance(value, list) else value
