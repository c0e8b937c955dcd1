"""What is done with an adapter once it is trained: measuring it, writing with it, reading it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peftcli import models, recipe
from peftcli.checkpoint import adapter as adapter_files
from peftcli.data.dataset import EncodedDataset
from peftcli.errors import RecipeError
from peftcli.reporting import Reporter
from peftcli.run.opening import load_weights, make_batcher, open_base
from peftcli.run.subject import Subject, evaluation_data, merged_section

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcli.data import Dataset
    from peftcli.run.batches import Joins


def evaluate(
    subject: Subject, path: Path | None, batch_size: int | None, device_name: str | None, reporter: Reporter
) -> dict[str, dict[str, float]]:
    """Returns the metrics of base, adapter and, where there is one, merged model on the same samples."""
    from peftcli.evaluation.tasks import evaluator
    from peftcli.run.batches import Joins
    from peftcli.training.checks import finish_of

    device = models.pick_device(device_name)
    reporter.stage("reading the data")
    samples = evaluation_data(subject, path)
    size = batch_size or (subject.recipe.training.per_device_eval_batch_size if subject.recipe else 8)
    reporter.stage("loading the base model")
    task, meaning = subject.base.section.task, subject.base.meaning
    model, _ = load_weights(subject.base, device, subject.seed, reporter)
    measure = evaluator(task, meaning.kind, finish_of(model) if task in models.LANGUAGE_TASKS else None)
    joins = _joins(model, task, samples, device)
    batcher = make_batcher(samples, subject.base, joins=joins.allowed, always=joins.free)
    found: dict[str, dict[str, float]] = {}
    reporter.stage("evaluating the base model")
    found["base"] = measure(model, batcher, size, device, reporter.advance)
    adapter_files.attach(model, subject.adapter)
    if subject.adapter.method.obstacle(subject.adapter.config, "flat") is not None:
        joins = Joins(False)
    batcher = make_batcher(samples, subject.base, joins=joins.allowed, always=joins.free, prompts=subject.prompts)
    reporter.stage("evaluating base and adapter")
    found["adapter"] = measure(model, batcher, size, device, reporter.advance)
    if subject.merged is not None:
        del model
        reporter.stage("evaluating the merged model")
        merged, _ = load_weights(open_base(merged_section(subject, subject.merged), meaning=meaning), device)
        joins = _joins(merged, task, samples, device)
        batcher = make_batcher(samples, subject.base, joins=joins.allowed, always=joins.free)
        found["merged"] = measure(merged, batcher, size, device, reporter.advance)
    return found


def _joins(model: PreTrainedModel, task: str, samples: Dataset, device: torch.device) -> Joins:
    """Returns whether `samples` may be joined for `model`."""
    from peftcli.run.batches import Joins, try_joining

    if task != "causal-lm" or not isinstance(samples, EncodedDataset):
        return Joins(False)
    return try_joining(model, device, int(samples.lengths.max(initial=0)))


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
