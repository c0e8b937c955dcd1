"""What a run's metrics are averaged and measured with."""

from __future__ import annotations

import math
import resource
import sys
import time

import torch


class Meter:
    """Averages and speeds over the optimizer steps since the last log."""

    def __init__(self) -> None:
        self.latest: dict[str, float | int] = {}
        self._clear()

    def _clear(self) -> None:
        self._loss = 0.0
        self._supervised = 0
        self._norms: list[float] = []
        self.restart_clock()

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
        norms = [norm] if math.isfinite(norm) else []
        self._norms += norms
        self.latest = {
            "loss": summed_loss / supervised,
            "learning_rate": learning_rate,
            **_mean_norm(norms),
            "tokens_per_second": round(self._tokens / (time.monotonic() - self._since), 1),
            "memory_gb": round(peak_memory_gb(), 3),
        }

    def flush(self) -> dict[str, float | int]:
        """Returns the averages (the loss by token, the norm by step, where there is one) and begins anew."""
        averaged = {**self.latest, "loss": self._loss / self._supervised, **_mean_norm(self._norms)}
        self._clear()
        return averaged


def _mean_norm(norms: list[float]) -> dict[str, float]:
    return {"grad_norm": sum(norms) / len(norms)} if norms else {}


def peak_memory_gb() -> float:
    """Returns the most memory used so far in GB: on the accelerator where there is one, else by this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
