"""The lines of a text file, found once and read from the file when they are wanted.

A file may be larger than memory: of each line that is not blank, place and number are held, in 24 bytes.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

from peftcli.errors import DataError


class Lines:
    """The lines of a file that are not blank.

    Attributes:
        name: How messages call the file.
        num_bytes: Its size.
        digest: A SHA-256 of its content; known once `scan` has come to the end.
    """

    def __init__(self, path: Path, name: str) -> None:
        """Opens the file, which stays open for as long as the object is there."""
        self.name = name
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._state = self._stamp()
        self.num_bytes = self._state[1]
        self.digest = ""
        self._starts, self._numbers = array("q"), array("q")
        self._lengths = array("q")

    def scan(self) -> Iterator[tuple[int, bytes]]:
        """Yields each line that is not blank, with its number, and remembers where it is.

        Raises:
            DataError: There is none.
        """
        digest, start = hashlib.sha256(), 0
        with os.fdopen(os.dup(self._file), "rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip():
                    self._starts.append(start)
                    self._lengths.append(len(line))
                    self._numbers.append(number)
                    yield number, line.removesuffix(b"\n")
                start += len(line)
        self._check_unchanged()
        self.digest = digest.hexdigest()
        if not self._numbers:
            raise DataError("the file is empty", where=self.name)

    def __len__(self) -> int:
        """Returns how many lines are not blank."""
        return len(self._numbers)

    def number(self, index: int) -> int:
        """Returns a line's number in the file, from 1."""
        return self._numbers[index]

    def take(self, indices: Sequence[int]) -> list[bytes]:
        """Returns the lines at `indices`.

        Raises:
            DataError: The file was changed since it was scanned.
        """
        lines = [os.pread(self._file, self._lengths[i], self._starts[i]).removesuffix(b"\n") for i in indices]
        self._check_unchanged()
        return lines

    def _stamp(self) -> tuple[int, int]:
        found = os.fstat(self._file)
        return found.st_mtime_ns, found.st_size

    def _check_unchanged(self) -> None:
        if self._stamp() != self._state:
            raise DataError(
                "the file was changed while it was read", where=self.name, hint="start again when it is complete"
            )
