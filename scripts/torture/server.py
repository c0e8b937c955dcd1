"""Runs of the command line in forked children: everything is imported once, and a child can be killed at any time."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

HANGS_AFTER = 120.0
"""Seconds after which a child that nothing killed is taken to hang."""
OUTPUT_FILE = "output.txt"


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: Its exit code; minus the signal's number where a signal ended it, None where it hung.
        seconds: How long it lived.
        output: What it wrote to stdout and stderr.
    """

    code: int | None
    seconds: float
    output: str

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL ended it before it ended by itself."""
        return self.code == -signal.SIGKILL


class Server:
    """Forks children that begin with all that a run imports, and have no threads but their own."""

    def __init__(self) -> None:
        os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        import torch

        # A thread does not survive a fork. The server therefore starts none: it computes nothing itself, and autograd
        # runs a CPU's backward pass in the thread that asks for it.
        torch.set_num_threads(1)
        importlib.import_module("peftcli.cli.main")

    def learn(self, arguments: Sequence[str], folder: Path) -> Ended:
        """Runs the command line once and imports all that it imported, for later children to begin with."""
        listing = folder / "modules.txt"

        def afterwards() -> None:
            listing.write_text("\n".join(sys.modules), encoding="utf-8")

        ended = self.run(arguments, folder, afterwards=afterwards)
        for name in listing.read_text(encoding="utf-8").split() if listing.exists() else ():
            with contextlib.suppress(Exception):  # modules made at run time, such as torch's classes of operators
                importlib.import_module(name)
        listing.unlink(missing_ok=True)
        gc.collect()
        gc.freeze()  # so that a child's collections do not copy what it shares with this process
        return ended

    def run(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        kill_after: float | None = None,
        before: Callable[[], None] | None = None,
        afterwards: Callable[[], None] | None = None,
    ) -> Ended:
        """Runs `peftcli` with these arguments in a child, and returns how that ended.

        Args:
            arguments: The command line.
            folder: The child's current directory; what it says is in a file there.
            kill_after: Seconds after which it gets a SIGKILL; None for never.
            before: Called in the child first.
            afterwards: Called in the child last, where it ends by itself.
        """
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _become(arguments, folder, before, afterwards)
        status = _wait(child, started + (HANGS_AFTER if kill_after is None else kill_after))
        if status is None:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            hung = kill_after is None
        else:
            hung = False
        output = (folder / OUTPUT_FILE).read_text(encoding="utf-8", errors="replace")
        return Ended(None if hung else os.waitstatus_to_exitcode(status), time.monotonic() - started, output)


def _wait(child: int, until: float) -> int | None:
    """Returns the child's status when it has ended by itself; None where it has not by then."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        left = until - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(left, 0.002))


def _settle_threads() -> None:
    """Has torch replace its pool of threads, which a fork leaves without threads, while there is one thread alone.

    It does so when it next needs the pool; two threads that need it at once, as transformers' loading has, can find
    none and fail an assertion.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(torch.get_num_threads())


def _become(
    arguments: Sequence[str],
    folder: Path,
    before: Callable[[], None] | None,
    afterwards: Callable[[], None] | None,
) -> NoReturn:
    """Turns this forked child into a process that was started as `peftcli ARGUMENTS` in `folder`."""
    code = 1
    try:
        os.chdir(folder)
        output = os.open(OUTPUT_FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.argv = ["peftcli", *arguments]
        _settle_threads()
        if before is not None:
            before()
        from peftcli.cli.main import main

        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if afterwards is not None:
            afterwards()
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):  # nothing may go on from here as a second server
                stream.flush()
        os._exit(code)
