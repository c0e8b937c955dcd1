"""Times and peaks that can be compared: what is compared takes turns."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """What one process took.

    Attributes:
        seconds: From its start to its end, by the clock.
        peak_gb: The most memory that it, or the largest of its children, held.
        marked: From its start to the line of its output that was waited for, by the clock; None where none was.
    """

    seconds: float
    peak_gb: float
    marked: float | None = None


def interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, *, unmeasured: int = 1
) -> dict[str, list[float]]:
    """Returns the seconds that each of `steps` took in each round, in one process.

    Every round begins with another one, so that none always comes after the same.

    Args:
        steps: What to time, by name.
        rounds: Rounds that count.
        unmeasured: Rounds before them, in which caches, optimizer states and compiled code come to be.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(unmeasured + rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            started = time.perf_counter()
            steps[name]()
            if number >= unmeasured:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], to: str) -> dict[str, float]:
    """Returns the median over rounds of each one's time by that of `to` in the same round."""
    return {
        name: statistics.median(own / other for own, other in zip(values, seconds[to], strict=True))
        for name, values in seconds.items()
    }


def processes(
    commands: Mapping[str, Sequence[str]], rounds: int, threads: int, marks: Mapping[str, str] | None = None
) -> dict[str, list[Measurement]]:
    """Returns what each of `commands` took in each round, every time in a process of its own.

    Args:
        commands: What to run, by name.
        rounds: How often.
        threads: CPU threads of each.
        marks: What the line begins with, of a command's output, up to which it is timed too.
    """
    names, marks = list(commands), marks or {}
    found: dict[str, list[Measurement]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            log(f"round {number + 1} of {rounds}: {name}")
            found[name].append(process(commands[name], threads, marks.get(name)))
    return found


def process(command: Sequence[str], threads: int, mark: str | None = None) -> Measurement:
    """Runs a command to its end and returns what it took, and when it printed a line that begins with `mark`.

    A process begins with the peak of the one that starts it: import nothing large before this.

    Raises:
        SystemExit: The command failed, or printed no such line; its output is shown.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TRL_TELEMETRY": "0"}
    lines, marked, started = [], None, time.perf_counter()
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, errors="replace")
    assert child.stdout is not None
    with child.stdout:
        for line in child.stdout:
            lines.append(line)
            if mark is not None and marked is None and line.startswith(mark):
                marked = time.perf_counter() - started
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode or (mark is not None and marked is None):
        what = "failed" if child.returncode else f"printed no line that begins with {mark!r}"
        sys.exit(f"error: {' '.join(command)} {what}:\n{''.join(lines)[-3000:]}")
    return Measurement(seconds, usage.ru_maxrss * 1024 / 1e9, marked)


def medians(found: Mapping[str, Sequence[Measurement]]) -> dict[str, Measurement]:
    """Returns the median of each figure of each contestant."""
    return {name: _median(runs) for name, runs in found.items()}


def _median(runs: Sequence[Measurement]) -> Measurement:
    marked = [run.marked for run in runs if run.marked is not None]
    return Measurement(
        statistics.median(run.seconds for run in runs),
        statistics.median(run.peak_gb for run in runs),
        statistics.median(marked) if marked else None,
    )


def log(text: str) -> None:
    """Prints progress to stderr."""
    print(f"{text} …", file=sys.stderr, flush=True)
