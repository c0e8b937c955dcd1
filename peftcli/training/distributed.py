"""The processes of a run as the loop sees them: what each adds to a sum, and how a run over several of them begins.

A step of P processes is one step of their batches together. Every process computes the gradient of its own samples'
loss, divided by the supervised tokens of all; the gradients are then added up, once a step. torch's
`DistributedDataParallel` would do so too, but it must be told which parameters a forward pass will leave out, copies
the frozen base around at the start, and puts another module in front of the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcli import processes
from peftcli.errors import HostError, PeerLostError
from peftcli.processes import Place
from peftcli.sharding import is_spread

if TYPE_CHECKING:
    from accelerate import Accelerator

    from peftcli.recipe import DistributedSection

BUCKET_SIZE = 25_000_000
"""Numbers of gradients that are added up in one go: large enough for the link, small beside the model."""

_LOST = re.compile(r"connection (reset|closed|refused)|remote process exited|broken pipe|socket.*closed", re.I)
_SILENT = re.compile(r"timed? ?out", re.I)


@dataclass(frozen=True)
class Processes:
    """This process and the others of its run. With one process, nothing here does anything.

    Attributes:
        place: Where this one stands among them.
        device: What it computes on.
        backend: What carries their messages, such as nccl; None where there is nobody to talk to.
        is_own: Whether their connection was made for this run, and so ends with it.
    """

    place: Place
    device: torch.device
    backend: str | None = None
    is_own: bool = True

    @property
    def count(self) -> int:
        """How many there are."""
        return self.place.count

    @property
    def is_first(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.place.is_first

    def sums(self, *values: float | Tensor) -> list[float]:
        """Returns the sum over all processes of each value, in float64 where the device has it."""
        if self.count == 1:
            return [float(value) for value in values]
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        mine = torch.stack([torch.as_tensor(value, dtype=dtype, device=self.device).detach() for value in values])
        torch.distributed.all_reduce(mine)
        return [float(value) for value in mine.tolist()]

    def rows(self, mine: Tensor) -> Tensor:
        """Returns the rows `mine` [n, ...] of every process, one process after the other; n may differ."""
        if self.count == 1:
            return mine
        lengths = [int(length) for length in self._gathered(torch.tensor([len(mine)]))]
        padded = torch.zeros(max(lengths), *mine.shape[1:], dtype=mine.dtype)
        padded[: len(mine)] = mine.detach()
        found = self._gathered(padded)
        return torch.cat([rows[:length] for rows, length in zip(found, lengths, strict=True)]).to(mine.device)

    def _gathered(self, mine: Tensor) -> list[Tensor]:
        mine = mine.to(self.device)
        found = [torch.empty_like(mine) for _ in range(self.count)]
        torch.distributed.all_gather(found, mine)
        return [one.cpu() for one in found]

    def alike(self, text: str) -> bool:
        """Returns whether every process says the same `text`."""
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
        return len(set(self.rows(torch.tensor([digest])).tolist())) == 1

    def of_first(self, number: int) -> int:
        """Returns the first process's `number`, which the others wait for."""
        if self.count == 1:
            return number
        said = torch.tensor([number], dtype=torch.int64, device=self.device)
        torch.distributed.broadcast(said, 0)
        return int(said)

    def wait(self) -> None:
        """Returns when every process has come here."""
        self.of_first(0)

    def end(self) -> None:
        """Takes leave of the other processes when all are done, so that none finds the connection cut."""
        self.wait()
        if self.count > 1 and self.is_own:
            torch.distributed.destroy_process_group()

    def add_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Gives each parameter the mean over all processes of its gradients; one that none of them has stays None.

        Gradients of spread parameters are left alone: they come as the mean already.
        """
        if self.count == 1:
            return
        groups: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters.values():
            if not is_spread(parameter):
                groups.setdefault(parameter.dtype, []).append(parameter)
        for group in groups.values():
            for bucket in _buckets(group):
                self._add_bucket(bucket)

    def _add_bucket(self, bucket: list[nn.Parameter]) -> None:
        """Averages the gradients of `bucket`, and tells by a number for each of them whether any process has one."""
        has_one = torch.tensor([float(one.grad is not None) for one in bucket]).to(bucket[0])
        flat = [one.grad.reshape(-1) if one.grad is not None else one.new_zeros(one.numel()) for one in bucket]
        together = torch.cat([has_one, *flat])
        torch.distributed.all_reduce(together)
        has_one, rest = together.split([len(bucket), len(together) - len(bucket)])
        means = rest.div_(self.count).split([one.numel() for one in bucket])
        for parameter, mean, count in zip(bucket, means, has_one.tolist(), strict=True):
            parameter.grad = mean.view_as(parameter) if count else None


def alone(device: torch.device) -> Processes:
    """Returns this process as one without others."""
    return Processes(Place(), device)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        bucket.append(parameter)
        if sum(one.numel() for one in bucket) >= BUCKET_SIZE:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def begin(section: DistributedSection, precision: str, device: torch.device) -> tuple[Accelerator, Processes]:
    """Returns Accelerate's part of a run, which knows device and precision, and the run's processes, all there.

    Args:
        section: The recipe's distributed section.
        precision: `no`, `bf16` or `fp16`.
        device: What one process would compute on; with several, each takes the one of its local number.

    Raises:
        HostError: The launcher has started other processes than the recipe asks for.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    place = processes.here()
    _require_as_asked(section, place)
    threads = processes.cpu_threads(place) if device.type == "cpu" else None
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for what is imported later
        torch.set_num_threads(threads)
    if device.type == "cuda":
        _take_device(device, place)
    is_own = not (torch.distributed.is_available() and torch.distributed.is_initialized())  # Ray comes connected
    handlers = [InitProcessGroupKwargs(timeout=timedelta(seconds=section.timeout))]
    accelerator = Accelerator(mixed_precision=precision, cpu=device.type == "cpu", kwargs_handlers=handlers)
    found = int(accelerator.num_processes)
    if found != place.count or int(accelerator.process_index) != place.rank:
        raise HostError(
            f"{place.count} processes were started and Accelerate runs {found}: each would train alone",
            hint="unset the ACCELERATE_* variables of the environment, or start with torchrun",
        )
    if place.count == 1:
        return accelerator, Processes(place, device)
    return accelerator, Processes(place, accelerator.device, str(torch.distributed.get_backend()), is_own)


def _take_device(device: torch.device, place: Place) -> None:
    """Makes this process's GPU the current one, by which libraries go and memory is counted.

    Raises:
        HostError: There are more processes than GPUs.
    """
    named: int | None = device.index  # None for the kind alone, whatever torch's own annotation says
    index, count = place.local_rank if place.count > 1 else named, torch.cuda.device_count()
    if index is None:
        return
    if place.count > 1 and count == 1:
        index = 0  # schedulers may show each process its own GPU alone
    if index >= count:
        raise HostError(
            f"{place.local_count} processes were started on this machine, which has {count} CUDA devices",
            hint="set distributed.num_processes to auto, or see CUDA_VISIBLE_DEVICES",
        )
    torch.cuda.set_device(index)


def _require_as_asked(section: DistributedSection, place: Place) -> None:
    """Raises a HostError where the processes that were started are not those that the recipe asks for."""
    for name in processes.foreign_settings():
        raise HostError(
            f"{name} is set: Accelerate would spread the model by itself, as no recipe says",
            hint="set distributed.strategy in the recipe, and start with torchrun or `accelerate launch --multi_gpu`",
        )
    asked = section.num_processes
    if asked not in ("auto", place.local_count):
        raise HostError(
            f"distributed.num_processes: {asked} were asked for, and {place.local_count} were started on this machine",
            hint="change one of them; without a launcher, peftcli starts as many as the recipe says",
        )
    if section.strategy not in ("auto", "ddp") and place.count == 1:
        raise HostError(
            f"distributed.strategy: {section.strategy} spreads a model over processes, and this run has one",
            hint="start several with --num-processes N, or set distributed.strategy to auto",
        )


@contextlib.contextmanager
def losses_explained(timeout: int) -> Iterator[None]:
    """Turns the many errors of a broken connection into one that says what it means, where there are connections.

    Raises:
        PeerLostError: Another process has ended.
        HostError: Another process has not answered for `timeout` seconds.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            raise
        if _SILENT.search(said):
            raise HostError(
                f"another process of this run has not answered for {timeout} seconds",
                hint="it hangs, or is very slow: see its output; or raise distributed.timeout",
            ) from error
        if _LOST.search(said):
            raise PeerLostError("another process of this run has ended") from error
        raise


def circumstances(group: Processes) -> dict[str, Any]:
    """Returns what decides how results are rounded: on a CPU, the same of these give the same bits.

    A GPU adds some sums in any order, so there they give the same only to within rounding, as other circumstances do.
    """
    device = group.device
    if device.type == "cpu":
        where = {"device": f"cpu, {torch.backends.cpu.get_cpu_capability()}", "threads": torch.get_num_threads()}
    else:
        where = {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}
    versions = {package: version(package) for package in ("torch", "transformers")}
    return {**where, "processes": group.count, **versions}


def facts(group: Processes) -> dict[str, Any]:
    """Returns what a run's manifest says of its processes."""
    computed_on = {**circumstances(group), "same_bits": group.device.type == "cpu"}
    return {"processes": group.count, "backend": group.backend, "computed_on": computed_on}
