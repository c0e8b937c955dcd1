"""A run's folder before it begins: whether it may be used, and which checkpoint there all processes go on from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from peftcli import files, locks, manifest, recipe
from peftcli.checkpoint import state
from peftcli.errors import HostError, ModelError, RecipeError
from peftcli.recipe import LoadedRecipe, Recipe, TrainingSection
from peftcli.reporting import Reporter
from peftcli.run import RECIPE_FILE

if TYPE_CHECKING:
    from peftcli.training.distributed import Processes


@dataclass(frozen=True)
class TrainOptions:
    """How a run is started, beside its recipe."""

    device: str | None = None
    resume: bool = False
    overwrite: bool = False


@contextlib.contextmanager
def open_folder(folder: Path, options: TrainOptions) -> Iterator[None]:
    """Holds the run's folder for this process while entered.

    Raises:
        HostError: It cannot be written, is in use, or holds a run that was neither to be resumed nor replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise HostError(f"output_dir: {folder} is a file", hint="choose another folder with output_dir=DIR")
    taken = folder.is_dir() and any(_is_taken_by(path) for path in folder.iterdir())
    if taken and not (options.resume or options.overwrite):
        raise HostError(
            f"output_dir: {folder} exists and is not empty",
            hint="go on with it: --resume; replace it: --overwrite; or choose another: output_dir=DIR",
        )
    files.check_writable(folder)
    with locks.locked(folder):
        files.clear_temporary(folder, manifest.RUN_FILES)
        try:
            yield
        finally:
            locks.remove_if_unused(folder)


def with_batch_of_before(loaded: LoadedRecipe, folder: Path, options: TrainOptions) -> LoadedRecipe:
    """Returns the recipe with the batch size that a run to be resumed has found, where it asks for `auto`."""
    settings = loaded.recipe.training
    if settings.per_device_train_batch_size != "auto" or not (options.resume and (folder / RECIPE_FILE).is_file()):
        return loaded
    size = recipe.load(folder / RECIPE_FILE).recipe.training.micro_batch_size
    if settings.micro_batch_size * settings.gradient_accumulation_steps % size:
        return loaded  # other steps than before, which is refused elsewhere
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"training": settings.cut_into(size)}))


def _is_taken_by(path: Path) -> bool:
    """Returns whether a file is someone's: not hidden, and not what a run left that ended before its first file."""
    return not path.name.startswith(".") and not path.name.endswith(files.TEMPORARY_SUFFIX)


def checkpoint_for_all(
    wanted: Recipe, folder: Path, options: TrainOptions, group: Processes, reporter: Reporter
) -> Path | None:
    """Returns the checkpoint that every process resumes from, as the first has found it; None for a new run."""
    found = _resume_from(wanted, folder, group.count, reporter) if options.resume and group.is_first else None
    step = group.of_first(-1 if found is None else int(found.name.rpartition("-")[2]))
    checkpoint = state.folder_of(folder, step)
    if step >= 0 and not checkpoint.is_dir():
        raise ModelError(
            f"{checkpoint} is not there for process {group.place.rank}",
            hint="output_dir must be a folder that all machines share",
        )
    return checkpoint if step >= 0 else None


def _resume_from(wanted: Recipe, folder: Path, num_processes: int, reporter: Reporter) -> Path | None:
    """Returns the checkpoint to resume from; None where the run was stopped before it saved one.

    Raises:
        RecipeError: The recipe is not the run's own where that changes what is computed.
        ModelError: There is nothing to resume.
    """
    if not (folder / RECIPE_FILE).is_file():
        raise ModelError(f"{folder} holds no run to resume", hint="leave --resume out to start one")
    before = recipe.load(folder / RECIPE_FILE).recipe
    changed = manifest.changed_fields(recipe.resolve_paths(wanted), before)
    listing = {key: f"{key} was {old}, is {new}" for key, (old, new) in changed.items()}
    recut = [listing.pop(key) for key in manifest.CUTS_STEPS if key in listing]
    if recut:
        reporter.note(f"steps are cut up otherwise than before ({'; '.join(recut)}): dropout draws other numbers")
    if listing:
        raise RecipeError(
            f"the recipe is not the one that {folder} was started with: {'; '.join(listing.values())}",
            hint=f"resume with {folder / RECIPE_FILE}, or start a new run with output_dir=DIR",
        )
    checkpoint, remarks = state.newest_checkpoint(folder)
    for remark in remarks:
        reporter.note(remark)
    if checkpoint is not None:
        _require_same_steps(checkpoint, wanted.training, num_processes, "packs" if wanted.data.packing else "samples")
    reporter.note(f"resuming from {checkpoint.name}" if checkpoint else "no checkpoint yet: starting from step 0")
    return checkpoint


def _require_same_steps(checkpoint: Path, settings: TrainingSection, num_processes: int, unit: str) -> None:
    """Raises a RecipeError where a step would not take as many samples (`unit`) as those before `checkpoint` did."""
    before = state.read_progress(checkpoint).samples_per_step
    round_size = settings.micro_batch_size * num_processes
    now = round_size * settings.gradient_accumulation_steps
    if before == now:
        return
    rounds, rest = divmod(before, round_size)
    new_run = "or start a new run with output_dir=DIR"
    raise RecipeError(
        f"a step of this run took {before} {unit}; of {num_processes} processes it would take {now}, and the "
        "remaining steps would be others",
        hint=f"set training.gradient_accumulation_steps to {rounds}, {new_run}"
        if rounds and not rest
        else f"choose processes, batch size and accumulation whose product is {before}, {new_run}",
    )
