"""Which of a run's processes this one is, told from the environment that its launcher sets.

torchrun, `accelerate launch`, Ray, Kubeflow and peftcli itself all set the same variables. Imports no torch: the
command line asks before it loads anything.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftcli.errors import PeftcliError

OUTCOME_FILE = "peftcli-outcome.json"
OWN_LAUNCHER = "PEFTCLI_LAUNCHED"
"""Set by peftcli's launcher, which has shared the CPU's cores out already."""
DONE_PREFIX = "peftcli-done-"
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
_THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Place:
    """Where this process stands among those of its run.

    Attributes:
        rank: Its number in the whole run.
        count: How many processes there are.
        local_rank: Its number on this machine, and so its device's.
        local_count: How many there are on this machine.
        launched: Whether a launcher started it.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    launched: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.rank == 0


def here() -> Place:
    """Returns this process's place; one process alone where no launcher has set another."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(os.environ.get(name, "").isdigit() for name in names):
        return Place()
    rank, count, local_rank = (int(os.environ[name]) for name in names)
    return Place(rank, count, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", count)), launched=True)


def foreign_settings() -> Iterator[str]:
    """Yields the settings of `accelerate launch` in the environment that would silently change how a run executes."""
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(name, "").lower() in ("true", "1", "yes"):
            yield name


def cpu_threads(place: Place) -> int | None:
    """Returns how many CPU threads this process should use; None where the user or nobody has to say.

    torchrun sets one for each process, which on a CPU leaves most cores idle. One is therefore taken to be torchrun's
    choice and not the user's, unless peftcli's own launcher has passed it on.
    """
    if os.environ.get(OWN_LAUNCHER):
        return None
    chosen = os.environ.get(_THREADS, "1" if place.launched else "")
    if not place.launched or place.count == 1 or chosen != "1":
        return None
    return threads_each(place.local_count)


def threads_each(num_processes: int) -> int:
    """Returns this machine's CPU cores, as far as they may be used here, shared among `num_processes`."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // num_processes)


def speaks(error: PeftcliError | None, exit_code: int) -> bool:
    """Returns whether this process is to print its failure: once in a run, by the first that fails of itself.

    What a process says after another one has failed is only a consequence, and what all of them find wrong is said
    by one. The launcher's folder for error files, which all processes of a machine share, decides who is first; the
    exit code is left there for the launcher, which is told no more than that a process failed.
    """
    from peftcli.errors import PeerLostError

    place = here()
    if not place.launched or place.count == 1:
        return True
    if isinstance(error, PeerLostError):
        return False
    outcome = outcome_file()
    if outcome is None:
        return place.is_first or error is None
    try:
        with outcome.open("x", encoding="utf-8") as file:
            json.dump({"rank": place.rank, "exit_code": exit_code}, file)
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def outcome_file() -> Path | None:
    """Returns where the first process to fail says so; None where the launcher gives no such place."""
    error_file = os.environ.get(_ERROR_FILE)
    return Path(error_file).parent.parent / OUTCOME_FILE if error_file else None


def say_done() -> None:
    """Leaves word for the launcher that this process has done its work, in case others end badly after it."""
    outcome = outcome_file()
    if outcome is not None:
        with contextlib.suppress(OSError):
            outcome.with_name(f"{DONE_PREFIX}{here().rank}").touch()


def num_done(folder: Path) -> int:
    """Returns how many processes have said in a launcher's folder that they have done their work."""
    return len(list(folder.rglob(f"{DONE_PREFIX}*")))


def outcome_in(folder: Path) -> tuple[int, int] | None:
    """Returns (rank, exit code) of the first process that failed of itself, from a launcher's folder; None if none."""
    for path in folder.rglob(OUTCOME_FILE):
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            return int(said["rank"]), int(said["exit_code"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
