"""The order of a run's calls of the file system.

A process that is killed loses nothing that it has written: the system has it. What a power failure would lose is what
was not flushed, and no kill can show that. So the order itself is checked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MANIFEST = "state.json"


def out_of_order(calls: Sequence[str]) -> list[str]:
    """Returns what is wrong with the order in which checkpoints are written and removed, in words.

    Args:
        calls: What `Disk` logged: the name of each call and its place under the run's folder.
    """
    appear = {
        match[1]: at for at, call in enumerate(calls) if (match := re.fullmatch(r"rename (checkpoint-\d+)", call))
    }
    if not appear:
        return ["no checkpoint appears"]
    wrong = [fault for name, at in appear.items() for fault in _of_one(calls, name, at)]
    removed = [at for at, call in enumerate(calls) if re.fullmatch(r"rename checkpoint-\d+\.tmp", call)]
    for at in removed:
        newest = max((one for one in appear.values() if one < at), default=None)
        if newest is None or "fsync ." not in calls[newest:at]:
            wrong.append(f"call {at + 1}, {calls[at]}, comes before the newest checkpoint is on the disk")
    return wrong


def _of_one(calls: Sequence[str], name: str, at: int) -> list[str]:
    """Returns what is wrong with the calls that write one checkpoint, which call `at` makes appear."""
    folder = f"{name}.tmp"
    start = max((index for index in range(at) if calls[index] == f"mkdir {folder}"), default=None)
    if start is None:
        return [f"{name} is not written beside its place"]
    written: dict[str, int] = {}
    flushed: dict[str, int] = {}
    named = folder_flushed = begun = start
    for index in range(start, at):
        what, _, place = calls[index].partition(" ")
        file = place.removeprefix(f"{folder}/").removesuffix(".tmp")
        if calls[index] == f"fsync {folder}":
            folder_flushed = index
        elif what in ("write", "save_file"):
            written[file] = index
        elif what == "fsync":
            flushed.setdefault(file, index) if index > written.get(file, at) else None
        elif what in ("replace", "open"):
            named = index
            begun = index if what == "open" and file == MANIFEST else begun
    wrong = [f"{file} of {name} is not flushed" for file in written if file not in flushed]
    wrong += [
        f"{MANIFEST} of {name} is begun before {file} is flushed"
        for file, index in flushed.items()
        if file != MANIFEST and index > begun
    ]
    if MANIFEST not in written:
        wrong.append(f"{name} has no {MANIFEST}")
    if folder_flushed < named:
        wrong.append(f"the folder of {name} is not flushed before it appears")
    if calls[at + 1 : at + 2] != ["fsync ."]:
        wrong.append(f"the run's folder is not flushed once {name} is there")
    return wrong
