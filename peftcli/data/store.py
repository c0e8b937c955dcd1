"""Encoded samples in files, one for each array, which are mapped into memory instead of read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, get_args

import numpy as np
import numpy.typing as npt

from peftcli import files
from peftcli.data.dataset import EncodedDataset, EncodingReport, Goal, Ragged

FACTS_FILE = "facts.json"
_DTYPES = {
    "input_ids": ("<i4",),
    "supervised": ("|u1",),
    "offsets": ("<i8",),
    "tasks": ("<i4",),
    "token_types": ("|u1",),
    "targets": ("<i4", "<f4"),
    "target_offsets": ("<i8",),
}


class Writer:
    """Appends samples to the files of a folder, so that memory never holds more than some of them."""

    def __init__(self, folder: Path) -> None:
        """Starts with the empty `folder`."""
        self._folder = folder
        self._open: dict[str, tuple[BinaryIO, str]] = {}
        self._ends = {"offsets": 0, "target_offsets": 0}
        self._any_task = False
        self._goal: Goal = "next-token"

    def gather(self, parts: Iterable[EncodedDataset]) -> EncodedDataset:
        """Writes the samples of all `parts` and returns them, mapped."""
        with self:
            for part in parts:
                self._add(part)
        shapes = {name: dtype for name, (_, dtype) in self._open.items() if name != "tasks" or self._any_task}
        return _mapped(self._folder, shapes, self._goal)

    def __enter__(self) -> Writer:
        """Begins."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the files."""
        for file, _ in self._open.values():
            file.close()

    def _add(self, part: EncodedDataset) -> None:
        self._goal = part.goal
        self._append("input_ids", part.input_ids)
        self._append("supervised", part.supervised)
        self._append_offsets("offsets", part.offsets)
        self._append("tasks", np.zeros(len(part), np.int32) if part.tasks is None else part.tasks)
        self._any_task |= part.tasks is not None
        if part.token_types is not None:
            self._append("token_types", part.token_types)
        if part.targets is not None:
            self._append("targets", part.targets.values)
            self._append_offsets("target_offsets", part.targets.offsets)

    def _append(self, name: str, values: npt.NDArray[Any]) -> None:
        dtype = values.dtype.newbyteorder("<").str
        if name not in self._open:
            self._open[name] = ((self._folder / f"{name}.bin").open("wb"), dtype)
        file, known = self._open[name]
        assert dtype == known, f"{name} changes from {known} to {dtype}"
        file.write(np.ascontiguousarray(values, dtype).data)

    def _append_offsets(self, name: str, offsets: npt.NDArray[np.int64]) -> None:
        """Appends the ends of rows, counted from the first part's start, and once where the first row starts."""
        first = name not in self._open
        self._append(name, (offsets if first else offsets[1:]) + self._ends[name])
        self._ends[name] += int(offsets[-1])


def _mapped(folder: Path, dtypes: dict[str, str], goal: Goal) -> EncodedDataset:
    """Returns the samples in a folder's files. Writing to an array changes memory alone."""
    arrays = {name: _map(folder / f"{name}.bin", dtype) for name, dtype in dtypes.items()}
    found: dict[str, npt.NDArray[Any]] = {
        "input_ids": np.empty(0, np.int32),
        "supervised": np.empty(0, np.uint8),
        "offsets": np.zeros(1, np.int64),
        **arrays,
    }
    targets = Ragged(found["targets"], found["target_offsets"]) if "targets" in found else None
    return EncodedDataset(
        found["input_ids"],
        found["supervised"],
        found["offsets"],
        goal,
        targets,
        found.get("token_types"),
        found.get("tasks"),
    )


def _map(path: Path, dtype: str) -> npt.NDArray[Any]:
    if not path.stat().st_size:  # nothing cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype, "c"))


def write_facts(folder: Path, dataset: EncodedDataset, report: EncodingReport) -> None:
    """Writes what `load` needs beside the arrays, as the last of a folder's files."""
    arrays: dict[str, Any] = {
        "input_ids": dataset.input_ids,
        "supervised": dataset.supervised,
        "offsets": dataset.offsets,
        "tasks": dataset.tasks,
        "token_types": dataset.token_types,
        "targets": None if dataset.targets is None else dataset.targets.values,
        "target_offsets": None if dataset.targets is None else dataset.targets.offsets,
    }
    described = {name: [one.dtype.str, len(one)] for name, one in arrays.items() if one is not None}
    facts = {"arrays": described, "sha256": dataset.fingerprint, "report": dataclasses.asdict(report)}
    files.write_json(folder / FACTS_FILE, facts)


def load(folder: Path) -> tuple[EncodedDataset, EncodingReport] | None:
    """Returns the samples and the report that were written to `folder`; None where any of it is not as it was.

    All bytes are read, for the fingerprint, which a run needs anyway.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        report = EncodingReport(**facts["report"])
        sizes = {name: (dtype, count) for name, (dtype, count) in facts["arrays"].items()}
        if report.goal not in get_args(Goal) or not all(_fits(folder, name, *size) for name, size in sizes.items()):
            return None
        dataset = _mapped(folder, {name: dtype for name, (dtype, _) in sizes.items()}, report.goal)
        if dataset.fingerprint == facts["sha256"]:
            return dataset, report
    return None


def _fits(folder: Path, name: str, dtype: str, count: int) -> bool:
    """Returns whether an array's file is of a known kind, and as long as it should be."""
    known = dtype in _DTYPES[name]
    return known and (folder / f"{name}.bin").stat().st_size == np.dtype(dtype).itemsize * count


def size_of(folder: Path) -> int:
    """Returns the bytes of all files in `folder`; 0 where another process has just removed it."""
    return sum(_sizes(folder))


def _sizes(folder: Path) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                yield path.stat().st_size
