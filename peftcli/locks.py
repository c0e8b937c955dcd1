"""Locks that go with the process that holds them, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from peftcli.errors import HostError
from peftcli.files import explained

LOCK_FILE = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process while entered; the lock goes with the process, however that ends.

    Raises:
        HostError: Another process holds it.
    """
    path = folder / LOCK_FILE
    with explained(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        with explained(path):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "of an unknown process"
                raise HostError(
                    f"{folder} is in use by another run ({holder})",
                    hint="wait for it, or choose another folder with output_dir=DIR",
                ) from error
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds the lock file `path` while entered; the lock goes with the process, however that ends.

    Args:
        path: The file, which is made if it is missing and stays.
        wait: Wait for who holds it. Otherwise yields whether it could be had at once.

    Raises:
        OSError: Files cannot be locked there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def remove_if_unused(folder: Path) -> None:
    """Removes a folder that holds nothing but the lock: a run that failed before its first file leaves no trace."""
    with contextlib.suppress(OSError):
        if [path.name for path in folder.iterdir()] == [LOCK_FILE]:
            (folder / LOCK_FILE).unlink()
            folder.rmdir()
