"""What a command on a trained adapter is about: the adapter, its base, and the run that it came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from peftcli import data, models, recipe
from peftcli.checkpoint import adapter as adapter_files
from peftcli.checkpoint import seal as seals
from peftcli.checkpoint.seal import SEAL_FILE
from peftcli.data.meaning import read_meaning, task_of
from peftcli.errors import DataError, HostError, ModelError, RecipeError
from peftcli.recipe import Recipe
from peftcli.run import MERGED_FOLDER, RECIPE_FILE
from peftcli.run.fingerprint import other_base
from peftcli.run.opening import Base, make_batcher, open_base
from peftcli.run.prepacked import check_stored

if TYPE_CHECKING:
    from peftcli.checkpoint.adapter import Adapter

DEFAULT_PROMPTS = ("The capital of France is", "Once upon a time there was", "def add(a, b):\n    return")
NUM_VERIFIED_PROMPTS = 4


@dataclass(frozen=True)
class Subject:
    """What a command is about: an adapter, the base it belongs to, and the run it came from, if it did.

    Attributes:
        base: The base model, opened with the run's tokenizer.
        adapter: The adapter.
        recipe: The run's own recipe; None for an adapter alone.
        merged: The merged model's folder, where there is one.
        remarks: What could not be verified, and what was found and overridden.
    """

    base: Base
    adapter: Adapter
    recipe: Recipe | None
    merged: Path | None
    remarks: tuple[str, ...] = ()

    @property
    def form(self) -> str:
        """The data format that prompts are put into."""
        return self.recipe.data.format if self.recipe is not None else "text"

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The ids of the virtual tokens that the adapter wants before each sample; none for most methods."""
        return self.adapter.method.virtual_ids(self.adapter.config, models.vocabulary_size(self.base.config))

    @property
    def seed(self) -> int:
        """The seed that the run was trained with."""
        return self.recipe.training.seed if self.recipe is not None else 0


def open_subject(run: Path | None, adapter: Path | None, model: str | None, *, force: bool = False) -> Subject:
    """Returns the subject that the command line names: a run's folder, an adapter's, or one in place of the other.

    Args:
        run: The run's folder.
        adapter: The adapter's, in place of the run's own.
        model: The base, in place of the one that run or adapter name.
        force: Take an adapter that has changed since it was written, or was trained on another base.

    Raises:
        RecipeError: Neither is named.
        ModelError: A folder is not what it should be, the base model is unknown, or the adapter does not fit it.
    """
    if run is None and adapter is None:
        raise RecipeError("name a run's folder, or an adapter's with --adapter DIR")
    own = None
    if run is not None and (run / RECIPE_FILE).is_file():
        own = recipe.load(run / RECIPE_FILE).recipe
    elif run is not None and adapter is None and not (run / adapter_files.CONFIG_FILE).is_file():
        what = "there is no such folder" if not run.is_dir() else f"it has no {RECIPE_FILE}"
        raise ModelError(f"{run} is not a run: {what}", hint="name the output_dir of a finished `peftcli train`")
    folder = adapter or run
    assert folder is not None
    found = adapter_files.read_adapter(folder)
    section = own.model if own is not None else _section_of(found, model)
    if model is not None:
        section = section.model_copy(update={"name": model, "revision": None, "gguf_file": None})
    merged = run / MERGED_FOLDER if run is not None and adapter is None and model is None else None
    if merged is not None and not (merged / "config.json").is_file():
        merged = None
    packed = own.quantization if own is not None else None
    base = open_base(section, folder, read_meaning(folder, section.task), packed)
    check_stored(packed, base.config, section.name)  # with another model than the run's own
    return Subject(replace(base, dense=found.trained), found, own, merged, _verified(found, base, force=force))


def _verified(adapter: Adapter, base: Base, *, force: bool) -> tuple[str, ...]:
    """Returns what could not be verified of `adapter` on `base`, and what `force` had to override.

    Raises:
        ModelError: The adapter does not fit the base; or, without `force`, one of them is not what it was.
    """
    doubts = [*adapter.doubts, *other_base(adapter.seal, base)]
    try:
        adapter_files.require_fit(models.skeleton(base.config, base.section.task), adapter)
    except ModelError as error:
        raise seals.with_doubts(error, doubts) from error
    if doubts and not force:
        raise ModelError.of(doubts)
    remarks = [f"--force: {problem.message}" for problem in doubts]
    if adapter.seal is None and not doubts:
        remarks.append(
            f"{adapter.folder} has no {SEAL_FILE}: names, shapes and settings fit, but whether numbers and base are "
            "those of its training cannot be verified"
        )
    elif adapter.seal is not None and adapter.seal.base is None:
        remarks.append(f"{adapter.folder / SEAL_FILE} names no base: whether this is the right one cannot be verified")
    return tuple(remarks)


def _section_of(adapter: Adapter, model: str | None) -> recipe.ModelSection:
    """Returns the model section of an adapter that comes without a recipe; `model` is the base's name, if given."""
    task = task_of(adapter.folder) or adapter_files.task_of(adapter.folder)  # PEFT has no name for that of images
    fields = {"name": model or _base_name(adapter), "task": task}
    try:
        return recipe.ModelSection.model_validate(fields)
    except ValidationError as error:
        raise ModelError(
            f"{adapter.folder} names no base model that can be read: {error.errors()[0]['msg']}",
            hint="name it with --model",
        ) from error


def _base_name(adapter: Adapter) -> str:
    if adapter.base_model is None:
        raise ModelError(f"{adapter.folder} does not name its base model", hint="name it with --model")
    return adapter.base_model


def evaluation_data(subject: Subject, path: Path | None) -> data.Dataset:
    """Returns the samples to evaluate on: those of `path`, else those the run held out.

    Raises:
        DataError: There are none.
    """
    section = subject.recipe.data if subject.recipe is not None else None
    positions = models.max_positions(subject.base.config)
    if path is not None:
        sources = (recipe.Source.model_construct(path=str(path)),)
        longest = recipe.DataSection.model_fields["max_length"].default
        kept = section.model_dump() if section is not None else {"max_length": min(longest, positions or longest)}
        section = recipe.DataSection.model_validate({**kept, "train": sources, "eval": sources, "eval_fraction": None})
    samples = None
    if section is not None:
        samples = data.prepare_eval(
            section,
            None if subject.base.reads_images else subject.base.tokenizer,
            vocab_size=models.vocabulary_size(subject.base.config),
            max_positions=positions,
            seed=subject.seed,
            meaning=subject.base.meaning,
        )
    if samples is None:
        raise DataError("there is nothing to evaluate on", hint="name a file: --data FILE")
    return samples


def merged_section(subject: Subject, folder: Path) -> recipe.ModelSection:
    """Returns the model section of the subject's merged model in `folder`."""
    changes = {"name": str(folder), "revision": None, "gguf_file": None}
    return subject.base.section.model_copy(update=changes)


def check_target(subject: Subject, target: Path, *, overwrite: bool) -> None:
    """Raises a HostError where a merged model cannot be put at `target`, or would replace what it is made from."""
    if target.exists() and not target.is_dir():
        raise HostError(f"{target} is a file", hint="choose a folder with --output DIR")
    needed = [subject.adapter.folder, *([Path(subject.base.source.name)] if subject.base.source.is_local else [])]
    if (target / RECIPE_FILE).is_file() or any(folder.resolve().is_relative_to(target.resolve()) for folder in needed):
        raise HostError(f"{target} holds a run, the adapter or the base model", hint="choose another: --output DIR")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise HostError(f"{target} exists and is not empty", hint="replace it: --overwrite; or another: --output DIR")


def proof_inputs(subject: Subject) -> list[dict[str, torch.Tensor]]:
    """Returns what a merged model is compared on: held-out samples where there are some, else plain text.

    Raises:
        DataError: A model that does not continue texts has no held-out samples, or they are gone.
    """
    task = subject.base.section.task
    try:
        samples = evaluation_data(subject, None)
    except DataError:
        if task != "causal-lm":
            raise
        prompts = [data.format_prompt(text, "text", subject.base.tokenizer) for text in DEFAULT_PROMPTS]
        return [{"input_ids": torch.tensor([ids])} for ids in prompts]
    batcher = make_batcher(samples, subject.base, joins=False)
    inputs = []
    for index in range(min(NUM_VERIFIED_PROMPTS, len(samples))):
        batch = batcher.batch([index])
        given = {name: tensor for name, tensor in batch.model_inputs().items() if tensor is not None}
        inputs.append({**given, "labels": batch.labels} if task == "seq2seq-lm" else given)
    return inputs
