"""Writes files and folders so that a reader sees the whole of one or nothing of it.

Everything a run leaves goes through here: written beside its target, flushed to the disk, then renamed. A crash leaves
at most a `*.tmp` neighbour, which the next writer of the same target removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.errors import HostError

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY_SUFFIX = ".tmp"
LOCK_FILE = ".lock"


def write_text(path: Path, text: str) -> None:
    """Writes `text` as the whole of `path`, atomically."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with explained(path), temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    with explained(path):
        temporary.replace(path)
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes `tensors` to a new safetensors file, flushed, readable as the umask says.

    The library itself renames a temporary file into place, but neither flushes it nor follows the umask.
    """
    from safetensors.torch import save_file

    with explained(path):
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path, metadata)
        mask = os.umask(0)
        os.umask(mask)
        path.chmod(0o666 & ~mask)
        sync_file(path)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` that becomes `path` when the block ends well, replacing what was there.

    When the block raises, nothing changes at `path` and the temporary folder is removed.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    try:
        yield temporary
        with explained(path):
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync_file(file)
            sync_folder(temporary)
            _replace_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _replace_folder(temporary: Path, path: Path) -> None:
    """Renames `temporary` to `path`; an old `path` is moved away first, since it cannot be renamed over."""
    old = path.with_name(path.name + ".old" + TEMPORARY_SUFFIX)
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)
    try:
        temporary.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_file(path: Path) -> None:
    """Waits until the file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until the folder's entries are on the disk, where the file system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256(path: Path) -> str:
    """Returns the file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: Path) -> None:
    """Makes `folder` if it is missing and proves that files can be written there, before anything long begins.

    Raises:
        HostError: They cannot.
    """
    probe = folder / (".write-test" + TEMPORARY_SUFFIX)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns a failure to write at `path` into a HostError that says what to do."""
    try:
        yield
    except OSError as error:
        hint = "choose another folder with output_dir=DIR, or change its permissions"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some space or lower training.save_total_limit; what was saved before is intact"
        raise HostError(f"cannot write {path}: {error.strerror or error}", hint=hint) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise HostError(
            f"cannot write {path}: {error}", hint="free some space; what was saved before is intact"
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process while entered; the lock goes with the process, however that ends.

    Raises:
        HostError: Another process holds it.
    """
    path = folder / LOCK_FILE
    with explained(path):
        file = path.open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise HostError(
                f"{folder} is in use by another run ({file.read().strip() or 'of an unknown process'})",
                hint="wait for it, or choose another folder with output_dir=DIR",
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


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


def cache_folder() -> Path:
    """Returns where this machine's user keeps what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "peftcli"


def remove_if_unused(folder: Path) -> None:
    """Removes a folder that holds nothing but the lock: a run that failed before its first file leaves no trace."""
    if [path.name for path in folder.iterdir()] == [LOCK_FILE]:
        with contextlib.suppress(OSError):
            (folder / LOCK_FILE).unlink()
            folder.rmdir()


def clear_run(folder: Path, owned: Iterable[str]) -> None:
    """Removes what a run wrote before, by glob patterns; a file that no run writes stays."""
    with explained(folder):
        for pattern in owned:
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
