"""A file system on which one call fails, or is the last: every call that changes a folder is counted."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

CRASHED = 137
"""The exit code of a process that ended at a call."""

MAKES = ("open", "mkdir", "write", "save_file")
"""Calls that need space."""
PATHS = {"mkdir": 1, "rename": 2, "replace": 2, "unlink": 1, "rmdir": 1, "remove": 1, "chmod": 1}
"""Calls on paths, and how many they take."""

# How a call ends: crash (the process ends before it), torn (after half of a write), EIO (this one fails), ENOSPC
# (this one and all later ones that need space fail).
WAYS = ("crash", "torn", "EIO", "ENOSPC")


class Disk:
    """Counts the calls that change `folder`, once installed in a process that is thrown away.

    Attributes:
        log: The calls so far, each with the name of what it was on.
    """

    def __init__(self, folder: Path, at: int = 0, way: str = "crash") -> None:
        """Has call number `at`, from 1, end in this `way`; 0 for none."""
        self._folder, self._at, self._way = str(folder), at, way
        self.log: list[str] = []

    def install(self) -> None:
        """Replaces the functions of `os` and of `safetensors` that change files, in this process."""
        import safetensors.torch

        for name, count in PATHS.items():
            setattr(os, name, self._on_paths(name, getattr(os, name), count))
        for name in ("write", "pwrite", "fsync", "ftruncate"):
            setattr(os, name, self._on_descriptor(name.removeprefix("p"), getattr(os, name)))
        os.open = self._opening(os.open, _flags_write)
        for module in (builtins, io):
            module.open = self._opening(module.open, _mode_writes)  # type: ignore[attr-defined]
        safetensors.torch.save_file = self._saving(safetensors.torch.save_file)

    def report(self, path: Path) -> None:
        """Writes the calls so far into a file outside the folder, as JSON."""
        log = list(self.log)
        path.write_text(json.dumps(log), encoding="utf-8")

    def _on_paths(self, name: str, original: Callable[..., Any], count: int) -> Callable[..., Any]:
        def call(*paths: Any, **options: Any) -> Any:
            directories = [value for key, value in options.items() if key.endswith("dir_fd") and value is not None]
            places = [_place(path, directories[0] if directories else None) for path in paths[:count]]
            self._next(name, places[-1])
            return original(*paths, **options)

        return call

    def _on_descriptor(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(descriptor: int, *rest: Any) -> Any:
            place = _place("", descriptor)
            self._next(name, place, torn=lambda: original(descriptor, rest[0][: len(rest[0]) // 2], *rest[1:]))
            return original(descriptor, *rest)

        return call

    def _opening(self, original: Callable[..., Any], writes: Callable[..., bool]) -> Any:
        def call(path: Any, *rest: Any, **options: Any) -> Any:
            if not isinstance(path, int) and writes(*rest, **options):
                self._next("open", _place(path, options.get("dir_fd")))
            return original(path, *rest, **options)

        return call

    def _saving(self, original: Callable[..., Any]) -> Any:
        from safetensors import SafetensorError

        def tear(path: Path) -> None:
            (path.parent / ".tmpTorn").write_bytes(b"half")  # as the library would leave its own temporary file

        def call(tensors: Any, path: Any, *rest: Any) -> Any:
            try:
                self._next("save_file", _place(path, None), torn=lambda: tear(Path(path)))
            except OSError as error:
                raise SafetensorError(
                    f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                ) from error
            return original(tensors, path, *rest)

        return call

    def _next(self, name: str, place: str, torn: Callable[[], Any] | None = None) -> None:
        """Counts a call, if it is on the folder, and lets it pass, fail, or be the last."""
        if place != self._folder and not place.startswith(self._folder + os.sep):
            return
        self.log.append(f"{name} {place[len(self._folder) + 1 :] or '.'}")
        number = len(self.log)
        is_it = number == self._at
        if is_it and self._way == "torn" and name in ("write", "save_file") and torn is not None:
            torn()
        if is_it and self._way in ("crash", "torn"):
            os._exit(CRASHED)
        if is_it and self._way == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self._way == "ENOSPC" and self._at and number >= self._at and name in MAKES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _place(path: Any, directory: int | None) -> str:
    """Returns where a call acts: a path, perhaps under an open directory, or what a descriptor alone is of."""
    under = Path.cwd() if directory is None else Path(f"/proc/self/fd/{directory}").readlink()
    return os.path.normpath(under / os.fsdecode(path))


def _flags_write(flags: int, *_rest: Any, **_options: Any) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _mode_writes(mode: str = "r", *_rest: Any, **_options: Any) -> bool:
    return any(letter in mode for letter in "wax+")
