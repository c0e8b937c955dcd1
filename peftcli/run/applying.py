"""What is done with an adapter once it is trained: measuring it, writing with it, merging it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftcli import files, models, recipe
from peftcli.checkpoint import adapter as adapter_files
from peftcli.errors import RecipeError
from peftcli.reporting import Reporter
from peftcli.run.opening import load_weights, make_batcher, open_base
from peftcli.run.packing import packing_of
from peftcli.run.subject import Subject, check_target, evaluation_data, merged_section, proof_inputs

if TYPE_CHECKING:
    from peftcli.merge import Agreement


def evaluate(
    subject: Subject, path: Path | None, batch_size: int | None, device_name: str | None, reporter: Reporter
) -> dict[str, dict[str, float]]:
    """Returns the metrics of base, adapter and, where there is one, merged model on the same samples."""
    from peftcli.evaluation.tasks import evaluator
    from peftcli.training.checks import joins_exactly

    device = models.pick_device(device_name)
    reporter.stage("reading the data")
    samples = evaluation_data(subject, path)
    size = batch_size or (subject.recipe.training.per_device_eval_batch_size if subject.recipe else 8)
    reporter.stage("loading the base model")
    task, meaning = subject.base.section.task, subject.base.meaning
    measure = evaluator(task, meaning.kind)
    model, _ = load_weights(subject.base, device, subject.seed, reporter)
    joins = task == "causal-lm" and joins_exactly(model)
    batcher = make_batcher(samples, subject.base, joins=joins)
    found: dict[str, dict[str, float]] = {}
    reporter.stage("evaluating the base model")
    found["base"] = measure(model, batcher, size, device, reporter.advance)
    adapter_files.attach(model, subject.adapter)
    joins = joins and subject.adapter.method.obstacle(subject.adapter.config, "flat") is None
    batcher = make_batcher(samples, subject.base, joins=joins, prompts=subject.prompts)
    reporter.stage("evaluating base and adapter")
    found["adapter"] = measure(model, batcher, size, device, reporter.advance)
    if subject.merged is not None:
        del model
        reporter.stage("evaluating the merged model")
        merged, _ = load_weights(open_base(merged_section(subject, subject.merged), meaning=meaning), device)
        found["merged"] = measure(merged, batcher, size, device, reporter.advance)
    return found


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

    task = subject.base.section.task
    if task not in models.LANGUAGE_TASKS:
        raise RecipeError(f"model.task: {task} models write no text", hint="measure them with peftcli eval")
    given = subject.recipe.evaluation.generate if subject.recipe is not None else recipe.GenerateSection()
    settings = given.model_validate({**given.model_dump(), **changes})
    reporter.stage("loading the base model")
    model, _ = load_weights(subject.base, models.pick_device(device_name), subject.seed, reporter)
    say = partial(write, model, subject.base.tokenizer, form=subject.form, settings=settings, seed=subject.seed)
    # All of the base's answers come first: once attached, an adapter may have changed the base's own parameters.
    before = [{"base": say(prompt=prompt)} if with_base else {} for prompt in prompts]
    adapter_files.attach(model, subject.adapter)
    for prompt, base in zip(prompts, before, strict=True):
        yield {"prompt": prompt, **base, "adapter": say(prompt=prompt, prompts=subject.prompts)}


def readout(subject: Subject, k: int, reporter: Reporter) -> list[dict[str, Any]]:
    """Returns the `k` real tokens nearest to each virtual token, by cosine distance.

    Raises:
        RecipeError: The adapter has no virtual tokens.
    """
    from peftcli import inject
    from peftcli.ops.nearest import nearest_tokens

    if subject.adapter.method.place != "input-embedding":
        name = type(subject.adapter.config).model_fields["type"].default
        raise RecipeError(f"{name} has no virtual tokens to read", hint="readout is for type: prompt")
    reporter.stage("loading the base model")
    model, _ = load_weights(subject.base, torch.device("cpu"), subject.seed)
    adapter_files.attach(model, subject.adapter)
    prompt: Any
    (prompt,) = inject.adapters(model).values()
    embedding: Any = model.get_input_embeddings()
    real = embedding.weight.detach()[: len(subject.base.tokenizer)]  # rows beyond stand for no token
    distances, tokens = nearest_tokens(prompt.P.detach(), real, k)
    per_prompt = subject.adapter.method.num_virtual_tokens(subject.adapter.config)
    return [
        {
            "prompt": row // per_prompt,
            "position": row % per_prompt,
            "nearest": [
                (subject.base.tokenizer.decode([token]), distance)
                for token, distance in zip(tokens[row].tolist(), distances[row].tolist(), strict=True)
            ],
        }
        for row in range(len(tokens))
    ]


def require_mergeable(subject: Subject) -> None:
    """Raises a RecipeError where no plain model computes what base and adapter do together."""
    method, config = subject.adapter.method, subject.adapter.config
    reason = method.unmergeable(config)
    if reason is not None:
        name = type(config).model_fields["type"].default
        hint = "use it as it is: peftcli eval, peftcli generate"
        if hasattr(method, "averaged_low_rank"):
            hint = "peftcli export --to lora --lossy writes its mean as a LoRA, with the measured error"
        raise RecipeError(f"{name} cannot be merged: {reason}", hint=hint)


def merge(
    subject: Subject, target: Path, dtype: str | None, reporter: Reporter, *, overwrite: bool
) -> tuple[Agreement, int]:
    """Writes the merged model to `target`, proves it against base and adapter, and returns how well they agree.

    The folder appears only if the proof succeeds. Returned with the agreement: how many weights were merged.

    Raises:
        RecipeError: The method has no merged form.
        HostError: `target` is in the way.
        ModelError: The adapter does not fit, or the merged model is not the adapted one.
    """
    from peftcli import merge as merging

    require_mergeable(subject)
    check_target(subject, target, overwrite=overwrite)
    cpu = torch.device("cpu")
    inputs = proof_inputs(subject)
    wanted_dtype = getattr(torch, dtype) if dtype is not None else None
    with models.plain_folder(subject.base.section, subject.base.source) as folder, files.new_folder(target) as new:
        reporter.stage("merging the weights")
        skeleton = models.skeleton(subject.base.config, subject.base.section.task)
        packing = packing_of(subject.base, skeleton)
        if packing is not None:
            reporter.note(
                f"the {len(packing.paths)} linear layers that were held in {packing.section.type} become the weights "
                "that these stood for, adapted or not: that is what the adapter was trained on"
            )
        count = merging.merge_files(folder, skeleton, subject.adapter, new, wanted_dtype, packing)
        with files.explained(new):
            subject.base.processor.save_pretrained(new)
        reporter.stage("computing what base and adapter answer")
        model, _ = load_weights(subject.base, cpu, subject.seed)
        adapter_files.attach(model, subject.adapter)
        expected = merging.logits_of(model, inputs, cpu)
        del model
        reporter.stage("computing what the merged model answers")
        merged, _ = load_weights(open_base(merged_section(subject, new), meaning=subject.base.meaning), cpu)
        agreement = merging.compare(expected, merging.logits_of(merged, inputs, cpu))
        merging.require_agreement(agreement, wanted_dtype or merging.stored_dtype(new))
    return agreement, count
