"""Checkpoints: all that an exact resume needs, and nothing of the frozen base.

    checkpoint-500/
      adapter_model.safetensors  adapter_config.json    # an adapter like any other: PEFT loads it
      optimizer.safetensors                             # the optimizer's tensors, by parameter; the method's own state
      state.json                                        # position, best evaluation, sha256 of all files and itself

Data order, dropout and the learning rate are functions of the step, so none of them is stored. A folder becomes
visible only when it is complete, and `state.json` makes every damaged byte visible.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcli import files
from peftcli.checkpoint import adapter as adapter_files
from peftcli.checkpoint import moments
from peftcli.checkpoint.seal import SEAL_FILE
from peftcli.errors import ModelError

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
HELD_FILES = {adapter_files.CONFIG_FILE, adapter_files.WEIGHTS_FILE, SEAL_FILE, OPTIMIZER_FILE}
OWN_DIGEST = "state_sha256"
FORMAT = 1
DAMAGED_SUFFIX = ".damaged"


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
        meter: What the next log will average: the sums of the steps since the last one.
        computed_on: What decided how the last steps were rounded.
    """

    step: int = 0
    tokens: int = 0
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    loss_scale: dict[str, Any] | None = None
    data: str = ""
    samples_per_step: int = 0
    meter: dict[str, Any] | None = None
    computed_on: dict[str, Any] = field(default_factory=dict)


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
    optimizer_state = moments.optimizer_tensors(model, optimizer)
    adapter_files.require_sound(optimizer_state, "the optimizer's state")
    return write(run, progress, adapter, optimizer_state) if writes else target


def write(
    run: Path, progress: Progress, adapter: adapter_files.Contents, optimizer_state: dict[str, torch.Tensor]
) -> Path:
    """Writes a checkpoint of these contents, all of it or nothing, and returns its folder."""
    target = folder_of(run, progress.step)
    with files.new_folder(target) as folder:
        adapter_files.write_contents(folder, adapter)
        files.write_safetensors(folder / OPTIMIZER_FILE, optimizer_state)
        digests = {file.name: files.sha256(file) for file in sorted(folder.iterdir())}
        state = {"format": FORMAT, "progress": asdict(progress), "sha256": digests}
        files.write_json(folder / STATE_FILE, {**state, OWN_DIGEST: files.json_sha256(state)})
    return target


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
    """Puts the checkpoint in `folder` into `model` and `optimizer`.

    Raises:
        ModelError: It is damaged, or not of this model and optimizer.
    """
    damage = _damage(folder)
    if damage is not None:
        raise ModelError(
            f"{folder} is damaged ({damage})",
            hint="--resume takes the newest whole one; where it is the best: training.load_best_at_end=false",
        )
    weights, states = folder / adapter_files.WEIGHTS_FILE, folder / OPTIMIZER_FILE
    progress = read_progress(folder)
    adapter_files.load_tensors(model, adapter_files.read_tensors(weights), str(weights))
    # Too large a loss scale skips steps: at such a start the optimizer has done none yet.
    moments.load_optimizer_tensors(
        model, optimizer, adapter_files.read_tensors(states), str(states), may_be_new=bool(progress.loss_scale)
    )
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
        aside = files.set_aside(path, DAMAGED_SUFFIX)
        remarks.append(f"{path.name} is damaged ({damage}) and was set aside as {aside.name}")
    return None, remarks


def read_progress(folder: Path) -> Progress:
    """Returns where the run was when it saved the checkpoint in `folder`, which `newest_checkpoint` found whole."""
    return Progress(**_read_state(folder)["progress"])


def _read_state(folder: Path) -> dict[str, Any]:
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    assert isinstance(state, dict)
    return state


def _damage(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint's files, or None where all are what was written."""
    try:
        return _fault(folder, _read_state(folder))
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AssertionError, RecursionError):
        return f"{STATE_FILE} cannot be read"


def _fault(folder: Path, state: dict[str, Any]) -> str | None:
    """Returns how a checkpoint's files differ from what `state` says; raises where that says nothing."""
    if state["format"] != FORMAT:
        return f"its format is {state['format']}, this version reads {FORMAT}"
    if (folder / STATE_FILE).read_bytes() != files.json_text(state).encode():  # another spelling of the same numbers
        return f"{STATE_FILE} has changed since it was written"
    if state.pop(OWN_DIGEST) != files.json_sha256(state):
        return f"{STATE_FILE} has changed since it was written"
    if set(state["sha256"]) != HELD_FILES:
        return f"{STATE_FILE} names other files than a checkpoint has"
    step = Progress(**state["progress"]).step
    if folder != folder_of(folder.parent, step):
        return f"it is that of step {step}"
    changed = (name for name, digest in state["sha256"].items() if files.sha256(folder / name) != digest)
    return next((f"{name} has changed since it was written" for name in changed), None)


def rotate(run: Path, limit: int | None, keep: set[int]) -> None:
    """Removes the oldest checkpoints beyond `limit`, but never the newest and never those of the steps in `keep`.

    Where the best one is among these, so is that of every older checkpoint that stays: were the newest damaged, the
    run would go on from there, and end with the best that it knew then.
    """
    found = checkpoints(run)
    removable = [step for step in found if step not in keep]
    gone = removable[: max(0, len(removable) - limit)] if limit else []
    spared = {_best_step(path) for step, path in found.items() if step not in gone} if keep else set()
    for step in gone:
        if step not in spared:
            files.remove_folder(found[step])


def _best_step(folder: Path) -> int | None:
    """Returns the best step that a checkpoint knows of; None where it cannot be read."""
    try:
        return read_progress(folder).best_step
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        return None
