"""Checkpoints that are damaged on the disk: each must be noticed before it is used, and set aside as it is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from peftcli.checkpoint import state
from scripts.torture import runs, trees
from scripts.torture.kills import Trial
from scripts.torture.outcome import Order, Outcome, Progress
from scripts.torture.server import Server

UNIT, SHORT, LONG = "damages", 150, 5000
CASE = "lora, three checkpoints"
RESUMED_SHARE = 0.02
"""The share of damages that are followed by a resumed run, to its end."""
COLUMNS = ("damages", "unnoticed", "resumed", "other bits")


def run(order: Order) -> Outcome:
    """Damages the newest checkpoint, or several, `order.count` times, and looks which one is taken then."""
    outcome = Outcome("checkpoints damaged on the disk: which is taken, and what becomes of the damaged ones")
    outcome.rows = {name: dict.fromkeys(COLUMNS, 0) for name in DAMAGES}
    runs.prepare(order.folder)
    trial, progress = Trial(Server(), order.folder, CASE), Progress("corruption", order.count)
    names = list(DAMAGES)
    for number in range(order.count):
        name, random = names[number % len(names)], order.random("corruption", number)
        shutil.rmtree(trial.output, ignore_errors=True)
        shutil.copytree(trial.whole, trial.output)
        damaged = DAMAGES[name](trial.output, random)
        resumes = random.random() < RESUMED_SHARE
        wrong = _resumed(trial, damaged) if resumes else _noticed(trial.output, damaged)
        outcome.count(
            name, "damages", "resumed" if resumes else "", ("other bits" if resumes else "unnoticed") if wrong else ""
        )
        if wrong:
            outcome.failures.append(f"{name}, damage {number} of {', '.join(sorted(damaged))}: {wrong}")
        progress.tell(number + 1, outcome.failures, name)
    outcome.sum_up(COLUMNS)
    return outcome


def _noticed(output: Path, damaged: set[str]) -> str:
    """Returns what was wrong with how the newest checkpoint was looked for, in words, or nothing."""
    before = {path.name: trees.contents(path) for path in state.checkpoints(output).values()}
    whole = [name for name in before if name not in damaged]
    taken, remarks = state.newest_checkpoint(output)
    expected = output / whole[-1] if whole else None
    if taken != expected:
        return f"{taken and taken.name} was taken, not {expected and expected.name}"
    newer = [name for name in before if name in damaged and (not whole or _step(name) > _step(whole[-1]))]
    aside = [f"{name}{state.DAMAGED_SUFFIX}" for name in newer]
    lost = [name for name, at in zip(newer, aside, strict=True) if trees.contents(output / at) != before[name]]
    if lost or len(remarks) != len(newer):
        return f"{lost} are not as they were, {len(remarks)} remarks on {newer}"
    changed = [name for name in whole if trees.contents(output / name) != before[name]]
    return f"{changed} were changed" if changed else ""


def _resumed(trial: Trial, damaged: set[str]) -> str:
    """Returns what was wrong with the end of the run when it was resumed, in words, or nothing."""
    ended = trial.start()
    if ended.code != 0:
        return f"the resumed run ended with {ended.code}: {ended.output[-300:]}"
    for path in trial.output.glob(f"*{state.DAMAGED_SUFFIX}"):
        shutil.rmtree(path)
    # What is older than the one that was taken is not looked at, and stays damaged.
    wrong = trees.differences(trial.output, trial.whole)
    return "; ".join(one for one in wrong if one.partition("/")[0] not in damaged)


def _step(name: str) -> int:
    return int(name.rpartition("-")[2])


def _some(output: Path, random: Random) -> list[Path]:
    """Returns the newest checkpoint, and some of the others."""
    found = list(state.checkpoints(output).values())
    return [found[-1], *(path for path in found[:-1] if random.random() < 0.3)]


def _in_files(change: Callable[[Path, Random], None]) -> Callable[[Path, Random], set[str]]:
    """Returns a damage that makes `change` to a random file of some checkpoints."""

    def damage(output: Path, random: Random) -> set[str]:
        chosen = _some(output, random)
        for folder in chosen:
            change(random.choice(sorted(folder.iterdir())), random)
        return {folder.name for folder in chosen}

    return damage


def _flip(path: Path, random: Random) -> None:
    content = bytearray(path.read_bytes())
    content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def _zero(path: Path, random: Random) -> None:
    content = bytearray(path.read_bytes())
    start = random.randrange(len(content))
    length = min(512, len(content) - start)
    if not any(content[start : start + length]):
        start, length = 0, 8  # a header's length, which is never zero
    content[start : start + length] = bytes(length)
    path.write_bytes(content)


def _truncate(path: Path, random: Random) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def _extend(path: Path, random: Random) -> None:
    with path.open("ab") as file:
        file.write(random.randbytes(random.randint(1, 64)))


def _delete(path: Path, _: Random) -> None:
    path.unlink()


def _make_folder(path: Path, _: Random) -> None:
    path.unlink()
    path.mkdir()


def _swap_files(output: Path, random: Random) -> set[str]:
    """Swaps a file of the newest checkpoint with the same one of another."""
    *others, newest = state.checkpoints(output).values()
    other = random.choice(others)
    differing = [name for name, content in trees.contents(newest).items() if trees.contents(other)[name] != content]
    name = random.choice(differing)
    return _swap(newest / name, other / name, {newest.name, other.name})


def _swap_within(output: Path, random: Random) -> set[str]:
    newest = list(state.checkpoints(output).values())[-1]
    one, other = random.sample(sorted(newest.iterdir()), 2)
    return _swap(one, other, {newest.name})


def _swap_checkpoints(output: Path, random: Random) -> set[str]:
    *others, newest = state.checkpoints(output).values()
    other = random.choice(others)
    return _swap(newest, other, {newest.name, other.name})


def _swap(one: Path, other: Path, damaged: set[str]) -> set[str]:
    between = one.with_name("between")
    one.rename(between)
    other.rename(one)
    between.rename(other)
    return damaged


def _empty(output: Path, random: Random) -> set[str]:
    chosen = _some(output, random)
    for folder in chosen:
        shutil.rmtree(folder)
        folder.mkdir()
    return {folder.name for folder in chosen}


DAMAGES: dict[str, Callable[[Path, Random], set[str]]] = {
    "a bit flipped": _in_files(_flip),
    "a block zeroed": _in_files(_zero),
    "truncated": _in_files(_truncate),
    "extended": _in_files(_extend),
    "a file deleted": _in_files(_delete),
    "a file replaced by a folder": _in_files(_make_folder),
    "a file of another checkpoint": _swap_files,
    "two files swapped": _swap_within,
    "two checkpoints swapped": _swap_checkpoints,
    "all files deleted": _empty,
}
"""Each returns the names of the checkpoints that it damages."""
