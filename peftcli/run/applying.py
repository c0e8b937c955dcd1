"""What is done with an adapter once it is trained: on a run's folder, or on an adapter by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftcli import data, files, inject, models, recipe
from peftcli.checkpoint import adapter as adapter_files
from peftcli.errors import DataError, HostError, ModelError, RecipeError
from peftcli.recipe import Recipe
from peftcli.reporting import Reporter
from peftcli.run import MERGED_FOLDER, RECIPE_FILE
from peftcli.run.opening import Base, load_weights, make_batcher, open_base

if TYPE_CHECKING:
    from peftcli.checkpoint.adapter import Adapter
    from peftcli.merge import Agreement

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
    """

    base: Base
    adapter: Adapter
    recipe: Recipe | None
    merged: Path | None

    @property
    def form(self) -> str:
        """The data format that prompts are put into."""
        return self.recipe.data.format if self.recipe is not None else "text"


def open_subject(run: Path | None, adapter: Path | None, model: str | None) -> Subject:
    """Returns the subject that the command line names: a run's folder, an adapter's, or one in place of the other.

    Raises:
        RecipeError: Neither is named.
        ModelError: A folder is not what it should be, or the base model is unknown.
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
    section = own.model if own is not None else recipe.ModelSection(name=model or _base_name(found))
    if model is not None:
        section = section.model_copy(update={"name": model, "revision": None, "gguf_file": None})
    merged = run / MERGED_FOLDER if run is not None and adapter is None and model is None else None
    if merged is not None and not (merged / "config.json").is_file():
        merged = None
    return Subject(open_base(section, tokenizer_from=folder), found, own, merged)


def _base_name(adapter: Adapter) -> str:
    if adapter.base_model is None:
        raise ModelError(f"{adapter.folder} does not name its base model", hint="name it with --model")
    return adapter.base_model


def evaluation_data(subject: Subject, path: Path | None) -> data.EncodedDataset:
    """Returns the samples to evaluate on: those of `path`, else those the run held out.

    Raises:
        DataError: There are none.
    """
    section = subject.recipe.data if subject.recipe is not None else None
    positions = models.max_positions(subject.base.config)
    if path is not None:
        sources = (recipe.Source(path=str(path)),)
        longest = recipe.DataSection.model_fields["max_length"].default
        kept = section.model_dump() if section is not None else {"max_length": min(longest, positions or longest)}
        section = recipe.DataSection.model_validate({**kept, "train": sources, "eval": sources, "eval_fraction": None})
    samples = None
    if section is not None:
        samples = data.prepare_eval(
            section,
            subject.base.tokenizer,
            vocab_size=models.vocabulary_size(subject.base.config),
            max_positions=positions,
            seed=subject.recipe.training.seed if subject.recipe is not None else 0,
        )
    if samples is None:
        raise DataError("there is nothing to evaluate on", hint="name a file: --data FILE")
    return samples


def evaluate(
    subject: Subject, path: Path | None, batch_size: int | None, device_name: str | None, reporter: Reporter
) -> dict[str, dict[str, float]]:
    """Returns the metrics of base, adapter and, where there is one, merged model on the same samples."""
    from peftcli.evaluation.language import evaluate as measure
    from peftcli.training.checks import joins_exactly

    device = models.pick_device(device_name)
    reporter.stage("reading the data")
    samples = evaluation_data(subject, path)
    size = batch_size or (subject.recipe.training.per_device_eval_batch_size if subject.recipe else 8)
    reporter.stage("loading the base model")
    model = load_weights(subject.base, device)
    batcher = make_batcher(samples, subject.base, joins=joins_exactly(model))
    adapter_files.attach(model, subject.adapter)
    found: dict[str, dict[str, float]] = {}
    reporter.stage("evaluating the base model")
    with inject.disabled(model):
        found["base"] = measure(model, batcher, size, device, reporter.advance)
    reporter.stage("evaluating base and adapter")
    found["adapter"] = measure(model, batcher, size, device, reporter.advance)
    if subject.merged is not None:
        del model
        reporter.stage("evaluating the merged model")
        merged = load_weights(open_base(_merged_section(subject, subject.merged)), device)
        found["merged"] = measure(merged, batcher, size, device, reporter.advance)
    return found


def _merged_section(subject: Subject, folder: Path) -> recipe.ModelSection:
    changes = {"name": str(folder), "revision": None, "gguf_file": None}
    return subject.base.section.model_copy(update=changes)


def generate(
    subject: Subject,
    prompts: Sequence[str],
    changes: Mapping[str, Any],
    device_name: str | None,
    reporter: Reporter,
    *,
    with_base: bool,
) -> Iterator[dict[str, str]]:
    """Yields, for each prompt, the `adapter`'s answer and, on request, the `base` model's."""
    from peftcli.evaluation.generation import generate as write

    given = subject.recipe.evaluation.generate if subject.recipe is not None else recipe.GenerateSection()
    settings = given.model_validate({**given.model_dump(), **changes})
    seed = subject.recipe.training.seed if subject.recipe is not None else 0
    reporter.stage("loading the base model")
    model = load_weights(subject.base, models.pick_device(device_name))
    adapter_files.attach(model, subject.adapter)
    say = partial(write, model, subject.base.tokenizer, form=subject.form, settings=settings, seed=seed)
    for prompt in prompts:
        answers = {"prompt": prompt}
        if with_base:
            with inject.disabled(model):
                answers["base"] = say(prompt=prompt)
        yield {**answers, "adapter": say(prompt=prompt)}


def merge(
    subject: Subject, target: Path, dtype: str | None, reporter: Reporter, *, overwrite: bool
) -> tuple[Agreement, int]:
    """Writes the merged model to `target`, proves it against base and adapter, and returns how well they agree.

    The folder appears only if the proof succeeds. Returned with the agreement: how many weights were merged.

    Raises:
        HostError: `target` is in the way.
        ModelError: The adapter does not fit, or the merged model is not the adapted one.
    """
    from peftcli import merge as merging

    _check_target(subject, target, overwrite=overwrite)
    cpu = torch.device("cpu")
    prompts = _proof_prompts(subject)
    wanted_dtype = getattr(torch, dtype) if dtype is not None else None
    with models.plain_folder(subject.base.section, subject.base.source) as folder, files.new_folder(target) as new:
        reporter.stage("merging the weights")
        skeleton = models.skeleton(subject.base.config)
        count = merging.merge_files(folder, skeleton, subject.adapter, new, wanted_dtype)
        with files.explained(new):
            subject.base.tokenizer.save_pretrained(new)
        reporter.stage("computing what base and adapter answer")
        model = load_weights(subject.base, cpu)
        adapter_files.attach(model, subject.adapter)
        expected = merging.logits_of(model, prompts, cpu)
        del model
        reporter.stage("computing what the merged model answers")
        merged = load_weights(open_base(_merged_section(subject, new)), cpu)
        agreement = merging.compare(expected, merging.logits_of(merged, prompts, cpu))
        merging.require_agreement(agreement, wanted_dtype or merging.stored_dtype(new))
    return agreement, count


def _check_target(subject: Subject, target: Path, *, overwrite: bool) -> None:
    """Raises a HostError where a merged model cannot be put at `target`, or would replace what it is made from."""
    if target.exists() and not target.is_dir():
        raise HostError(f"{target} is a file", hint="choose a folder with --output DIR")
    needed = [subject.adapter.folder, *([Path(subject.base.source.name)] if subject.base.source.is_local else [])]
    if (target / RECIPE_FILE).is_file() or any(folder.resolve().is_relative_to(target.resolve()) for folder in needed):
        raise HostError(f"{target} holds a run, the adapter or the base model", hint="choose another: --output DIR")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise HostError(f"{target} exists and is not empty", hint="replace it: --overwrite; or another: --output DIR")


def _proof_prompts(subject: Subject) -> list[list[int]]:
    """Returns the ids that a merged model is compared on: held-out samples where there are some, else plain text."""
    with contextlib.suppress(DataError):
        samples = evaluation_data(subject, None)
        return [samples[i].input_ids.tolist() for i in range(min(NUM_VERIFIED_PROMPTS, len(samples)))]
    return [data.format_prompt(text, "text", subject.base.tokenizer) for text in DEFAULT_PROMPTS]
