"""What a run's metrics are averaged and measured with."""

from __future__ import annotations

import contextlib
import math
import re
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class Meter:
    """Averages and speeds over the optimizer steps since the last log."""

    def __init__(self) -> None:
        self.latest: dict[str, float | int] = {}
        self._clear()

    def _clear(self) -> None:
        self._loss = 0.0
        self._supervised = 0
        self._norm = 0.0
        self._norms = 0
        self.restart_clock()

    def state(self) -> dict[str, float | int]:
        """Returns the sums so far, for `restore` in a process that goes on."""
        return {"loss": self._loss, "supervised": self._supervised, "norm": self._norm, "norms": self._norms}

    def restore(self, sums: Mapping[str, Any]) -> None:
        """Goes on from the `sums` of another process's meter, less its times."""
        self._loss, self._supervised = float(sums["loss"]), int(sums["supervised"])
        self._norm, self._norms = float(sums["norm"]), int(sums["norms"])

    def restart_clock(self) -> None:
        """Leaves out of the speed what came before and was not training, such as an evaluation."""
        self._tokens = 0
        self._since = time.monotonic()

    def add(self, summed_loss: float, supervised: int, tokens: int, norm: float, learning_rate: float) -> None:
        """Adds one step: its loss summed over the supervised tokens in nats, its counts, gradient norm and rate.

        A norm that is not finite, of a step that a loss scale made skip, is left out.
        """
        self._loss += summed_loss
        self._supervised += supervised
        self._tokens += tokens
        has_norm = math.isfinite(norm)
        self._norm += norm if has_norm else 0.0
        self._norms += has_norm
        self.latest = {
            "loss": summed_loss / supervised,
            "learning_rate": learning_rate,
            **({"grad_norm": norm} if has_norm else {}),
            "tokens_per_second": round(self._tokens / (time.monotonic() - self._since), 1),
            "memory_gb": round(peak_memory_gb(), 3),
        }

    def flush(self) -> dict[str, float | int]:
        """Returns the averages (the loss by token, the norm by step, where there is one) and begins anew."""
        norm = {"grad_norm": self._norm / self._norms} if self._norms else {}
        averaged = {**self.latest, "loss": self._loss / self._supervised, **norm}
        self._clear()
        return averaged


def peak_memory_gb() -> float:
    """Returns the most memory used so far in GB: on the accelerator where there is one, else by this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_host_bytes() / 1e9


def peak_host_bytes() -> int:
    """Returns the most of the host's memory that this process has held.

    Linux counts in `getrusage` what the program held that started this one, too, so it is asked otherwise.
    """
    with contextlib.suppress(OSError):
        found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
