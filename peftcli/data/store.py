"""Encoded samples in files, one for each array, which are mapped into memory instead of read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, get_args

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
    """Appends samples to files, so that memory never holds more than some of them."""

    def __init__(self, create: Callable[[str], IO[bytes]]) -> None:
        """Takes what makes an array's file, to write and read, by the array's name."""
        self._create = create
        self._files: dict[str, tuple[IO[bytes], str]] = {}
        self._closing = ExitStack()
        self._ends = {"offsets": 0, "target_offsets": 0}
        self._any_task = False
        self._goal: Goal = "next-token"

    @classmethod
    def into(cls, folder: Path) -> Writer:
        """Returns one whose files stay in `folder`."""
        return cls(lambda name: (folder / f"{name}.bin").open("w+b"))

    @classmethod
    def unnamed(cls, folder: Path) -> Writer:
        """Returns one whose files take room on the disk of `folder`, have no name, and end with their last user."""
        return cls(lambda _: TemporaryFile(dir=folder))

    def gather(self, parts: Iterable[EncodedDataset]) -> EncodedDataset:
        """Writes the samples of all `parts` and returns them, mapped."""
        with self._closing:
            for part in parts:
                self._add(part)
            arrays = {}
            for name, (file, dtype) in self._files.items():
                file.flush()
                if name != "tasks" or self._any_task:
                    arrays[name] = _map(file, dtype)
        return _dataset(arrays, self._goal)

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
        if name not in self._files:
            self._files[name] = (self._closing.enter_context(self._create(name)), dtype)
        file, known = self._files[name]
        assert dtype == known, f"{name} changes from {known} to {dtype}"
        file.write(np.ascontiguousarray(values, dtype).data)

    def _append_offsets(self, name: str, offsets: npt.NDArray[np.int64]) -> None:
        """Appends the ends of rows, counted from the first part's start, and once where the first row starts."""
        first = name not in self._files
        self._append(name, (offsets if first else offsets[1:]) + self._ends[name])
        self._ends[name] += int(offsets[-1])


def _dataset(arrays: dict[str, npt.NDArray[Any]], goal: Goal) -> EncodedDataset:
    """Returns the samples that are made of `arrays`."""
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


def _map(file: IO[bytes], dtype: str) -> npt.NDArray[Any]:
    """Returns what a file holds. Writing to it changes memory alone."""
    if not os.fstat(file.fileno()).st_size:  # nothing cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(file, dtype, "c"))


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

    All bytes are read and hashed. A run needs that hash in any case, as its data's fingerprint, and every token of the
    data; so what is damaged is noticed for nothing, and before it is learned.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        report = EncodingReport(**facts["report"])
        if report.goal not in get_args(Goal):
            return None
        arrays = {name: _checked(folder, name, dtype, count) for name, (dtype, count) in facts["arrays"].items()}
        dataset = _dataset(arrays, report.goal)
        if dataset.fingerprint == facts["sha256"]:
            return dataset, report
    return None


def _checked(folder: Path, name: str, dtype: str, count: int) -> npt.NDArray[Any]:
    """Returns a stored array; raises a ValueError unless it is of a known kind, and as long as it should be."""
    if dtype not in _DTYPES[name]:
        raise ValueError(dtype)
    with (folder / f"{name}.bin").open("rb") as file:
        found = _map(file, dtype)
    if len(found) != count:
        raise ValueError(count)
    return found


def version_of(folder: Path) -> tuple[int, int] | None:
    """Returns what is different once `folder` was written anew; None where there is nothing."""
    with contextlib.suppress(OSError):
        found = (folder / FACTS_FILE).stat()
        return found.st_ino, found.st_mtime_ns
    return None


def size_of(folder: Path) -> int:
    """Returns the bytes of all files in `folder`; 0 where another process has just removed it."""
    return sum(_sizes(folder))


def _sizes(folder: Path) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                yield path.stat().st_size
