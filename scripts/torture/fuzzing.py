"""The loop of every fuzzer: mutants, each answered well, in time, or counted and told as an escape."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

from scripts.torture.outcome import Outcome, Progress

SLOWEST = 2.0
"""Seconds of the processor that the answer to one file may take."""


class Fuzzing:
    """Counts how mutants are answered; escapes from one place in the code are told once."""

    def __init__(self, part: str, outcome: Outcome, total: int) -> None:
        self._outcome, self._progress = outcome, Progress(part, total)
        self._escapes: Counter[str] = Counter()
        self._done, self._begun = 0, time.monotonic()

    def ask(self, case: str, mutant: bytes, is_accepted: Callable[[], bool]) -> None:
        """Counts what `is_accepted` makes of a mutant: accepted, refused, or an escape where it raises or is slow."""
        row: dict[str, Any] = self._outcome.rows.setdefault(
            case, {"mutants": 0, "accepted": 0, "refused": 0, "escaped": 0, "slowest s": 0.0}
        )
        before = time.process_time()
        try:
            row["accepted" if is_accepted() else "refused"] += 1
        except Exception as error:
            row["escaped"] += 1
            self._tell(case, mutant, f"{type(error).__name__}: {traceback.format_exc(limit=-2)[:2000]}")
        seconds = time.process_time() - before
        row["mutants"] += 1
        row["slowest s"] = round(max(row["slowest s"], seconds), 3)
        if seconds > SLOWEST:
            self._tell(case, mutant, "slow")
        self._done += 1
        self._progress.tell(self._done, self._outcome.failures, case)

    def _tell(self, case: str, mutant: bytes, what: str) -> None:
        place = what.rpartition('File "')[2][:120]
        self._escapes[place] += 1
        if self._escapes[place] == 1:
            self._outcome.failures.append(
                f"{case}: {mutant[:1000]!r}: {what}".encode("utf-8", "backslashreplace").decode()
            )

    def finish(self) -> Outcome:
        """Returns the outcome with sums and the rate."""
        self._outcome.sum_up(("mutants", "accepted", "refused", "escaped"))
        self._outcome.rows["all"]["mutants/s"] = round(self._done / (time.monotonic() - self._begun))
        return self._outcome
