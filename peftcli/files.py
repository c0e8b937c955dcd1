"""Writes files and folders so that a reader sees the whole of one or nothing of it.

Everything a run leaves goes through here: written beside its target, flushed to the disk, then renamed; and what is
removed is renamed first. A crash leaves at most a `*.tmp` neighbour, which the next writer of the same target removes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.errors import HostError

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY_SUFFIX = ".tmp"
STAGING_FOLDER = ".staged"
_OLD_SUFFIX = ".old" + TEMPORARY_SUFFIX


def write_text(path: Path, text: str) -> None:
    """Writes `text` as the whole of `path`, atomically."""
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    with explained(path):
        try:
            _write_new(temporary, text.encode())
            sync_file(temporary)
            temporary.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def append_text(path: Path, text: str) -> None:
    """Adds `text` to the end of `path`. A crash may leave part of it, and does not wait for the disk."""
    with explained(path):
        _write(path, text.encode(), os.O_APPEND)


def _write_new(path: Path, data: bytes) -> None:
    """Writes a temporary file; a link in its place is removed, not followed."""
    if path.is_symlink():
        path.unlink()
    _write(path, data, os.O_TRUNC)


def _write(path: Path, data: bytes, flags: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | flags, 0o666)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN is refused: it is not JSON."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Returns what `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes `tensors` to a new safetensors file, flushed, readable as the umask says.

    For a folder that appears as a whole: the library neither flushes its file nor follows the umask, and a crash may
    leave its temporary one.
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
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _restore(path)
    with _emptied(path, path.with_name(path.name + TEMPORARY_SUFFIX)) as temporary:
        yield temporary
        with explained(path):
            _sync_tree(temporary)
            _replace_folder(temporary, path)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yields an empty folder, whose files take their places in the existing `folder` when the block ends well.

    Each file is replaced whole, in the order of their names; a crash may come between two of them. When the block
    raises, nothing changes.
    """
    with _emptied(folder, folder / (STAGING_FOLDER + TEMPORARY_SUFFIX)) as temporary:
        yield temporary
        with explained(folder):
            _sync_tree(temporary)
            for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
                target = folder / file.relative_to(temporary)
                require_own(target.parent, folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
            sync_folder(folder)
            shutil.rmtree(temporary)


def require_own(path: Path, folder: Path) -> None:
    """Raises a HostError where a link stands between `folder` and `path`, which is in it: it may lead anywhere."""
    with explained(path):
        for one in (path, *path.parents):
            if one == folder:
                return
            if one.is_symlink():
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` that is gone when the block ends; after a crash, the next one removes it."""
    with _emptied(path, path.with_name(path.name + TEMPORARY_SUFFIX)) as temporary:
        yield temporary
        _discard(temporary)


@contextlib.contextmanager
def _emptied(path: Path, temporary: Path) -> Iterator[Path]:
    """Yields the new, empty folder `temporary`, for what is to be at `path`, and removes it when the block raises."""
    with explained(path):
        _discard(temporary)
        temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        _discard(temporary)
        raise


def _discard(path: Path) -> None:
    """Removes a folder as far as that is possible; of a link, the link."""
    with contextlib.suppress(OSError):
        _remove(path)


def _remove(path: Path) -> None:
    """Removes a file, a folder or a link, and nothing that a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    """Waits until all that `folder` holds is on the disk."""
    for path in folder.rglob("*"):
        sync_folder(path) if path.is_dir() else sync_file(path)
    sync_folder(folder)


def _replace_folder(temporary: Path, path: Path) -> None:
    """Renames `temporary` to `path`; an old `path` is moved away first, since it cannot be renamed over."""
    old = _old(path)
    _discard(old)
    if os.path.lexists(path):
        path.rename(old)
    try:
        temporary.rename(path)
        sync_folder(path.parent)
    except OSError:
        if not path.exists():
            _restore(path)
        raise
    _discard(old)


def _old(path: Path) -> Path:
    return path.with_name(path.name + _OLD_SUFFIX)


def _restore(path: Path) -> None:
    """Puts back what a crash left between the two renames of a replacement."""
    old = _old(path)
    if old.exists() and not old.is_symlink() and not os.path.lexists(path):
        old.rename(path)


def remove_folder(path: Path) -> None:
    """Removes a folder so that no half of it is ever seen; of a link to one, the link."""
    with explained(path):
        if path.is_symlink():
            path.unlink()
            return
        gone = path.with_name(path.name + TEMPORARY_SUFFIX)
        _discard(gone)
        path.rename(gone)
        shutil.rmtree(gone)


def set_aside(path: Path, suffix: str) -> Path:
    """Renames `path` to its name with `suffix`, and a number where that is taken; returns where it is now."""
    numbers = (f"-{number}" if number > 1 else "" for number in itertools.count(1))
    aside = next(one for number in numbers if not (one := path.with_name(path.name + suffix + number)).exists())
    with explained(path):
        path.rename(aside)
        sync_folder(path.parent)
    return aside


def sync_file(path: Path) -> None:
    """Waits until the file's content is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until the folder's entries are on the disk, where the file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Returns the file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Returns the sha256 of `value` as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_writable(folder: Path) -> None:
    """Makes `folder` if it is missing and proves that files can be written there, before anything long begins.

    Raises:
        HostError: They cannot.
    """
    probe = folder / (".write-test" + TEMPORARY_SUFFIX)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write_new(probe, b"")
        probe.unlink()


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns a failure to write at `path` into a HostError that says what to do.

    The libraries that are written in Rust raise errors of their own, which quote the system's.
    """
    try:
        yield
    except OSError as error:
        raise _host_error(path, error.strerror or str(error), error.errno) from error
    except Exception as error:
        quoted = re.search(r"\(os error (\d+)\)", str(error))
        if type(error).__name__ != "SafetensorError" and quoted is None:
            raise
        raise _host_error(path, str(error), int(quoted[1]) if quoted else errno.ENOSPC) from error


def _host_error(path: Path, what: str, number: int | None) -> HostError:
    hint = "choose another folder with output_dir=DIR, or change its permissions"
    if number == errno.ELOOP:
        what, hint = "it is a link to elsewhere", "remove the link, or choose another folder with output_dir=DIR"
    if number in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space or lower training.save_total_limit; what was saved before is intact"
    elif number == errno.EIO:
        hint = "check the disk; what was saved before is intact"
    return HostError(f"cannot write {path}: {what}", hint=hint)


def cache_folder() -> Path:
    """Returns where this machine's user keeps what can be made again."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "peftcli"


def clear_run(folder: Path, owned: Iterable[str]) -> None:
    """Removes what a run wrote before, by glob patterns in this order; a file that no run writes stays."""
    with explained(folder):
        for pattern in owned:
            for path in folder.glob(pattern):
                _remove(path)


def clear_temporary(folder: Path, owned: Iterable[str]) -> None:
    """Removes what a crash left of the files and folders that `owned`, glob patterns, name."""
    with explained(folder):
        for name in (STAGING_FOLDER, *owned):
            for path in (*folder.glob(name + _OLD_SUFFIX), *folder.glob(name + TEMPORARY_SUFFIX)):
                if path.name.endswith(_OLD_SUFFIX):
                    _restore(path.with_name(path.name.removesuffix(_OLD_SUFFIX)))
                _remove(path)
