"""What every run checks of itself: each costs next to nothing and catches a run that would be for naught."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcli import sharding
from peftcli.data.collation import Batch
from peftcli.errors import HostError, ModelError, NumericalError
from peftcli.quantization import is_int8
from peftcli.targets import output_head
from peftcli.training import loss
from peftcli.training.head import Finish, head_sees, possible_finishes

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from peftcli.training.distributed import Processes

LAYOUT_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
"""How far logits may differ between layouts, relative to the largest: rounding, but not a leak between samples."""
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""How far the same few operations on the same numbers may differ, relative to the largest; 1e-5 where not named."""
LARGE = 30.0
"""What hidden states are multiplied with so that a cap on logits shows, whatever their size."""


def something_trains(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises a ModelError where no parameter trains, or one that trains is held in half precision."""
    if not parameters:
        raise ModelError("nothing would train: the method added no trainable parameter")
    half = [name for name, parameter in parameters.items() if parameter.dtype in (torch.float16, torch.bfloat16)]
    if half:
        raise ModelError(f"{half[0]} trains in {parameters[half[0]].dtype}: small updates would be rounded away")


def gradients_arrived(parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises a NumericalError where a trainable parameter got no gradient at all, naming up to five.

    Meant for the first step's backward pass.
    """
    without = [name for name, parameter in parameters.items() if parameter.grad is None]
    if without:
        raise NumericalError(
            f"{len(without)} of {len(parameters)} trainable tensors got no gradient: {', '.join(without[:5])}",
            hint="the adapted modules are not part of the forward pass; choose others with method.target_modules",
        )


def not_finite(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Returns the trainable parameters whose gradient holds a value that is not finite."""
    return [
        name
        for name, parameter in parameters.items()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    ]


def poisoned(model: nn.Module) -> str | None:
    """Returns the first parameter of `model` that holds a value that is not finite; None where all are."""
    parameter: Any
    for name, parameter in model.named_parameters():
        held = (parameter.to_local() if sharding.is_spread(parameter) else parameter).detach()
        if held.is_floating_point() and not bool(torch.isfinite(held).all()):
            return name if parameter.requires_grad else f"the base model's {name}"
    return None


def what_runs(accelerator: Accelerator, group: Processes, precision: str) -> None:
    """Raises a HostError where what is about to run is not what was asked for.

    Accelerate, on a device or in an environment that it does not expect, goes on in float32, on one process or without
    a loss scale, and says nothing.
    """
    kind = group.device.type
    with accelerator.autocast():
        runs = str(torch.get_autocast_dtype(kind)).removeprefix("torch.") if torch.is_autocast_enabled(kind) else "no"
    asked = {"no": "no", "bf16": "bfloat16", "fp16": "float16"}[precision]
    if runs != asked:
        raise HostError(
            f"training.mixed_precision: {precision} was asked for, and {kind} computes with {runs}",
            hint="set training.mixed_precision to no, or to auto",
        )
    if (accelerator.scaler is not None) != (precision == "fp16"):
        raise HostError("training.mixed_precision: fp16 and only fp16 needs a loss scale", hint="set it to auto")
    started = torch.distributed.get_world_size() if group.backend is not None else 1
    if started != group.count:
        raise HostError(f"{group.count} processes were started, and {started} are connected")


def all_are_alike(group: Processes, samples: str, model: nn.Module) -> None:
    """Raises a HostError where the processes have read other data or another base: each would pull its own way.

    Args:
        group: The processes.
        samples: The fingerprint of the training samples.
        model: The base with its adapters, not yet spread.
    """
    if group.count == 1:
        return
    for what, text in (("training data", samples), ("model", fingerprint(model))):
        if not group.alike(text):
            raise HostError(
                f"the {what} of this run is not the same for all its processes",
                hint="every machine must read the same files; for a hub id, set the revision to a commit",
            )


def fingerprint(model: nn.Module) -> str:
    """Returns a digest of a few numbers of each parameter of `model`: enough to tell one checkpoint from another."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:16].cpu().contiguous()
        digest.update(f"{name} {list(parameter.shape)} {some.tolist()}".encode())
    return digest.hexdigest()


def what_is_spread(model: nn.Module) -> str:
    """Returns a sentence on how much of `model` lies on this process after it was spread.

    Raises:
        HostError: Nothing was spread.
    """
    count, size = sharding.shares(model)
    if not count:
        raise HostError("distributed.strategy: fsdp2 has spread no parameter", hint="set it to ddp")
    kept = sum(one.nbytes for one in model.parameters() if not sharding.is_spread(one))
    return (
        f"fsdp2: {count} tensors are spread, {size / 1e6:,.1f} MB of them on each process; {kept / 1e6:,.1f} MB are not"
    )


@torch.no_grad()
def joins_exactly(model: PreTrainedModel, rows: int = 1) -> bool:
    """Returns whether `model` gives two short sequences, joined in each of `rows`, the logits that each gets alone.

    This is what padding-free batches rely on. It fails for models whose layers mix neighbours without a mask
    (recurrent or convolutional ones) or that ignore `position_ids`.
    """
    embedding: Any = model.get_input_embeddings()
    vocabulary, device = embedding.weight.shape[0], embedding.weight.device
    first, second = (torch.arange(n, device=device)[None] * 7 % vocabulary for n in (5, 4))
    positions = torch.cat([torch.arange(5, device=device), torch.arange(4, device=device)])[None]
    was_training = model.training
    model.eval()
    try:
        both = torch.cat([first, second], 1).expand(rows, -1)
        joined = model(input_ids=both, position_ids=positions.expand(rows, -1), use_cache=False).logits
        apart = torch.cat([model(input_ids=ids, use_cache=False).logits for ids in (first, second)], 1)
    except (TypeError, ValueError):
        return False
    finally:
        model.train(was_training)
    # int8 finds outliers in all rows of a pass together, so that what is joined to a sample changes its rounding.
    rounded = any(is_int8(module) for module in model.modules())
    tolerance = LAYOUT_TOLERANCE[torch.bfloat16] if rounded else LAYOUT_TOLERANCE.get(joined.dtype, 1e-3)
    return bool((joined - apart).abs().max() <= tolerance * apart.abs().max())


@torch.no_grad()
def finish_of(model: PreTrainedModel) -> Finish | None:
    """Returns what `model`, without adapters, does to its head's logits; None where that is nothing known.

    Tried on nine tokens: once with hidden states that are large enough for any cap to show, to compare what the head
    returns with what the model does, and once to compare the loss that is computed from it with the plain one.
    """
    was_training = model.training
    model.eval()
    try:
        found = _finish_tried(model)
        return found if found is None or _scores_alike(model, found) else None
    except (TypeError, ValueError, RuntimeError):  # a model that cannot be asked so
        return None
    finally:
        model.train(was_training)


def _finish_tried(model: Any) -> Finish | None:
    """Returns the finish that comes nearest to turning the head's logits into the model's; None where none does."""
    head = output_head(model)
    if head is None:
        return None
    of_head: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, given, z: of_head.append(z))
    batch, inputs = _trial(model)
    try:
        with head_sees(model, lambda _, hidden: torch.cat([hidden, LARGE * hidden], dim=1)):
            logits = loss.logits_of(model, batch, use_cache=False, **inputs)
    finally:
        handle.remove()
    (z,) = of_head
    if z.shape != logits.shape:
        return None
    nearest = min(possible_finishes(model.config), key=lambda one: float((one(z) - logits).abs().max()))
    return nearest if _alike(nearest(z), logits) else None


def _scores_alike(model: Any, finish: Finish) -> bool:
    """Returns whether the loss by `finish` is that of the model's own logits."""
    batch, inputs = _trial(model)
    score = loss.score_answers if inputs else loss.score
    ours, theirs = (score(model, batch, finish=one).loss for one in (finish, None))
    return _alike(ours, theirs)


def _trial(model: Any) -> tuple[Batch, dict[str, Tensor]]:
    """Returns a short batch, and what the decoder gets where the model has an encoder as well."""
    embedding = model.get_input_embeddings()
    ids = torch.arange(9, device=embedding.weight.device)[None] * 7 % embedding.weight.shape[0]
    batch = Batch(ids, ids, torch.ones_like(ids), None, num_tokens=9, num_supervised=8)
    return batch, {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}


def _alike(ours: Tensor, theirs: Tensor) -> bool:
    """Returns whether two tensors differ by no more than rounding."""
    tolerance = ROUNDING.get(ours.dtype, 1e-5)
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())
