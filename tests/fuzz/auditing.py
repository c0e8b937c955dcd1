"""What a piece of code does to the world, seen through the interpreter's own audit events."""

import contextlib
import errno
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"}
PROCESSES = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty"}
CHANGES = {
    **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "shutil.rmtree"), 1),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink"), 2),
}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
HARMLESS = ("/dev/", "/proc/self/", "__pycache__")


@dataclass
class Seen:
    """What was done while it was watched.

    `network`: attempts to reach another machine. `processes`: what was started. `outside`: files changed outside of the
    folder. `pickles`: pickled files opened, and things that unpickling looked up. `ran`: files of the folder run as
    Python, or loaded as a library.
    """

    folder: Path
    refuse: bool = False
    network: list = field(default_factory=list)
    processes: list = field(default_factory=list)
    outside: list = field(default_factory=list)
    pickles: list = field(default_factory=list)
    ran: list = field(default_factory=list)

    def note(self, event, args):
        if event in NETWORK:
            if not isinstance(args[1] if event == "socket.connect" else None, (str, bytes)):  # a socket of this machine
                self.network.append(f"{event} {args[1:] if event == 'socket.connect' else args}")
                if self.refuse:
                    raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        elif event in PROCESSES:
            self.processes.append(f"{event} {args[:2]}")
        elif event == "pickle.find_class":
            self.pickles.append(f"unpickled {args[1:]}")
        elif event == "open":
            self._opened(*args)
        elif event in CHANGES:
            for path in args[: CHANGES[event]]:
                self._changed(event, path)
        elif event == "exec":
            name = getattr(args[0], "co_filename", "")
            if self._is_inside(name):
                self.ran.append(name)
        elif event == "ctypes.dlopen" and "/" in str(args[0]) and self._is_inside(args[0]):
            self.ran.append(args[0])

    def _opened(self, path, mode, flags):
        if isinstance(path, int) or path is None:
            return
        writes = bool(flags & WRITING) if mode is None else any(letter in mode for letter in "wax+")
        if writes:
            self._changed("open", path)
        elif os.fsdecode(path).endswith(PICKLES) and self._is_inside(path):
            self.pickles.append(f"opened {path}")

    def _changed(self, event, path):
        if isinstance(path, int):
            return
        name = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
        if not self._is_inside(name) and not any(part in name for part in HARMLESS):
            self.outside.append(f"{event} {name}")

    def _is_inside(self, path):
        if not isinstance(path, (str, bytes, os.PathLike)) or not path or os.fsdecode(path).startswith("<"):
            return False
        return os.path.realpath(os.fsdecode(path)).startswith(str(self.folder) + os.sep)


_watching = []


def _hook(event, args):
    if _watching:
        _watching[-1].note(event, args)


@contextlib.contextmanager
def watched(folder, *, refuse=False):
    """Yields a `Seen` that fills up while entered; with `refuse`, there is no network."""
    if not _watching and not getattr(sys, "_is_audited", False):
        sys.addaudithook(_hook)  # for good: there is no way to take one out
        sys._is_audited = True
    seen = Seen(Path(os.path.realpath(folder)), refuse)
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)
