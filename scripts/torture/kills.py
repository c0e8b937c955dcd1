"""Runs that are killed at any time, and resumed until they end, against the same run undisturbed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from scripts.bench.table import Cell
from scripts.torture import runs, trees
from scripts.torture.outcome import Order, Outcome, Progress
from scripts.torture.server import Ended, Server

UNIT, SHORT, LONG = "kills", 24, 2000
MOST_KILLS = 30
"""Kills of one run; it is then left alone. A machine that became slower would kill it before it makes any headway."""
COLUMNS = ("runs", "kills", "resumes", "other bits", "stuck")


def run(order: Order) -> Outcome:
    """Kills runs of each case, `order.count` times in all, and compares how they end."""
    outcome = Outcome("runs killed by SIGKILL after U(0, 1.1 T) of their usual time T, and resumed until they end")
    runs.prepare(order.folder)
    server, progress = Server(), Progress("kills", order.count)
    trials = [Trial(server, order.folder, case) for case in order.chosen(runs.CASES)]
    started, kills, turn = time.monotonic(), 0, 0
    while kills < order.count or turn < len(trials):
        trial = trials[turn % len(trials)]
        kills += trial.once(order.random("kills", turn), outcome.failures)
        progress.tell(kills, outcome.failures, trial.case)
        turn += 1
    outcome.rows = {trial.case: trial.figures for trial in trials}
    outcome.sum_up(COLUMNS)
    outcome.rows["all"]["kills/s"] = kills / (time.monotonic() - started)
    return outcome


class Trial:
    """One case: what its run leaves when nothing disturbs it, and how often it was killed.

    Attributes:
        case: Which of `runs.CASES`.
        output: The run's folder.
        whole: The folder of the run that nothing disturbed.
        usual: Seconds that such a run takes.
        figures: What was counted so far.
    """

    def __init__(self, server: Server, folder: Path, case: str) -> None:
        self.case, self._server, self._folder = case, server, folder
        self.output = folder / "runs" / case
        self.whole = folder / "whole" / case
        self._recipe = runs.write(folder, case, self.output)
        self.figures: dict[str, Cell] = dict.fromkeys(COLUMNS, 0)
        require(server.learn(self._arguments(), folder))
        self.whole.parent.mkdir(exist_ok=True)
        self.output.rename(self.whole)
        # Again, with all of it imported: how long it takes, and that it is the same at all.
        again = require(server.run(self._arguments(), folder))
        assert not trees.differences(self.output, self.whole), trees.differences(self.output, self.whole)
        self.usual = again.seconds
        self.figures["T"] = round(self.usual, 2)

    def once(self, random: Random, failures: list[str]) -> int:
        """Does one run, killed until it ends before it could be, and returns how often it was."""
        shutil.rmtree(self.output, ignore_errors=True)
        kills = resumes = 0
        while True:
            resumes += self.is_begun
            ended = self.start(random.uniform(0, 1.1) * self.usual if kills < MOST_KILLS else None)
            if not ended.was_killed:
                break
            kills += 1
        for column, more in (("runs", 1), ("kills", kills), ("resumes", resumes)):
            self.figures[column] = int(self.figures[column] or 0) + more
        if ended.code != 0:
            self.figures["stuck"] = int(self.figures["stuck"] or 0) + 1
            failures.append(f"{self.case}: ended with {ended.code} after {kills} kills: {ended.output[-400:]}")
        elif wrong := trees.differences(self.output, self.whole):
            self.figures["other bits"] = int(self.figures["other bits"] or 0) + 1
            failures.append(f"{self.case}: after {kills} kills, {'; '.join(wrong)}")
        return kills

    def start(self, kill_after: float | None = None, **hooks: Callable[[], None]) -> Ended:
        """Starts the run, or resumes it where there is one; see `Server.run`."""
        return self._server.run(self._arguments(), self._folder, kill_after=kill_after, **hooks)

    @property
    def is_begun(self) -> bool:
        """Whether there is a run to resume."""
        return (self.output / "recipe.yaml").is_file()

    def _arguments(self) -> list[str]:
        return ["train", self._recipe.name, *(["--resume"] if self.is_begun else [])]


def require(ended: Ended) -> Ended:
    """Returns how a run ended that nothing disturbed, which must be well."""
    assert ended.code == 0, ended.output
    return ended
