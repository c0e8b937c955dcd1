"""`peftcli merge`, killed at any time: what is at its target is the whole old model, the whole new one, or nothing."""

from __future__ import annotations

import shutil
import time

from scripts.torture import runs, trees
from scripts.torture.kills import Trial, require
from scripts.torture.outcome import Order, Outcome, Progress
from scripts.torture.server import Server

UNIT, SHORT, LONG = "kills", 16, 1000
COMMANDS: dict[str, tuple[str, list[str]]] = {
    "new": ("lora", []),
    "in place of an old one": ("lora", ["--overwrite"]),
    "in place of an old one, proven by its logits": ("lora", ["--overwrite", "--verify", "logits"]),
    "of a packed base, onto its original weights": ("lora, NF4", ["--overwrite", "--base", "original"]),
}
"""The case whose run is merged, and the options."""
COLUMNS = ("merges", "kills", "old", "new", "nothing", "partial", "left over")


def run(order: Order) -> Outcome:
    """Kills merges `order.count` times in all."""
    outcome = Outcome("merges killed by SIGKILL after U(0, 1.1 T) of their usual time T, and what is there then")
    outcome.rows = {name: dict.fromkeys(COLUMNS, 0) for name in COMMANDS}
    runs.prepare(order.folder)
    server, progress = Server(), Progress("merges", order.count)
    trained = {case: Trial(server, order.folder, case) for case in {case for case, _ in COMMANDS.values()}}
    attempts = {name: _Merge(server, trained[case], name, options) for name, (case, options) in COMMANDS.items()}
    started, kills, turn = time.monotonic(), 0, 0
    while kills < order.count:
        name = list(COMMANDS)[turn % len(COMMANDS)]
        kills += attempts[name].once(order, turn, outcome)
        progress.tell(kills, outcome.failures, name)
        turn += 1
    for name, attempt in attempts.items():
        attempt.finish(outcome, name)
        outcome.rows[name]["T"] = round(attempt.usual, 2)
    outcome.sum_up(COLUMNS)
    outcome.rows["all"]["kills/s"] = kills / (time.monotonic() - started)
    return outcome


class _Merge:
    """One way to merge, what it leaves when nothing disturbs it, and what it replaces."""

    def __init__(self, server: Server, trial: Trial, name: str, options: list[str]) -> None:
        self._server, self._name, self._options = server, name, options
        self._folder = trial.whole.parents[1]
        place = self._folder / "merges" / name
        place.mkdir(parents=True)
        self._target, self._new, self._old = place / "merged", place.with_name(f"{name}, new"), place.with_name("old")
        self._begin = ["merge", str(trial.output.relative_to(self._folder)), "--output", str(self._target)]
        require(server.learn([*self._begin, "--dtype", "bfloat16"], self._folder))
        if not self._old.exists():
            self._target.rename(self._old)  # another model than the new one in every weight
        require(server.run([*self._begin, *options, "--overwrite"], self._folder))
        self._target.rename(self._new)
        self.usual = 0.0
        ended = require(server.run([*self._begin, *options], self._folder))
        self.usual = ended.seconds
        assert not trees.differences(self._target, self._new)
        assert trees.differences(self._old, self._new)
        shutil.rmtree(self._target)

    def once(self, order: Order, turn: int, outcome: Outcome) -> int:
        """Merges once, killed or not, and returns whether it was killed."""
        replaces = "--overwrite" in self._options
        if self._target.exists():
            shutil.rmtree(self._target)
        if replaces:
            shutil.copytree(self._old, self._target)
        kill_after = order.random("merges", turn).uniform(0, 1.1) * self.usual
        ended = self._server.run([*self._begin, *self._options], self._folder, kill_after=kill_after)
        found = self._found()
        outcome.count(self._name, "merges", "kills" if ended.was_killed else "", found)
        if found == "partial" or (found == "nothing" and replaces and not self._is_kept()):
            outcome.failures.append(f"{self._name}, killed after {kill_after:.3f} s: {found} is there")
        if not ended.was_killed and (ended.code != 0 or found != "new"):
            outcome.failures.append(f"{self._name}: ended with {ended.code}, {found} is there: {ended.output[-300:]}")
        return int(ended.was_killed)

    def finish(self, outcome: Outcome, name: str) -> None:
        """Merges once more, undisturbed, and looks for what those before have left."""
        shutil.rmtree(self._target, ignore_errors=True)
        ended = self._server.run([*self._begin, *self._options], self._folder)
        left = sorted(path.name for path in self._target.parent.iterdir() if path != self._target)
        if ended.code != 0 or self._found() != "new" or left:
            outcome.count(name, "left over")
            outcome.failures.append(f"{name}: in the end {self._found()} is there, and {left}: {ended.output[-300:]}")

    def _found(self) -> str:
        """Returns what is at the target."""
        if not self._target.exists():
            return "nothing"
        if not trees.differences(self._target, self._new):
            return "new"
        return "partial" if trees.differences(self._target, self._old) else "old"

    def _is_kept(self) -> bool:
        """Returns whether the old model is whole beside the target, where the next merge finds it."""
        old = self._target.with_name(f"{self._target.name}.old.tmp")
        return old.exists() and not trees.differences(old, self._old)
