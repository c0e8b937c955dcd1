"""How the work speaks while it goes on: the parts call a `Reporter`; the command line decides what that looks like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

Metrics = Mapping[str, float | int]


class Reporter(Protocol):
    """Where progress goes. Every method returns at once and never fails."""

    def stage(self, text: str) -> None:
        """Says what begins now and may take a while, such as `loading the base model`."""

    def note(self, text: str) -> None:
        """States a fact that the user should know: what was decided, counted or left out."""

    def begin(self, total_steps: int, first_step: int) -> None:
        """Starts the progress of training, of which `first_step` steps are done already."""

    def step(self, step: int, metrics: Metrics) -> None:
        """Tells that optimizer step `step` is done. `metrics` has at least `loss` and `learning_rate`."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Gives the averages since the last log; what a plain terminal shows and metrics.jsonl keeps."""

    def advance(self, done: int, total: int) -> None:
        """Tells how far something other than training has come, such as an evaluation."""

    def end(self) -> None:
        """Ends the progress of training."""


class Silent:
    """A reporter that says nothing."""

    def stage(self, text: str) -> None:  # noqa: D102
        pass

    def note(self, text: str) -> None:  # noqa: D102
        pass

    def begin(self, total_steps: int, first_step: int) -> None:  # noqa: D102
        pass

    def step(self, step: int, metrics: Metrics) -> None:  # noqa: D102
        pass

    def log(self, step: int, metrics: Metrics) -> None:  # noqa: D102
        pass

    def advance(self, done: int, total: int) -> None:  # noqa: D102
        pass

    def end(self) -> None:  # noqa: D102
        pass
