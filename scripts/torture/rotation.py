"""Random lives of a run's folder: saves, saves that fail, crashes, damage, resuming and starting anew.

What is in the folder is held against what ought to be there after every event: never may the last whole checkpoint be
gone, nor the best, nor the one just written, nor one of an older run be taken for the newest.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from peftcli import files, manifest
from peftcli.checkpoint import state
from peftcli.checkpoint.adapter import Contents
from peftcli.errors import HostError
from scripts.torture.disk import CRASHED, WAYS, Disk
from scripts.torture.outcome import Order, Outcome, Progress

UNIT, SHORT, LONG = "sequences", 50, 10_000
EVENTS = 10
"""Events of one sequence."""
LAST_CALL = 45
"""The latest call of the file system that fails; saving and rotating take about as many."""
FAILED = 6
COLUMNS = ("events", "broken")


def run(order: Order) -> Outcome:
    """Plays `order.count` sequences of events."""
    outcome = Outcome("random sequences of saves, failures, crashes, damage, resuming and starting anew")
    outcome.rows = {name: dict.fromkeys(COLUMNS, 0) for name in _Life.EVENTS}
    progress = Progress("rotation", order.count)
    for number in range(order.count):
        random = order.random("rotation", number)
        folder = order.folder / "run"
        life = _Life(folder, random)
        told = []
        for _ in range(EVENTS):
            name = random.choices(list(life.EVENTS), list(life.EVENTS.values()))[0]
            told.append(name)
            broken = getattr(life, f"_{name.replace(' ', '_')}")() or life.broken()
            outcome.count(name, "events", "broken" if broken else "")
            if broken:
                outcome.failures.append(f"sequence {number}, limit {life.limit}: {', '.join(told)}: {broken}")
                break
        shutil.rmtree(folder)
        progress.tell(number + 1, outcome.failures)
    outcome.sum_up(COLUMNS)
    return outcome


class _Life:
    """A run's folder, and what ought to be in it.

    Attributes:
        limit: The recipe's save_total_limit.
        keeps_best: Whether it keeps the best checkpoint.
        progress: Where the run is.
        whole: The best step that each checkpoint knows of, by step, of those that are there and undamaged.
        damaged: Steps of checkpoints that were damaged on the disk and not looked at since.
    """

    EVENTS = {"save": 10, "save that fails": 6, "resume": 3, "damage": 2, "start anew": 1}  # noqa: RUF012

    def __init__(self, folder: Path, random: Random) -> None:
        self._folder, self._random = folder, random
        self.limit = random.choice([1, 1, 2, 3, None])
        self.keeps_best = random.random() < 0.5
        self.progress = state.Progress()
        self.whole: dict[int, int] = {}
        self.damaged: set[int] = set()
        self._begin()

    def broken(self) -> str:
        """Returns what in the folder is not as it ought to be, in words, or nothing."""
        there = {step: state._damage(path) for step, path in state.checkpoints(self._folder).items()}
        lost = sorted(step for step in self._needed() if there.get(step, "it is gone"))
        if lost:
            return f"{lost} ought to be there; there is {there}"
        wrong = {step: damage for step, damage in there.items() if damage and step not in self.damaged}
        if wrong:
            return f"no one damaged {wrong}"
        later = sorted(step for step in there if step > self.progress.step)
        return f"{later} are of no step that the run has done" if later else ""

    def _needed(self) -> set[int]:
        """Returns the steps whose checkpoints must be there: the newest whole one, and the best it knows of."""
        if not self.whole:
            return set()
        newest = max(self.whole)
        best = self.whole[newest]
        return {newest, best} if self.keeps_best and best in self.whole else {newest}

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        files.write_text(self._folder / "recipe.yaml", "")
        self.progress = state.Progress()
        self.whole, self.damaged = {}, set()

    def _next(self) -> state.Progress:
        """Returns where the run is when it saves next."""
        step = self.progress.step + self._random.randint(1, 3)
        best = step if self._random.random() < 0.3 else self.progress.best_step
        return state.Progress(step=step, best_step=best)

    def _write(self, progress: state.Progress) -> None:
        import torch

        tensor = torch.tensor([float(progress.step)])
        state.write(self._folder, progress, Contents({"step": progress.step}, {"w": tensor}), {"w|m": tensor})
        state.rotate(self._folder, self.limit, {progress.best_step} if self.keeps_best else set())

    def _look(self) -> None:
        """Sees which whole checkpoints are left."""
        there = state.checkpoints(self._folder)
        self.whole = {step: best for step, best in self.whole.items() if step in there}
        self.damaged &= there.keys()

    def _save(self) -> str:
        self.progress = self._next()
        self._write(self.progress)
        self.whole[self.progress.step] = self.progress.best_step
        missing = self._needed() - state.checkpoints(self._folder).keys()
        self._look()
        kept = len(self.whole.keys() | self.damaged)
        # Beside the newest ones the best, and what the newest ones knew as the best, which may be another each.
        most = math.inf if self.limit is None else self.limit + (1 + self.limit) * self.keeps_best
        if missing or kept > most:
            return f"{sorted(missing)} are gone, and {kept} are kept, after step {self.progress.step}"
        return ""

    def _save_that_fails(self) -> str:
        """Saves in another process, on a disk that fails it; then that process's end, and another one that resumes."""
        progress, needed = self._next(), self._needed()
        disk = Disk(self._folder, self._random.randint(1, LAST_CALL), self._random.choice(WAYS))
        code = _in_child(lambda: self._write(progress), disk)
        if code not in (0, FAILED, CRASHED):
            return f"saving ended with {code}"
        there = state.checkpoints(self._folder)
        if progress.step in there:
            self.whole[progress.step] = progress.best_step
            self.progress = progress
        lost = needed - there.keys()
        if lost and progress.step not in there:
            return f"{sorted(lost)} are gone, and {progress.step} is not there"
        self._look()
        return self._resume()

    def _resume(self) -> str:
        files.clear_temporary(self._folder, manifest.RUN_FILES)
        aside = {path.name for path in self._folder.glob(f"*{state.DAMAGED_SUFFIX}*")}
        expected = max(self.whole, default=None)
        found, _ = state.newest_checkpoint(self._folder)
        if (found and int(found.name.rpartition("-")[2])) != expected:
            return f"{found and found.name} was resumed from, not {expected}"
        self.progress = state.read_progress(found) if found is not None else state.Progress()
        if aside - {path.name for path in self._folder.iterdir()}:
            return "what was set aside is gone"
        self._look()
        best = self.progress.best_step
        was_damaged = best in self.damaged or any(self._folder.glob(f"checkpoint-{best}{state.DAMAGED_SUFFIX}*"))
        if self.keeps_best and best and best not in self.whole and not was_damaged:
            return f"the best checkpoint, {best}, is gone"
        return ""

    def _damage(self) -> str:
        if self.whole:
            step = self._random.choice(sorted(self.whole))
            path = self._random.choice(sorted(state.folder_of(self._folder, step).iterdir()))
            content = bytearray(path.read_bytes())
            content[self._random.randrange(len(content))] ^= 1 << self._random.randrange(8)
            path.write_bytes(content)
            del self.whole[step]
            self.damaged.add(step)
        return ""

    def _start_anew(self) -> str:
        """Replaces the run, as --overwrite does; a crash among it leaves the old run, or none to resume."""
        recipe, needed = self._folder / "recipe.yaml", self._needed()
        disk = Disk(self._folder, self._random.randint(1, 30), "crash")
        _in_child(lambda: files.clear_run(self._folder, manifest.RUN_FILES), disk)
        if recipe.exists():
            lost = needed - state.checkpoints(self._folder).keys()
            self._look()
            return f"{sorted(lost)} are gone, and the recipe is not" if lost else self._resume()
        files.clear_run(self._folder, manifest.RUN_FILES)
        if any(self._folder.iterdir()):
            return f"{[path.name for path in self._folder.iterdir()]} are of the older run"
        self._begin()
        return ""


def _in_child(work: Callable[[], object], disk: Disk) -> int:
    """Does `work` in a forked process with such a disk, and returns its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            disk.install()
            work()
            code = 0
        except HostError as error:
            code = error.exit_code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
