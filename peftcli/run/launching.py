"""Starts the processes of a run with torch's own launcher, in this very process, and says how they ended.

This process becomes what `torchrun` is: it starts the workers, passes signals on to them, and ends them all when one
fails. It does no work of its own. Started by a launcher, a process is a worker, and starts no others.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli import processes, startup
from peftcli.errors import EXIT_INTERRUPTED_TWICE, HostError, RecipeError

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

    from peftcli.recipe import DistributedSection

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGUSR1"
"""What the launcher passes on. By itself it would let SIGUSR1, a scheduler's warning, end it and leave the workers."""
GRACE_SECONDS = 600
"""How long workers that were asked to stop may take to finish their step and save."""
_GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""The variable that tells torch's launcher so. torch before 2.12 does not read it and waits 30 seconds."""
KILLED = {
    signal.SIGKILL: "this mostly means that the machine ran out of memory; ",
    signal.SIGABRT: "NCCL ends a process so that has waited longer than distributed.timeout for another; ",
}
"""What mostly lies behind a signal that ends a process."""
DEFAULT_ENDPOINT = "HOST:29500"


@dataclass(frozen=True)
class Launch:
    """Which processes a run wants.

    Attributes:
        per_machine: Processes on each machine; None where each is to have one for each of its GPUs, and this one,
            which may be a cluster's login node, has none.
        machines: How many machines.
        endpoint: `host:port` of the machine where they all meet; None for one machine.
        run_id: What tells this run from others that meet there.
        timeout: Seconds to wait for the other machines.
        threads: CPU threads of each process; None where its launcher may choose.
    """

    per_machine: int | None
    machines: int = 1
    endpoint: str | None = None
    run_id: str = "peftcli"
    timeout: int = 600
    threads: int | None = None

    @property
    def is_needed(self) -> bool:
        """Whether more is to be started than this process, which no launcher has started."""
        alone = self.machines == 1 and self.per_machine == 1
        return not alone and not processes.here().launched


def plan(
    section: DistributedSection, device: str | None, machines: int, endpoint: str | None, run_id: str | None
) -> Launch:
    """Returns the processes that a recipe and a command line ask for.

    Raises:
        RecipeError: They do not fit together.
    """
    asked = section.num_processes
    if device is not None and ":" in device and asked not in ("auto", 1):
        raise RecipeError(
            f"--device: {device} is one device, and distributed.num_processes asks for {asked} of them",
            hint=f"name the kind alone: --device {device.partition(':')[0]}",
        )
    count = _num_devices(device, machines) if asked == "auto" else asked
    on_cpu = device == "cpu" or _num_accelerators() == 0
    threads = processes.threads_each(count or 1) if on_cpu else None
    return Launch(count, machines, endpoint, run_id or "peftcli", section.timeout, threads)


def _num_devices(device: str | None, machines: int) -> int | None:
    """Returns how many processes suit a machine: one for each accelerator, unless one device was named.

    None where there are several machines and no accelerator here to tell how many the others have.
    """
    if device is not None and (device == "cpu" or ":" in device):
        return 1
    return _num_accelerators() or (1 if machines == 1 else None)


def _num_accelerators() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def line(launch: Launch, arguments: Sequence[str]) -> str:
    """Returns the command that each machine runs to start `launch` without peftcli's own launcher."""
    before = [f"{_GRACE}={GRACE_SECONDS}"]
    if launch.threads is not None and launch.per_machine is not None:
        before.append(f"OMP_NUM_THREADS={launch.threads}")
    meeting = ["--standalone"]
    if launch.machines > 1:
        meeting = [
            f"--nnodes={launch.machines}",
            f"--rdzv-id={launch.run_id}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={launch.endpoint or DEFAULT_ENDPOINT}",
        ]
    count = "gpu" if launch.per_machine is None else launch.per_machine
    start = ["torchrun", *meeting, f"--nproc-per-node={count}", f"--signals-to-handle={SIGNALS}"]
    return shlex.join([*before, *start, "-m", "peftcli", *arguments])


def start(launch: Launch, arguments: Sequence[str]) -> int:
    """Runs `peftcli` with `arguments` in each process of `launch`, waits for all, and returns the run's exit code.

    Raises:
        RecipeError: Several machines have no place to meet.
        HostError: A process was killed, or the machines did not meet.
    """
    if launch.machines > 1 and launch.endpoint is None:
        raise RecipeError(
            "--nnodes: machines need a place to meet", hint="name the first one: --rdzv-endpoint HOST:29500"
        )
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _quiet_torch()
    startup.done()
    os.environ.setdefault(_GRACE, str(GRACE_SECONDS))
    os.environ[processes.OWN_LAUNCHER] = "1"
    if launch.threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(launch.threads))
    with tempfile.TemporaryDirectory(prefix="peftcli-launch-") as folder:
        try:
            _run(launch, arguments, folder)
        except ChildFailedError as error:
            if launch.per_machine == processes.num_done(Path(folder)):  # whatever ended one after that took nothing
                return 0
            return _exit_code(Path(folder), error, launch.machines)
        except Exception as error:
            said = processes.outcome_in(Path(folder))
            if said is not None:  # what a process has said is why, whatever the launcher then met with
                return said[1]
            if launch.per_machine == processes.num_done(Path(folder)):  # another machine's launcher left the sooner
                return 0
            stopped = getattr(error, "sigval", None)  # torch's SignalException, which has no public name
            if stopped is None:
                raise _not_met(launch, error) from error
            return EXIT_INTERRUPTED_TWICE if stopped == signal.SIGINT else 128 + int(stopped)
    return 0


def _quiet_torch() -> None:
    """Silences torch's launcher, which reports what is reported here. Its loggers have levels of their own."""
    import torch.distributed.launcher.api  # noqa: F401 - makes them all

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _run(launch: Launch, arguments: Sequence[str], folder: str) -> None:
    from torch.distributed.launcher.api import elastic_launch

    elastic_launch(_config(launch, folder), sys.executable)("-m", "peftcli", *arguments)


def _config(launch: Launch, folder: str) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=launch.machines,
        max_nodes=launch.machines,
        nproc_per_node=launch.per_machine or 1,
        run_id=launch.run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=launch.endpoint or "localhost:0",
        rdzv_configs={"join_timeout": launch.timeout},
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        local_addr="localhost" if launch.machines == 1 else None,
        signals_to_handle=SIGNALS,
    )


def _exit_code(folder: Path, error: Any, machines: int) -> int:
    """Returns the exit code of the first process that failed of itself and said why.

    Raises:
        HostError: None of this machine's processes has said why it failed.
    """
    said = processes.outcome_in(folder)
    if said is not None:
        return said[1]
    killed = {rank: -failure.exitcode for rank, failure in error.failures.items() if failure.exitcode < 0}
    if killed:
        rank, number = next(iter(killed.items()))
        raise HostError(
            f"process {rank} of the run was killed by {signal.Signals(number).name}; the others were ended",
            hint=f"{KILLED.get(number, '')}the last checkpoint is intact: go on from it with --resume",
        )
    raise HostError(
        "a process of the run ended before its work was done and said nothing; the others were ended",
        hint="the last checkpoint is intact: go on from it with --resume"
        + ("; the other machines may say more" if machines > 1 else ""),
    )


def _not_met(launch: Launch, error: Exception) -> Exception:
    """Returns what to raise for an `error` of the launcher itself."""
    if type(error).__name__.startswith("Rendezvous"):
        return HostError(
            f"the {launch.machines} machines did not all meet at {launch.endpoint} within {launch.timeout} seconds",
            hint="start the same command on each of them; the host must be one of them and its port be reachable",
        )
    return error
