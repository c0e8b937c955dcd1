"""`peftcli train`: from a recipe to a finished run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from peftcli import files, inject, manifest, models, processes, quantization, recipe
from peftcli.checkpoint import adapter as adapter_files
from peftcli.data.batching import Batcher, PackBatcher
from peftcli.data.meaning import write_meaning
from peftcli.data.packing import PackPlan
from peftcli.data.preview import Segment, render
from peftcli.models import liger
from peftcli.recipe import LoadedRecipe, Recipe
from peftcli.reporting import Reporter, Silent
from peftcli.run import RECIPE_FILE, execution, remarks
from peftcli.run.batches import Joins, check_packing, longest_first, longest_sample, settle_joining, step_plan
from peftcli.run.fingerprint import fingerprint, require_same_base
from peftcli.run.fitting import check_checkpointing, check_method, check_spreading, find_sites, settle
from peftcli.run.folder import TrainOptions, checkpoint_for_all, open_folder, with_batch_of_before
from peftcli.run.opening import Base, encode_data, load_weights, make_batcher, open_base, read_data
from peftcli.training import checks, distributed, memory, zero, zero_settings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from peftcli.data import PreparedData
    from peftcli.data.batching import Batches
    from peftcli.data.sampling import Plan
    from peftcli.methods._protocol import Method, MethodConfig
    from peftcli.training.distributed import Processes
    from peftcli.training.head import Finish
    from peftcli.training.logs import MetricsLog, TensorBoardLog
    from peftcli.training.loop import Result, Task
    from peftcli.training.objectives import Objective
    from peftcli.training.zero_settings import ZeroSettings


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
        plan: Which of them each step takes.
        joins: Whether samples may be joined.
        finish: What a language model does to its head's logits; None where that is not known.
        counts: How many parameters are which, counted before the base was spread.
        group: The run's processes.
        fingerprint: That of the base's files.
    """

    recipe: Recipe
    folder: Path
    base: Base
    model: PreTrainedModel
    method: type[Method]
    config: MethodConfig
    data: PreparedData
    plan: Plan
    joins: Joins
    finish: Finish | None
    counts: dict[str, int | float]
    group: Processes
    fingerprint: str | None

    @property
    def origin(self) -> adapter_files.Origin:
        """What adapter files say beside their tensors."""
        section = self.recipe.model
        return adapter_files.Origin(
            self.method, self.config, section.name, self.base.revision, section.task, self.fingerprint
        )


def train(
    loaded: LoadedRecipe, options: TrainOptions, reporter: Reporter, show: Callable[[list[Segment]], None]
) -> dict[str, Any]:
    """Trains as the recipe says, writes the run's folder, and returns its manifest.

    Of several processes the first alone speaks, writes, and has a manifest to return.

    Args:
        loaded: The recipe.
        options: How to start.
        reporter: Where progress goes.
        show: Called with one decoded sample, for the user to see what will be learned.
    """
    method, config = check_method(loaded)
    section = loaded.recipe.distributed
    device = models.pick_device(options.device)
    precision = execution.mixed_precision(loaded.recipe.training.mixed_precision, device)
    execution.require(loaded.recipe.training, device)
    settings = zero_settings.read(loaded, precision, processes.here().count)
    with distributed.losses_explained(section.timeout):
        accelerator, group = distributed.begin(section, precision, device)
        if settings is not None:
            zero.begin(settings, group.device)
        if not group.is_first:
            reporter, show = Silent(), _show_nothing
        folder = Path(loaded.recipe.output_dir or "runs")
        with open_folder(folder, options) if group.is_first else contextlib.nullcontext():
            loaded = with_batch_of_before(loaded, folder, options)
            resumed = checkpoint_for_all(loaded.recipe, folder, options, group, reporter)
            job = _open_job(loaded, method, config, settings, group, precision, reporter, show)
            checks.what_runs(accelerator, group, precision)
            job = _with_batch_that_fits(job, accelerator, reporter)
            if group.is_first:
                # No sooner: a mistake must not cost the run that was there.
                if options.overwrite and not options.resume:
                    files.clear_run(folder, owned=manifest.RUN_FILES)
                _write_start(job)
            group.wait()
            found = _write_end(job, _run_loop(job, accelerator, resumed, reporter))
        group.end()
    return found


def _show_nothing(_: list[Segment]) -> None:
    """Shows no sample: another process does."""


def _open_job(
    loaded: LoadedRecipe,
    method: type[Method],
    config: MethodConfig,
    settings: ZeroSettings | None,
    group: Processes,
    precision: str,
    reporter: Reporter,
    show: Callable[[list[Segment]], None],
) -> Job:
    """Returns all that the run needs, opened and checked in the order in which mistakes cost least."""
    wanted = loaded.recipe
    reporter.stage("reading the data and the model's configuration")
    raw = read_data(wanted)
    base = open_base(wanted.model, meaning=raw.meaning, packed=wanted.quantization)
    fit = find_sites(loaded, base, method, config)
    check_checkpointing(loaded, method, config)
    check_packing(loaded, method, config)
    spread = wanted.distributed.strategy == "fsdp2" or (settings is not None and settings.stage == 3)
    if spread:
        check_spreading(loaded, base, method, precision)
    prepared = encode_data(wanted, raw, base)
    remarks.note_data(prepared, base, reporter)
    config = settle(loaded, method, config, base, prepared, group.count)
    num_virtual = method.num_virtual_tokens(config)
    plan = step_plan(wanted, prepared.train, num_virtual, group.place.rank, group.count)
    if isinstance(plan, PackPlan):
        reporter.note(f"packing: {plan.packs.describe()}")
    show(render(prepared.train, 0, base.processor, prepared.meaning.labels))
    reporter.stage("loading the base model")
    # What is to be spread need not fit on one device: it goes there layer by layer.
    home = torch.device("cpu") if spread else None
    model, fresh = load_weights(base, group.device, wanted.training.seed, reporter, wide=fit.trains_base, hold_on=home)
    if wanted.training.use_liger_kernel:
        reporter.note(liger.put_in(model))
    longest = longest_sample(prepared) + num_virtual
    joins = settle_joining(wanted, model, group.device, longest, method.obstacle(config, "flat"), reporter)
    finish = remarks.finish_of(wanted.model.task, model, reporter)
    inject.graft(model, method, config, wanted.training.seed, trained=fresh)
    inject.widen_trained(model)
    quantization.require_exact_biases(model, precision)
    remarks.note_fresh(fresh, reporter)
    counts = manifest.parameter_counts(model)
    remarks.note_sizes(model, counts, group.device, precision, reporter)
    remarks.note_processes(group, wanted.training, "packs" if wanted.data.packing else "samples", reporter)
    checks.all_are_alike(group, prepared.train.fingerprint, model)
    # A cache cannot be filled twice: what keeps activations from being recomputed is that, and nothing else.
    fills_cache = method.obstacle(config, "checkpointing") is not None
    execution.set_up(model, wanted.training, group.device, fills_cache=fills_cache)
    for remark in settings.remarks(int(counts["trainable_params"])) if settings is not None else ():
        reporter.note(remark)
    if spread:
        reporter.note(execution.spread(model, settings, group))
    folder = Path(wanted.output_dir or "runs")
    known = fingerprint(base)
    return Job(wanted, folder, base, model, method, config, prepared, plan, joins, finish, counts, group, known)


def _write_start(job: Job) -> None:
    """Writes what a run folder needs from its first step on: the resolved recipe and the tokenizer."""
    settled = job.recipe.data.model_copy(update={"format": job.data.format})
    resolved = recipe.resolve_paths(job.recipe.model_copy(update={"data": settled}))
    files.write_text(job.folder / RECIPE_FILE, recipe.dump(resolved))
    with files.staged(job.folder) as new, files.explained(job.folder):
        job.base.processor.save_pretrained(new)
    write_meaning(job.folder, job.data.meaning)


def _with_batch_that_fits(job: Job, accelerator: Accelerator, reporter: Reporter) -> Job:
    """Returns the job with a number in place of a batch size of `auto`: the largest that fits into memory."""
    settings = job.recipe.training
    if settings.per_device_train_batch_size != "auto":
        return job
    reporter.stage("finding the batch size that fits")
    batcher, loss_of = _train_batcher(job), _objective(job)

    def run(size: int) -> torch.Tensor:
        batch = batcher.batch(longest_first(job.plan, job.data.train, size)).to(job.group.device)
        with accelerator.autocast():
            return loss_of(job.model, batch)

    size = memory.batch_size_that_fits(job.model.train(), settings, run, len(job.data.train), job.group)
    wanted = job.recipe.model_copy(update={"training": settings.cut_into(size)})
    rounds = wanted.training.gradient_accumulation_steps
    reporter.note(f"training.per_device_train_batch_size: {size} fits, {rounds} times a step")
    num_virtual = job.method.num_virtual_tokens(job.config)
    place = job.group.place
    return replace(job, recipe=wanted, plan=step_plan(wanted, job.data.train, num_virtual, place.rank, job.group.count))


def _run_loop(job: Job, accelerator: Accelerator, resumed: Path | None, reporter: Reporter) -> Result:
    from peftcli.training.loop import Trainer

    first_step = int(resumed.name.rpartition("-")[2]) if resumed is not None else 0
    with memory.explained(job.model, job.recipe.training, job.group.device, longest_sample(job.data)):
        trainer = Trainer(_task(job, first_step, reporter), accelerator, job.group)
        if resumed is not None:
            require_same_base(resumed, job.base, job.fingerprint)
            trainer.resume(resumed)
        return trainer.run()


def _objective(job: Job) -> Objective:
    from peftcli.training.objectives import objective

    return objective(job.recipe.model.task, job.data.meaning.kind, job.finish)


def _train_batcher(job: Job) -> Batches:
    batcher = make_batcher(job.data.train, job.base, **_layout(job))
    if job.recipe.data.packing:
        return PackBatcher(cast("Batcher", batcher), by_row=not job.joins.free)
    return batcher


def _layout(job: Job) -> dict[str, Any]:
    """Returns how the job's samples are laid out in batches: arguments of `make_batcher`."""
    always = job.joins.free or job.recipe.data.padding_free is True
    prompts = job.method.virtual_ids(job.config, models.vocabulary_size(job.base.config))
    return {"joins": job.joins.allowed, "always": always, "prompts": prompts}


def _task(job: Job, first_step: int, reporter: Reporter) -> Task:
    from peftcli.evaluation.tasks import evaluator
    from peftcli.training.loop import Task

    settings = job.recipe.training
    task, kind = job.recipe.model.task, job.data.meaning.kind
    eval_with = None
    if job.data.eval is not None:
        held_out = make_batcher(job.data.eval, job.base, **_layout(job))
        size = settings.per_device_eval_batch_size
        measure = partial(evaluator(task, kind, job.finish), processes=job.group)
        eval_with = partial(measure, job.model, held_out, size, job.group.device, reporter.advance)
    learning_rate = settings.learning_rate or job.method.default_learning_rate
    return Task(
        run=job.folder,
        model=job.model,
        origin=job.origin,
        settings=settings,
        learning_rate=learning_rate,
        head_learning_rate=settings.head_learning_rate or job.method.default_head_learning_rate or learning_rate,
        objective=_objective(job),
        plan=job.plan,
        batcher=_train_batcher(job),
        evaluate=eval_with,
        reporter=reporter,
        logs=_logs(job, first_step),
    )


def _logs(job: Job, first_step: int) -> list[MetricsLog | TensorBoardLog]:
    """Returns where metrics go: nowhere for a process that is not the first, whose numbers are the same."""
    from peftcli.training.logs import MetricsLog, TensorBoardLog

    if not job.group.is_first:
        return []
    others = (TensorBoardLog(job.folder, first_step) for _ in job.recipe.logging.report_to)
    return [MetricsLog(job.folder, first_step), *others]


def _write_end(job: Job, result: Result) -> dict[str, Any]:
    """Writes the adapter, the manifest and the model card, and returns the manifest."""
    adapter = adapter_files.contents(job.model, job.origin)
    if not job.group.is_first:
        return {}
    with files.staged(job.folder) as new:
        write_meaning(new, job.data.meaning)  # the seal is for what reads the adapter's outputs, too
        adapter_files.write_contents(new, adapter)
    facts = manifest.describe(
        job.folder, job.recipe, job.base.config, job.base.processor, job.base.revision, job.model, job.data, result
    )
    facts["base_model"]["fingerprint"] = job.fingerprint
    facts |= {"parameters": job.counts, **distributed.facts(job.group)}
    files.write_json(job.folder / manifest.MANIFEST_FILE, facts)
    text = (job.folder / RECIPE_FILE).read_text(encoding="utf-8")
    files.write_text(job.folder / "README.md", manifest.model_card(facts, text))
    return facts
