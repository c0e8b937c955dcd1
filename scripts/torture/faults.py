"""Runs on a file system whose k-th call fails, tears or is the process's last: for every k, until none is left."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from peftcli.checkpoint import state
from scripts.torture import runs, trees
from scripts.torture.calls import out_of_order
from scripts.torture.disk import CRASHED, WAYS, Disk
from scripts.torture.kills import Trial
from scripts.torture.outcome import Order, Outcome, Progress
from scripts.torture.server import Ended, Server

UNIT, SHORT, LONG = "calls that fail", 24, 10_000
CASE = "lora"
SURVIVED, FAILED = 0, 6
COLUMNS = ("failed", "not survived")
TOO_LARGE = "file too large"
"""By a limit that the kernel sets on the size of files: this alone reaches into the libraries' own writes."""
LIMITS = (4_000, 50_000)
"""The least is more than a run says, the largest less than its largest file."""
MOST_LIMITS = 60
"""So many say what there is to say: a limit meets one of the few files that are larger than it."""


def run(order: Order) -> Outcome:
    """Fails each call in each way, or `order.count` of them spread over the run; then resumes and compares."""
    outcome = Outcome("runs whose k-th call of the file system ends in one of these ways, and that are then resumed")
    runs.prepare(order.folder)
    trial = Trial(Server(), order.folder, CASE)
    calls = calls_of(trial, order.folder)
    outcome.failures += out_of_order(calls)

    points = [(way, at) for way in WAYS for at in range(1, len(calls) + 1)]
    random = order.random("faults")
    chosen = points if order.count >= len(points) else sorted(random.sample(points, order.count))
    outcome.rows = {way: {"calls": len(calls), **dict.fromkeys(COLUMNS, 0)} for way in WAYS}
    limits = [random.randrange(*LIMITS) for _ in range(min(MOST_LIMITS, max(2, order.count // 12)))]
    progress = Progress("faults", len(chosen) + len(limits))
    for done, (way, at) in enumerate(chosen, 1):
        wrong = _once(trial, at, way)
        outcome.count(way, "failed", "not survived" if wrong else "")
        if wrong:
            outcome.failures.append(f"{way} at call {at} ({calls[at - 1]}): {wrong}")
        progress.tell(done, outcome.failures, way)
    outcome.rows[TOO_LARGE] = dict.fromkeys(COLUMNS, 0)
    for done, limit in enumerate(limits, len(chosen) + 1):
        wrong = _survived(trial, partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit)), {FAILED})
        outcome.count(TOO_LARGE, "failed", "not survived" if wrong else "")
        if wrong:
            outcome.failures.append(f"no file larger than {limit} bytes: {wrong}")
        progress.tell(done, outcome.failures, TOO_LARGE)
    outcome.sum_up(COLUMNS)
    return outcome


def calls_of(trial: Trial, folder: Path) -> list[str]:
    """Returns the calls of a run that nothing disturbs."""
    shutil.rmtree(trial.output)
    disk, report = Disk(trial.output), folder / "calls.json"
    trial.start(before=disk.install, afterwards=partial(disk.report, report))
    found: list[str] = json.loads(report.read_text(encoding="utf-8"))
    assert found
    return found


def _once(trial: Trial, at: int, way: str) -> str:
    """Has one call fail; returns what did not survive that, in words, or nothing."""
    expected = {CRASHED} if way in ("crash", "torn") else {SURVIVED, FAILED}
    return _survived(trial, Disk(trial.output, at, way).install, expected)


def _survived(trial: Trial, obstacle: Callable[[], None], expected: set[int]) -> str:
    """Runs against an obstacle, and then without; returns what is wrong with either end, in words, or nothing."""
    shutil.rmtree(trial.output, ignore_errors=True)
    ended = trial.start(before=obstacle)
    wrong = _misbehaved(ended, expected) or _damaged(trial.output)
    if wrong or (ended.code == SURVIVED and not trees.differences(trial.output, trial.whole)):
        return wrong
    again = trial.start()
    if again.code != 0:
        return f"the resumed run ended with {again.code}: {again.output[-300:]}"
    return "; ".join(trees.differences(trial.output, trial.whole))


def _misbehaved(ended: Ended, expected: set[int]) -> str:
    """Returns how a process did not end as it should: at once, or with exit code 6 and a message."""
    if ended.code not in expected:
        return f"it ended with {ended.code}: {ended.output[-300:]}"
    if ended.code == FAILED and not ("error: cannot write " in ended.output and "hint: " in ended.output):
        return f"its message is {ended.output[-300:]}"
    return ""


def _damaged(output: Path) -> str:
    """Returns which checkpoint is there and not whole."""
    faults = ((path.name, state._damage(path)) for path in state.checkpoints(output).values())
    return "; ".join(f"{name} is there, and {fault}" for name, fault in faults if fault)
