"""One reader for each kind of local file; every one names the file and line of what it cannot read.

The `datasets` library is not used for local files. It keys its disk cache by path and modification time, so a file
replaced by `cp -p` or `rsync -t` is served as it was before; its CSV reader turns the answers "None" and "NA" into
missing values and "1" into 1.0; and importing it takes longer than reading most fine-tuning sets.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peftcli.data.lines import Lines
from peftcli.data.rows import Row, Rows, without_nulls
from peftcli.errors import DataError, Problem

MAX_PROBLEMS = 5  # enough to see the pattern; a file wrong in every line must not fill the screen
UTF8_BOM = b"\xef\xbb\xbf"
UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")


def read_file(path: Path, name: str) -> Rows:
    """Returns the rows of a local file, read according to its suffix.

    Args:
        path: The file; it exists.
        name: How messages call it.

    Raises:
        DataError: The suffix is unknown, or the file is empty, not UTF-8 or malformed.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f'the suffix "{path.suffix}" is not one that can be read', where=name, hint=f"use {', '.join(READERS)}"
        )
    try:
        with path.open("rb") as file:
            utf16 = file.read(2) in UTF16_BOMS
        if utf16:
            raise DataError("not UTF-8 but UTF-16", where=f"{name}:1", hint="convert it: iconv -f UTF-16 -t UTF-8")
        return reader(path, name)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=name) from error


def _whole(path: Path, name: str) -> bytes:
    """Returns the content of a file that is not empty."""
    data = path.read_bytes()
    if not data.strip():
        raise DataError("the file is empty", where=name)
    return data


def _identity(data: bytes) -> dict[str, Any]:
    """Returns what `Rows` knows of a file's content as a whole."""
    digest = hashlib.sha256(data).hexdigest()
    return {"digest": lambda: digest, "num_bytes": len(data)}


def _text(data: bytes, name: str, line: int = 1) -> str:
    """Returns UTF-8 `data` as text without a byte order mark; `line` is the number of its first line."""
    try:
        return data.removeprefix(UTF8_BOM).decode("utf-8") if line == 1 else data.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        at = line + error.object.count(b"\n", 0, error.start)
        column = error.start - (error.object.rfind(b"\n", 0, error.start) + 1) + 1
        raise DataError(
            f"not UTF-8: byte 0x{bad:02x} at byte {column} of the line",
            where=f"{name}:{at}",
            hint="convert the file, for example: iconv -f LATIN1 -t UTF-8",
        ) from None


def _json_object(line: bytes, name: str, number: int) -> Row:
    """Returns the object that one line of a JSON Lines file holds."""
    where = f"{name}:{number}"
    try:
        row = json.loads(_text(line, name, number))
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error.msg} at column {error.colno}", where=where) from None
    except RecursionError:
        raise DataError("the JSON is nested too deeply", where=where) from None
    except ValueError as error:  # Python reads no integers of thousands of digits
        raise DataError(f"not JSON that can be read: {error}", where=where) from None
    if not isinstance(row, dict):
        raise DataError(f"{type_name(row)}, where each line must hold an object with named fields", where=where)
    return row


def _json_lines(path: Path, name: str) -> Rows:
    """Returns the objects of a JSON Lines file; blank lines are skipped."""
    lines = Lines(path, name)
    columns: dict[str, None] = {}
    problems: list[Problem] = []
    for number, line in lines.scan():
        try:
            columns.update(dict.fromkeys(_json_object(line, name, number)))
        except DataError as error:
            problems.extend(error.problems)
            if len(problems) == MAX_PROBLEMS:
                break
    if problems:
        raise DataError.of(problems)
    return _of_lines(
        lines,
        tuple(columns),
        lambda wanted: [
            _json_object(line, name, lines.number(i)) for i, line in zip(wanted, lines.take(wanted), strict=True)
        ],
    )


def _of_lines(lines: Lines, columns: tuple[str, ...], take: Callable[[Sequence[int]], list[Row]]) -> Rows:
    """Returns rows of which each is a line of its own."""
    return Rows(
        lines.name,
        columns,
        len(lines),
        take,
        lambda i: f"{lines.name}:{lines.number(i)}",
        lambda: lines.digest,
        lines.num_bytes,
    )


def _json(path: Path, name: str) -> Rows:
    """Returns the rows of a `.json` file: an array of objects, or JSON Lines under that suffix."""
    if not _is_array(path):
        return _json_lines(path, name)
    data = _whole(path, name)
    try:
        rows = json.loads(_text(data, name))
    except json.JSONDecodeError as error:
        where = f"{name}:{error.lineno}"
        raise DataError(f"not JSON: {error.msg} at column {error.colno}", where=where) from None
    except RecursionError:
        raise DataError("the JSON is nested too deeply", where=name) from None
    except ValueError as error:
        raise DataError(f"not JSON that can be read: {error}", where=name) from None
    bad = [Problem(f"{type_name(row)}, not an object", f"{name} row {i + 1}") for i, row in _not_objects(rows)]
    if bad:
        raise DataError.of(bad[:MAX_PROBLEMS])
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    return Rows(
        name,
        columns,
        len(rows),
        lambda wanted: [rows[i] for i in wanted],
        lambda i: f"{name} row {i + 1}",
        **_identity(data),
    )


def _is_array(path: Path) -> bool:
    """Returns whether the first character of a file that is not white space opens a list."""
    with path.open("rb") as file:
        start = file.read(len(UTF8_BOM))
        while start == UTF8_BOM or (start and not start.strip()):
            start = file.read(1)
    return start.lstrip().startswith(b"[")


def _not_objects(rows: list[Any]) -> list[tuple[int, Any]]:
    """Returns the members of a JSON array that are not objects, with their indices."""
    return [(i, row) for i, row in enumerate(rows) if not isinstance(row, dict)]


def _csv(path: Path, name: str, delimiter: str = ",") -> Rows:
    """Returns the records below the header of a CSV file; every value is text, just as it is written."""
    data = _whole(path, name)
    reader = csv.reader(io.StringIO(_text(data, name), newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses documents above 128 KiB
    records: list[list[str]] = []
    starts: list[int] = []
    try:
        header = next(reader)
        _check_header(header, name)
        start = reader.line_num + 1
        for record in reader:
            if record:
                _check_width(record, header, f"{name}:{start}")
                records.append(record)
                starts.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", where=f"{name}:{reader.line_num}") from None
    finally:
        csv.field_size_limit(limit)
    return Rows(
        name,
        tuple(header),
        len(records),
        lambda wanted: [dict(zip(header, records[i], strict=True)) for i in wanted],
        lambda i: f"{name}:{starts[i]}",
        **_identity(data),
    )


def _check_header(header: list[str], name: str) -> None:
    """Raises a DataError where the first line of a CSV file cannot be its column names."""
    where = f"{name}:1"
    hint = "the first line must name the columns, for example prompt,completion"
    if not all(cell.strip() for cell in header):
        raise DataError("a column has no name in the header", where=where, hint=hint)
    repeated = sorted({cell for cell in header if header.count(cell) > 1})
    if repeated:
        raise DataError(f'the header names "{repeated[0]}" twice', where=where, hint=hint)
    other = next((mark for mark in (";", "\t", "|") if len(header) == 1 and mark in header[0]), None)
    if other:
        wanted = "save it as .tsv" if other == "\t" else "save it with commas"
        raise DataError(f"the columns seem to be separated by {other!r}", where=where, hint=wanted)


def _check_width(record: list[str], header: list[str], where: str) -> None:
    """Raises a DataError where a CSV record does not have a value for each column."""
    if len(record) != len(header):
        raise DataError(
            f"{len(record)} values for the {len(header)} columns {', '.join(header)}",
            where=where,
            hint="put values that hold commas or line breaks in double quotes",
        )


def _parquet(path: Path, name: str) -> Rows:
    """Returns the rows of a Parquet file, which stay in columns until they are taken."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    data = _whole(path, name)
    try:
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    except (pa.ArrowException, OSError, OverflowError, ValueError) as error:  # pyarrow raises what its parts raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"not Parquet: {reason[0]}", where=name) from error

    def take(wanted: Sequence[int]) -> list[Row]:
        try:
            taken: list[Row] = table.take(pa.array(wanted, pa.int64())).to_pylist()
        except (pa.ArrowException, ValueError, OverflowError) as error:  # such as text that is not UTF-8
            raise _unreadable(table, wanted, name) from error
        return [{key: without_nulls(value) for key, value in row.items()} for row in taken]

    return Rows(
        name,
        tuple(table.column_names),
        table.num_rows,
        take,
        lambda i: f"{name} row {i + 1}",
        **_identity(data) | {"num_bytes": table.nbytes},
    )


def _unreadable(table: Any, wanted: Sequence[int], name: str) -> DataError:
    """Returns the error for the first value of a table that cannot be read."""
    for index in wanted:
        for column in table.column_names:
            try:
                table[column][index].as_py()
            except Exception as error:
                return DataError(f"{column} cannot be read: {error}", where=f"{name} row {index + 1}")
    raise AssertionError("all values can be read")


def _lines(path: Path, name: str) -> Rows:
    """Returns each line of a text file that is not blank as a row with the one field `text`."""
    lines = Lines(path, name)
    for number, line in lines.scan():
        _text(line, name, number)
    return _of_lines(
        lines,
        ("text",),
        lambda wanted: [
            {"text": _text(line, name, lines.number(i)).removesuffix("\r")}
            for i, line in zip(wanted, lines.take(wanted), strict=True)
        ],
    )


def type_name(value: Any) -> str:
    """Returns what a value from a file is, in words that do not need Python: "a number", "a list"."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": lambda path, name: _csv(path, name, "\t"),
    ".parquet": _parquet,
    ".txt": _lines,
}
