"""Checkpoints: all that an exact resume needs, and nothing of the frozen base.

    checkpoint-500/
      adapter_model.safetensors  adapter_config.json    # an adapter like any other: PEFT loads it
      optimizer.safetensors                             # the optimizer's tensors, by parameter; the method's own state
      state.json                                        # position, best evaluation, sha256 of all files and itself

Data order, dropout and the learning rate are functions of the step, so none of them is stored. A folder becomes
visible only when it is complete, and `state.json` makes every damaged byte visible.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peftcli import files, inject, sharding
from peftcli.checkpoint import adapter as adapter_files
from peftcli.errors import ModelError

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
METHOD_STATE = "state"
OWN_DIGEST = "state_sha256"
FORMAT = 1
_RESUME_HINT = "resume with the run's own recipe, and the versions in its manifest.json"


@dataclass
class Progress:
    """Where a run is. The loop changes it; a checkpoint keeps it.

    Attributes:
        step: Optimizer steps done.
        tokens: Supervised tokens learned from so far.
        best_loss: The lowest evaluation loss so far; None before the first evaluation.
        best_step: The step of that evaluation.
        evaluations_since_best: Evaluations since then without a lower loss.
        loss_scale: The gradient scaler's state, where fp16 has one.
        data: The fingerprint of the training samples.
        samples_per_step: Training samples of one optimizer step, over all processes.
    """

    step: int = 0
    tokens: int = 0
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    loss_scale: dict[str, Any] | None = None
    data: str = ""
    samples_per_step: int = 0


def folder_of(run: Path, step: int) -> Path:
    """Returns where the checkpoint of `step` lies."""
    return run / f"checkpoint-{step}"


def save_checkpoint(
    run: Path,
    progress: Progress,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    origin: adapter_files.Origin,
    *,
    writes: bool = True,
) -> Path:
    """Writes the checkpoint of the present step and returns its folder.

    With several processes each must call it, since what is spread over them is put together, and one of them `writes`.
    """
    target = folder_of(run, progress.step)
    adapter = adapter_files.contents(model, origin, resumable=True)
    optimizer_state = optimizer_tensors(model, optimizer)
    if not writes:
        return target
    with files.new_folder(target) as folder:
        adapter_files.write_contents(folder, adapter)
        files.write_safetensors(folder / OPTIMIZER_FILE, optimizer_state)
        digests = {file.name: files.sha256(file) for file in sorted(folder.iterdir())}
        state = {"format": FORMAT, "progress": asdict(progress), "sha256": digests}
        files.write_json(folder / STATE_FILE, {**state, OWN_DIGEST: _digest(state)})
    return target


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Puts the checkpoint in `folder`, which `newest_checkpoint` found whole, into `model` and `optimizer`."""
    weights, moments = folder / adapter_files.WEIGHTS_FILE, folder / OPTIMIZER_FILE
    progress = read_progress(folder)
    adapter_files.load_tensors(model, load_file(weights), str(weights))
    # Too large a loss scale skips steps: at such a start the optimizer has done none yet.
    load_optimizer_tensors(model, optimizer, load_file(moments), str(moments), may_be_new=bool(progress.loss_scale))
    return progress


def checkpoints(run: Path) -> dict[int, Path]:
    """Returns the run's checkpoint folders by step, oldest first."""
    matches = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in run.glob("checkpoint-*"))
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest checkpoint that is whole, or None, and a sentence on each newer one that is not.

    A damaged checkpoint is renamed to `*.damaged` and kept: it is evidence, and it must not be chosen again.
    """
    remarks: list[str] = []
    for path in reversed(checkpoints(run).values()):
        damage = _damage(path)
        if damage is None:
            return path, remarks
        aside = path.with_name(path.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        remarks.append(f"{path.name} is damaged ({damage}) and was set aside as {aside.name}")
    return None, remarks


def read_progress(folder: Path) -> Progress:
    """Returns where the run was when it saved the checkpoint in `folder`, which `newest_checkpoint` found whole."""
    return Progress(**_read_state(folder)["progress"])


def _read_state(folder: Path) -> dict[str, Any]:
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    assert isinstance(state, dict)
    return state


def _digest(state: dict[str, Any]) -> str:
    """Returns the sha256 of what `state.json` says beside this digest."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _damage(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint's files, or None where all are what was written."""
    try:
        state = _read_state(folder)
        if state["format"] != FORMAT:
            return f"its format is {state['format']}, this version reads {FORMAT}"
        if state.pop(OWN_DIGEST) != _digest(state):
            return f"{STATE_FILE} has changed since it was written"
        Progress(**state["progress"])
        for name, digest in state["sha256"].items():
            if files.sha256(folder / name) != digest:
                return f"{name} has changed since it was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        return f"{STATE_FILE} cannot be read"
    return None


def rotate(run: Path, limit: int | None, keep: set[int]) -> None:
    """Removes the oldest checkpoints beyond `limit`, but never the newest and never those of the steps in `keep`."""
    found = checkpoints(run)
    removable = [step for step in found if step not in keep]
    for step in removable[: max(0, len(removable) - limit)] if limit else ():
        shutil.rmtree(found[step])


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns the optimizer's state as `<parameter>|<entry>` → tensor, and the method's as `<name>|state`.

    No two of them share memory: bitsandbytes has one table of 8-bit values for all parameters, and safetensors
    refuses such tensors.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for parameter, state in optimizer.state.items():
        for entry, value in _entries(state).items():
            tensor = sharding.whole(torch.as_tensor(value))
            found[f"{names[parameter]}|{entry}"] = tensor.clone() if tensor.data_ptr() in taken else tensor
            taken.add(tensor.data_ptr())
    return found | {f"{name}|{METHOD_STATE}": tensor.detach() for name, tensor in method_state(model).items()}


def _entries(state: dict[str, Any]) -> dict[str, Any]:
    """Returns what an optimizer keeps for one parameter; SGD without momentum has an entry for it that is None."""
    return {entry: value for entry, value in state.items() if value is not None}


def method_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns what adapters need to go on training and do not save with themselves, by name in the model.

    That is their persistent buffers, such as AdaLoRA's averages, and parameters behind the saved ones, such as the
    network that makes a reparametrised prefix.
    """
    found = {}
    for path, part in inject.parts(model).items():
        saved = {tensor.data_ptr() for tensor in part.peft_tensors().values()}
        for name, tensor in part.state_dict(keep_vars=True).items():
            if tensor.data_ptr() not in saved:
                found[f"{path}.{name}"] = tensor
    return found


def load_optimizer_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    where: str,
    *,
    may_be_new: bool = False,
) -> None:
    """Puts back what `optimizer_tensors` returned.

    Args:
        model: The model.
        optimizer: An optimizer like the one that the tensors are from, over the same parameters.
        tensors: The tensors.
        where: The file that they are from, for messages.
        may_be_new: Whether there may be none of the optimizer's: it is then left as it is.

    Raises:
        ModelError: A tensor belongs to no parameter that trains, one is missing, or one is not of the kind that
            this optimizer keeps.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    own_state = method_state(model)
    found: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for key, tensor in tensors.items():
        name, _, entry = key.partition("|")
        if entry == METHOD_STATE and name in own_state:
            with torch.no_grad():
                own_state.pop(name).copy_(tensor)
        elif name in parameters:
            found[name][entry] = tensor
        else:
            raise ModelError(f"{where}: {name} is not a parameter that trains", hint=_RESUME_HINT)
    if own_state:
        raise ModelError(f"{where}: {next(iter(own_state))} is missing", hint=_RESUME_HINT)
    if may_be_new and not any(found.values()):
        return
    names = {parameter: name for name, parameter in parameters.items()}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            name = names[parameter]
            kept = _filled(_fresh_state(optimizer, group_index, index), found[name], f"{where}: {name}")
            if kept:  # SGD keeps nothing
                optimizer.state[parameter] = kept


def _fresh_state(optimizer: torch.optim.Optimizer, group_index: int, index: int) -> dict[str, Any]:
    """Returns the state that `optimizer` starts with for one of its parameters: right entries, shapes and places.

    torch's optimizers make theirs within a step, so one is done on a stand-in of zeros. bitsandbytes' have a function
    for it, whose pages only the optimizer itself may ask for.
    """
    group = optimizer.param_groups[group_index]
    parameter = group["params"][index]
    if hasattr(optimizer, "init_state"):
        optimizer.init_state(group, parameter, group_index, index)
        return _entries(optimizer.state[parameter])
    stand_in = nn.Parameter(torch.zeros_like(parameter))
    stand_in.grad = torch.zeros_like(stand_in)
    probe = type(optimizer)([{**group, "params": [stand_in]}])  # type: ignore[call-arg]  # the base class asks for more
    probe.step()
    return _entries(probe.state[stand_in])


def _filled(fresh: dict[str, Any], tensors: dict[str, Tensor], where: str) -> dict[str, Any]:
    """Returns `fresh` with the values of `tensors` in it.

    Raises:
        ModelError: They are not the same entries, of the same shapes and dtypes.
    """
    if fresh.keys() != tensors.keys():
        odd = sorted(fresh.keys() ^ tensors.keys())
        fault = "is missing" if odd[0] in fresh else "is not what this optimizer keeps"
        raise ModelError(f"{where}: the optimizer's {odd[0]} {fault}", hint=_RESUME_HINT)
    for entry, tensor in tensors.items():
        kept = torch.as_tensor(fresh[entry])
        if (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            theirs, ours = (f"{one.dtype} {list(one.shape)}" for one in (tensor, kept))
            raise ModelError(f"{where}: the optimizer's {entry} is {theirs}, not {ours}", hint=_RESUME_HINT)
        if isinstance(fresh[entry], Tensor):
            kept.copy_(sharding.like(tensor, kept))
        else:  # bitsandbytes counts its steps in a plain number
            fresh[entry] = tensor.item()
    return fresh
