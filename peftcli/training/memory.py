"""What a run's memory goes to, what to say when it runs out, and how many samples fit at once.

A GPU is asked by trying: a forward and a backward pass of the longest samples, with room held for the optimizer's
moments. On a CPU, where asking for too much ends the process, what the backward pass keeps of one sample is measured
and multiplied.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from peftcli import quantization
from peftcli.errors import HostError

if TYPE_CHECKING:
    from peftcli.recipe import TrainingSection
    from peftcli.recipe.schema import QuantizationSection
    from peftcli.training.distributed import Processes

PASSES = 2.0
"""What a step on a CPU takes by what its backward pass keeps: gradients and temporaries come on top."""
PASSES_RECOMPUTED = 8.0
"""The same where activations are recomputed: each layer keeps its input, and one at a time some fifteen times that."""
USABLE = 0.9
"""Share of the available memory that is counted on."""
SPARE = 0.03
"""Share of a GPU's memory that a trial leaves alone: blocks that are free may still be in pieces."""

_MOMENT_BYTES = {"adamw": 8, "sgd": 0, "adafactor": 0, "adamw_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1}
_BITS = {
    ("nf4", False): 4.5,
    ("nf4", True): 4.127,
    ("fp4", False): 4.5,
    ("fp4", True): 4.127,
    ("int8", False): 8.0,
}
"""Bits of a packed weight with its share of the scales, by type and double quantisation."""
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Held:
    """Bytes that a run holds from its first step to its last.

    Attributes:
        base: The frozen weights, as they are stored.
        trained: What trains, with its gradients and the optimizer's moments.
    """

    base: int
    trained: int

    def __str__(self) -> str:
        """Returns both in words."""
        return f"base weights {in_gb(self.base)}; what trains, its gradients and moments {in_gb(self.trained)}"


def held(model: nn.Module, settings: TrainingSection) -> Held:
    """Returns what `model` and its optimizer take."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    everything = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    weights = sum(parameter.nbytes for parameter in trained)
    return Held(everything - weights, 2 * weights + _moment_bytes(trained, settings.optim))


def expected(
    model: nn.Module,
    settings: TrainingSection,
    dtype: torch.dtype,
    section: QuantizationSection | None,
    packed: Collection[str],
) -> Held:
    """Returns what an adapted model on the meta device will take.

    Args:
        model: The model.
        settings: The recipe's training section.
        dtype: That of its dense weights.
        section: How layers are packed; None where none is.
        packed: The paths of the layers that are.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    in_packed = sum(model.get_parameter(f"{path}.weight").numel() for path in packed)
    dense = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad) - in_packed
    bits = 0.0 if section is None else _BITS[section.type, section.double_quant and section.type != "int8"]
    weights = sum(4 * parameter.numel() for parameter in trained)  # what trains is held in float32
    base = int(dense * dtype.itemsize + in_packed * bits / 8) + sum(buffer.nbytes for buffer in model.buffers())
    return Held(base, 2 * weights + _moment_bytes(trained, settings.optim))


def _moment_bytes(trained: Iterable[nn.Parameter], optim: str) -> int:
    return sum(parameter.numel() for parameter in trained) * _MOMENT_BYTES.get(optim, 8)


def in_gb(num_bytes: float) -> str:
    """Returns `1.23 GB`, with megabytes below a tenth of one."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


# ---- when it runs out ----


def ran_out(error: BaseException) -> bool:
    """Returns whether `error` says that a device, or the machine, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


@contextlib.contextmanager
def explained(model: nn.Module, settings: TrainingSection, device: torch.device, longest: int) -> Iterator[None]:
    """Turns running out of memory into a HostError that says where it went and what to change.

    Args:
        model: The adapted model.
        settings: The recipe's training section, with numbers for the batch.
        device: Where it computes.
        longest: Tokens of the longest sample; 0 where there are none.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        parts, size = held(model, settings), settings.micro_batch_size
        total = in_gb(total_bytes(device))
        tokens = f" of up to {longest:,} tokens" if longest else ""
        raise HostError(
            f"out of memory on {device}, which has {total}: {parts}; the rest went to the activations of "
            f"{size} example{'s' if size > 1 else ''}{tokens} at once",
            hint="; or ".join(_remedies(model, settings, parts, longest)),
        ) from error


@contextlib.contextmanager
def loading_explained(name: str, dtype: str, device: torch.device, *, packed: bool) -> Iterator[None]:
    """Turns running out of memory while a base model is loaded into a HostError that says what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        remedies = [] if packed else ["quantization.type=nf4, for about 0.5 bytes a weight"]
        remedies += ["model.dtype=bfloat16, for 2 bytes a weight"] if dtype == "float32" else []
        remedies.append("distributed.strategy=fsdp2 with several processes, each of which holds a share")
        raise HostError(
            f"out of memory while {name} was loaded in {dtype} onto {device}, which has {in_gb(total_bytes(device))}",
            hint="; or ".join(remedies),
        ) from error


def _remedies(model: nn.Module, settings: TrainingSection, parts: Held, longest: int) -> Iterator[str]:
    """Yields what could be changed, what changes least of the training first."""
    size, rounds = settings.micro_batch_size, settings.gradient_accumulation_steps
    if size > 1:
        yield (
            f"training.per_device_train_batch_size={size // 2} "
            f"training.gradient_accumulation_steps={-(-size * rounds // (size // 2))}, which trains the same "
            "(or per_device_train_batch_size=auto, which finds what fits)"
        )
    if not settings.gradient_checkpointing:
        yield "training.gradient_checkpointing=true, for about a third more time"
    if not quantization.packed_share(model):
        yield f"quantization.type=nf4, of whose base weights a quarter or less of {in_gb(parts.base)} is left"
    if parts.trained > parts.base / 4 and not settings.optim.endswith("8bit"):
        yield "training.optim=adamw_8bit, whose moments take a quarter"
    if longest:
        yield f"data.max_length below {longest:,}"


def total_bytes(device: torch.device) -> int:
    """Returns how much memory `device` has, or this process may have of the machine's."""
    import psutil

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return min(int(psutil.virtual_memory().total), _cgroup("memory.max") or 2**63)


def available_bytes() -> int:
    """Returns how much of the machine's memory a process can still get, within its control group's limit."""
    import psutil

    limit = _cgroup("memory.max")
    left = limit - (_cgroup("memory.current") or 0) if limit else 2**63
    return min(int(psutil.virtual_memory().available), left)


def _cgroup(name: str) -> int | None:
    """Returns a number of this process's control group (version 2), or None where there is no limit."""
    with contextlib.suppress(OSError, ValueError):
        return int((_CGROUP / name).read_text(encoding="ascii"))
    return None


# ---- how much fits ----


def batch_size_that_fits(
    model: nn.Module,
    settings: TrainingSection,
    run: Callable[[int], Tensor],
    num_samples: int,
    processes: Processes,
) -> int:
    """Returns the largest batch, of those that divide a step, whose forward and backward pass fits for every process.

    Leaves no gradient behind. No process may wait for another within a pass.

    Args:
        model: The adapted model, ready to train.
        settings: The recipe's training section, which asks for `auto`.
        run: Returns the loss of as many of the longest samples as it is given.
        num_samples: How many samples there are.
        processes: Those that take part; the smallest answer counts.

    Raises:
        HostError: Not even one sample fits.
    """
    step = settings.micro_batch_size * settings.gradient_accumulation_steps
    sizes = [size for size in range(min(step, max(num_samples, 1)), 0, -1) if step % size == 0]
    parts = held(model, settings)
    if processes.device.type == "cuda":
        fits = _fits_a_gpu(model, run, parts.trained, processes.device)
    else:
        fits = _fits_a_cpu(model, run, PASSES_RECOMPUTED if settings.gradient_checkpointing else PASSES)
    for size in sizes:
        if processes.sums(not fits(size))[0] == 0:
            return size
    alone = settings.model_copy(update={"per_device_train_batch_size": 1})
    raise HostError(
        f"training.per_device_train_batch_size: auto: not even one example fits beside what is in the "
        f"{in_gb(total_bytes(processes.device))} of {processes.device} ({parts})",
        hint="; or ".join(_remedies(model, alone, parts, 0)),
    )


def _fits_a_gpu(
    model: nn.Module, run: Callable[[int], Tensor], moments: int, device: torch.device
) -> Callable[[int], bool]:
    """Returns what tries a size on `device`, with as much held back as the optimizer will need."""
    held_back = moments + int(SPARE * total_bytes(device))

    def fits(size: int) -> bool:
        try:
            ballast = torch.empty(held_back, dtype=torch.uint8, device=device)
            run(size).backward()
            del ballast
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return True

    return fits


def _fits_a_cpu(model: nn.Module, run: Callable[[int], Tensor], passes: float) -> Callable[[int], bool]:
    """Returns what reckons whether a size fits, by what one sample's backward pass keeps."""
    processes = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    available = USABLE * available_bytes() / processes
    one = passes * kept_bytes(model, run)
    return lambda size: size * one <= available


def kept_bytes(model: nn.Module, run: Callable[[int], Tensor]) -> int:
    """Returns how much the backward pass of one sample keeps, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []  # until all is counted: an address may serve twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive.append(storage)
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        run(1)
    return sum(kept.values())
