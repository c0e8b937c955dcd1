"""`peftcli train`: from a recipe to a finished run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftcli import files, inject, manifest, models, quantization, recipe
from peftcli.checkpoint import adapter as adapter_files
from peftcli.checkpoint import state
from peftcli.data.meaning import write_meaning
from peftcli.data.preview import Segment, render
from peftcli.errors import HostError, ModelError, RecipeError
from peftcli.recipe import LoadedRecipe, Recipe
from peftcli.reporting import Reporter
from peftcli.run import RECIPE_FILE
from peftcli.run.opening import (
    Base,
    check_checkpointing,
    check_method,
    encode_data,
    find_sites,
    load_weights,
    make_batcher,
    open_base,
    read_data,
    settle,
)

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from peftcli.data import PreparedData
    from peftcli.methods._protocol import Method, MethodConfig
    from peftcli.training.loop import Result, Task


@dataclass(frozen=True)
class TrainOptions:
    """How a run is started, beside its recipe."""

    device: str | None = None
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Job:
    """All that was opened for one run.

    Attributes:
        recipe: What to do.
        folder: The run's folder.
        base: The base model's files and tokenizer.
        model: The base model with its adapters.
        method: The method.
        config: Its Config.
        data: The encoded samples.
        joins: Whether batches may be padding-free.
    """

    recipe: Recipe
    folder: Path
    base: Base
    model: PreTrainedModel
    method: type[Method]
    config: MethodConfig
    data: PreparedData
    joins: bool

    @property
    def origin(self) -> adapter_files.Origin:
        """What adapter files say beside their tensors."""
        section = self.recipe.model
        return adapter_files.Origin(self.method, self.config, section.name, self.base.revision, section.task)


def train(
    loaded: LoadedRecipe, options: TrainOptions, reporter: Reporter, show: Callable[[list[Segment]], None]
) -> dict[str, Any]:
    """Trains as the recipe says, writes the run's folder, and returns its manifest.

    Args:
        loaded: The recipe.
        options: How to start.
        reporter: Where progress goes.
        show: Called with one decoded sample, for the user to see what will be learned.
    """
    method, config = check_method(loaded)
    settings = loaded.recipe.training
    device = models.pick_device(options.device)
    precision = mixed_precision(settings.mixed_precision, device)
    folder = Path(loaded.recipe.output_dir or "runs")
    with open_folder(folder, options):
        resumed = _resume_from(loaded.recipe, folder, reporter) if options.resume else None
        reporter.stage("reading the data and the model's configuration")
        raw = read_data(loaded.recipe)
        base = open_base(loaded.recipe.model, meaning=raw.meaning, packed=loaded.recipe.quantization)
        fit = find_sites(loaded, base, method, config)
        check_checkpointing(loaded, method, config)
        prepared = encode_data(loaded.recipe, raw, base)
        _note_data(prepared, base, reporter)
        config = settle(loaded, method, config, base, prepared)
        show(render(prepared.train, 0, base.processor, prepared.meaning.labels))
        reporter.stage("loading the base model")
        model, fresh = load_weights(base, device, settings.seed, reporter, wide=fit.trains_base)
        joins = _may_join(loaded.recipe, model, method.obstacle(config, "flat"), reporter)
        inject.graft(model, method, config, settings.seed, trained=fresh)
        inject.widen_trained(model)
        quantization.require_exact_biases(model, precision)
        _note_fresh(fresh, reporter)
        _note_sizes(model, precision, reporter)
        job = Job(loaded.recipe, folder, base, model, method, config, prepared, joins)
        if options.overwrite and not options.resume:  # no sooner: a mistake must not cost the run that was there
            files.clear_run(folder, owned=manifest.RUN_FILES)
        _write_start(job)
        return _write_end(job, _run_loop(job, precision, resumed, reporter))


def mixed_precision(wanted: str, device: torch.device) -> str:
    """Returns `no`, `bf16` or `fp16`: what was asked for, or bf16 for `auto` where the device has it in hardware.

    Raises:
        HostError: The device cannot do what was asked for; the libraries would compute in float32 without a word.
    """
    if wanted == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    if wanted == "fp16" and device.type == "cpu":
        raise HostError(
            "training.mixed_precision: fp16 needs a GPU, and this run is on the CPU",
            hint="set training.mixed_precision to no (fastest on a CPU), or to auto",
        )
    return wanted


@contextlib.contextmanager
def open_folder(folder: Path, options: TrainOptions) -> Iterator[None]:
    """Holds the run's folder for this process while entered.

    Raises:
        HostError: It cannot be written, is in use, or holds a run that was neither to be resumed nor replaced.
    """
    if folder.exists() and not folder.is_dir():
        raise HostError(f"output_dir: {folder} is a file", hint="choose another folder with output_dir=DIR")
    taken = folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())
    if taken and not (options.resume or options.overwrite):
        raise HostError(
            f"output_dir: {folder} exists and is not empty",
            hint="go on with it: --resume; replace it: --overwrite; or choose another: output_dir=DIR",
        )
    files.check_writable(folder)
    with files.locked(folder):
        try:
            yield
        finally:
            files.remove_if_unused(folder)


def _resume_from(wanted: Recipe, folder: Path, reporter: Reporter) -> Path | None:
    """Returns the checkpoint to resume from; None where the run was stopped before it saved one.

    Raises:
        RecipeError: The recipe is not the run's own where that changes what is computed.
        ModelError: There is nothing to resume.
    """
    if not (folder / RECIPE_FILE).is_file():
        raise ModelError(f"{folder} holds no run to resume", hint="leave --resume out to start one")
    before = recipe.load(folder / RECIPE_FILE).recipe
    changed = manifest.changed_fields(recipe.resolve_paths(wanted), before)
    if changed:
        listing = "; ".join(f"{key} was {old}, is {new}" for key, (old, new) in changed.items())
        raise RecipeError(
            f"the recipe is not the one that {folder} was started with: {listing}",
            hint=f"resume with {folder / RECIPE_FILE}, or start a new run with output_dir=DIR",
        )
    checkpoint, remarks = state.newest_checkpoint(folder)
    for remark in remarks:
        reporter.note(remark)
    reporter.note(f"resuming from {checkpoint.name}" if checkpoint else "no checkpoint yet: starting from step 0")
    return checkpoint


def _note_fresh(fresh: list[str], reporter: Reporter) -> None:
    if fresh:
        reporter.note(
            f"the checkpoint has none of {', '.join(fresh)}: they start from random numbers and train in full"
        )


def _note_data(prepared: PreparedData, base: Base, reporter: Reporter) -> None:
    for remark in base.remarks:
        reporter.note(remark)
    for line in prepared.train_report.lines():
        reporter.note(f"train: {line}")
    for line in prepared.eval_report.lines() if prepared.eval_report else ():
        reporter.note(f"eval: {line}")


def _may_join(wanted: Recipe, model: PreTrainedModel, obstacle: str | None, reporter: Reporter) -> bool:
    """Returns whether batches may be padding-free, having tried it on the model; `obstacle` is the method's, if any.

    Raises:
        ModelError: The recipe insists and the model cannot.
    """
    from peftcli.training.checks import joins_exactly

    if wanted.data.padding_free is False or wanted.model.task != "causal-lm":
        return False
    attention = model.config._attn_implementation
    message = obstacle or f"{model.config.model_type} with {attention} attention cannot keep joined samples apart"
    if obstacle is None and joins_exactly(model):
        return True
    if wanted.data.padding_free is True:
        raise ModelError(f"data.padding_free: {message}", hint="set data.padding_free to auto or false")
    reporter.note(f"batches are padded: {message}")
    return False


def _note_sizes(model: PreTrainedModel, precision: str, reporter: Reporter) -> None:
    counts = manifest.parameter_counts(model)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    reporter.note(
        f"{counts['trainable_params']:,} of {counts['total_params']:,} parameters train "
        f"({counts['trainable_percent']:.3f} %) in {len(inject.adapters(model))} modules; "
        f"base in {dtype} on {model.device}, mixed precision {precision}"
    )


def _write_start(job: Job) -> None:
    """Writes what a run folder needs from its first step on: the resolved recipe and the tokenizer."""
    settled = job.recipe.data.model_copy(update={"format": job.data.format})
    resolved = recipe.resolve_paths(job.recipe.model_copy(update={"data": settled}))
    files.write_text(job.folder / RECIPE_FILE, recipe.dump(resolved))
    with files.explained(job.folder):
        job.base.processor.save_pretrained(job.folder)
    write_meaning(job.folder, job.data.meaning)


def _run_loop(job: Job, precision: str, resumed: Path | None, reporter: Reporter) -> Result:
    from accelerate import Accelerator

    from peftcli.training.loop import Trainer

    accelerator = Accelerator(mixed_precision=precision, cpu=job.model.device.type == "cpu")
    if job.recipe.training.gradient_checkpointing:
        _checkpoint_activations(job.model)
    first_step = int(resumed.name.rpartition("-")[2]) if resumed is not None else 0
    trainer = Trainer(_task(job, accelerator, first_step, reporter), accelerator)
    if resumed is not None:
        trainer.resume(resumed)
    return trainer.run()


def _checkpoint_activations(model: PreTrainedModel) -> None:
    if not model.supports_gradient_checkpointing:
        raise ModelError(f"training.gradient_checkpointing: {model.config.model_type} models cannot do it")
    # The reentrant form drops the gradients of adapters behind a frozen embedding.
    model.activation_checkpointing_enable({"use_reentrant": False})


def _task(job: Job, accelerator: Accelerator, first_step: int, reporter: Reporter) -> Task:
    from peftcli.data.sampling import StepPlan
    from peftcli.evaluation.tasks import evaluator
    from peftcli.training.logs import MetricsLog, TensorBoardLog
    from peftcli.training.loop import Task
    from peftcli.training.objectives import objective

    settings, always = job.recipe.training, job.recipe.data.padding_free is True
    prompts = job.method.virtual_ids(job.config, models.vocabulary_size(job.base.config))
    task, kind = job.recipe.model.task, job.data.meaning.kind
    eval_with = None
    if job.data.eval is not None:
        held_out = make_batcher(job.data.eval, job.base, joins=job.joins, always=always, prompts=prompts)
        size = settings.per_device_eval_batch_size
        eval_with = partial(evaluator(task, kind), job.model, held_out, size, accelerator.device, reporter.advance)
    learning_rate = settings.learning_rate or job.method.default_learning_rate
    return Task(
        run=job.folder,
        model=job.model,
        origin=job.origin,
        settings=settings,
        learning_rate=learning_rate,
        head_learning_rate=settings.head_learning_rate or job.method.default_head_learning_rate or learning_rate,
        objective=objective(task, kind),
        plan=StepPlan(
            len(job.data.train),
            settings.per_device_train_batch_size,
            settings.gradient_accumulation_steps,
            settings.seed,
            accelerator.process_index,
            accelerator.num_processes,
        ),
        batcher=make_batcher(job.data.train, job.base, joins=job.joins, always=always, prompts=prompts),
        evaluate=eval_with,
        reporter=reporter,
        logs=[
            MetricsLog(job.folder, first_step),
            *(TensorBoardLog(job.folder, first_step) for _ in job.recipe.logging.report_to),
        ],
    )


def _write_end(job: Job, result: Result) -> dict[str, Any]:
    """Writes the adapter, the manifest and the model card, and returns the manifest."""
    adapter_files.save_adapter(job.folder, job.model, job.origin)
    facts = manifest.describe(
        job.folder, job.recipe, job.base.config, job.base.processor, job.base.revision, job.model, job.data, result
    )
    files.write_json(job.folder / manifest.MANIFEST_FILE, facts)
    text = (job.folder / RECIPE_FILE).read_text(encoding="utf-8")
    files.write_text(job.folder / "README.md", manifest.model_card(facts, text))
    return facts
