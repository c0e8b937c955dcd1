"""Stopping a run politely: the first signal asks for a checkpoint, the second Ctrl-C gets its way at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType

from peftcli.errors import EXIT_INTERRUPTED_TWICE

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """While entered, remembers that the process was asked to stop, for the loop to see between optimizer steps."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        # A launcher passes the second Ctrl-C on as SIGTERM. Two signals of a scheduler's are one request.
        if self.signal_name is not None and signal.SIGINT.name in (name, self.signal_name):
            os._exit(EXIT_INTERRUPTED_TWICE)
        self.signal_name = self.signal_name or name
