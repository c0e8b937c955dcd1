"""Whether what a recipe asks for goes together: its method with the model, the data and the processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from pydantic import ValidationError

from peftcli import data, inject, methods, models, recipe, targets
from peftcli.errors import PeftcliError, Problem, RecipeError
from peftcli.recipe import LoadedRecipe
from peftcli.run.packing import check_quantization

if TYPE_CHECKING:
    from peftcli.data import Dataset, PreparedData
    from peftcli.methods._place import Site
    from peftcli.methods._protocol import Method, MethodConfig
    from peftcli.run.opening import Base

SPREADABLE = ("adamw", "sgd")
"""Optimizers whose arithmetic is right on a share of a tensor: each number's step depends on that number alone."""


def check_method(loaded: LoadedRecipe) -> tuple[type[Method], MethodConfig]:
    """Returns the recipe's method and its checked fields.

    Raises:
        RecipeError: A field has a wrong value; all are listed with their lines.
    """
    fields = dict(loaded.recipe.method)
    method = methods.load(fields["type"])
    try:
        return method, method.Config.model_validate(fields)
    except ValidationError as error:
        raise RecipeError.of(recipe.problems_from_pydantic(error, ("method",), loaded.locate)) from error


@dataclass(frozen=True)
class Fit:
    """What a recipe trains in its model, found without weights.

    Attributes:
        sites: The adapted modules.
        trains_base: Whether parameters of the base itself train.
    """

    sites: list[Site]
    trains_base: bool


def find_sites(loaded: LoadedRecipe, base: Base, method: type[Method], config: MethodConfig) -> Fit:
    """Returns what the recipe trains, found without weights.

    Raises:
        RecipeError: They cannot be; each problem carries the recipe's line.
    """
    check_task(loaded, method)
    try:
        skeleton = models.skeleton(base.config, base.section.task)
        sites = targets.find_sites(skeleton, method, config)
        inject.check(method, config, sites, skeleton)
        check_quantization(loaded.recipe.quantization, skeleton, method, config)
    except RecipeError as error:
        raise RecipeError.of(located(loaded, error)) from error
    return Fit(sites, inject.trains_base(skeleton, method, config))


def check_task(loaded: LoadedRecipe, method: type[Method]) -> None:
    """Raises a RecipeError where the method cannot do the recipe's task."""
    task, name = loaded.recipe.model.task, loaded.recipe.method["type"]
    if method.tasks is not None and task not in method.tasks:
        raise RecipeError(
            f"method.type: {name} does not do model.task: {task}",
            where=loaded.where("method", "type"),
            hint=f"it does {', '.join(sorted(method.tasks))}",
        )


def check_checkpointing(loaded: LoadedRecipe, method: type[Method], config: MethodConfig) -> None:
    """Raises a RecipeError where activations are to be recomputed and the method cannot have that."""
    obstacle = method.obstacle(config, "checkpointing")
    if loaded.recipe.training.gradient_checkpointing and obstacle is not None:
        where = loaded.where("training", "gradient_checkpointing")
        raise RecipeError(f"training.gradient_checkpointing: {obstacle}", where=where, hint="set it to false")


def check_spreading(loaded: LoadedRecipe, base: Base, method: type[Method], precision: str) -> None:
    """Raises a RecipeError where the base is to be spread over processes and cannot be."""
    optim, problems = loaded.recipe.training.optim, []
    if base.quantization is not None and base.quantization.type == "int8":
        problems.append("int8 keeps each weight's scales beside it, and they cannot be spread: use nf4")
    if method.place == "nowhere" and precision == "fp16":
        problems.append("a loss scale cannot follow gradients that are spread: use training.mixed_precision bf16")
    if method.place == "nowhere" and optim not in SPREADABLE:
        problems.append(f"training.optim: {optim} works on whole weights: use {' or '.join(SPREADABLE)}")
    if problems:
        where = loaded.where("distributed", "strategy")
        hint, strategy = "or set distributed.strategy to ddp", loaded.recipe.distributed.strategy
        raise RecipeError.of(Problem(f"distributed.strategy: {strategy}: {text}", where, hint) for text in problems)


def settle(
    loaded: LoadedRecipe,
    method: type[Method],
    config: MethodConfig,
    base: Base,
    prepared: PreparedData,
    num_processes: int = 1,
) -> MethodConfig:
    """Returns `config` with what the method wanted to find in tokenizer and data.

    Raises:
        RecipeError: The method cannot do with these data, or as many steps; each problem carries the recipe's line.
    """
    if base.reads_images:
        _check_steps(loaded, method, config, prepared.train, num_processes)
        return config
    from peftcli.data.facts import DataFacts

    samples = cast("data.EncodedDataset", prepared.train)
    known = DataFacts(base.tokenizer, samples, prepared.labels or (), prepared.num_tasks)
    try:
        settled: MethodConfig = method.prepare(config, known)
    except RecipeError as error:
        raise RecipeError.of(located(loaded, error)) from error
    _check_steps(loaded, method, settled, prepared.train, num_processes)
    held_out = cast("data.EncodedDataset | None", prepared.eval)
    longest = max(int(one.lengths.max(initial=0)) for one in (samples, held_out) if one is not None)
    _check_positions(loaded, method.num_positions(settled), models.max_positions(base.config), longest)
    return settled


def _check_steps(
    loaded: LoadedRecipe, method: type[Method], config: MethodConfig, samples: Dataset, num_processes: int
) -> None:
    """Raises a RecipeError where the method cannot do with as many steps as the recipe's training takes."""
    from peftcli.run.batches import step_plan
    from peftcli.training.schedule import total_steps

    plan = step_plan(loaded.recipe, samples, method.num_virtual_tokens(config), world_size=num_processes)
    num_steps = total_steps(loaded.recipe.training, plan.steps_per_epoch)
    problems = [Problem(f"method.{message}") for message in method.check_steps(config, num_steps)]
    if problems:
        raise RecipeError.of(located(loaded, RecipeError.of(problems)))


def _check_positions(loaded: LoadedRecipe, taken: int, positions: int | None, longest: int) -> None:
    """Raises a RecipeError where the longest sample and the positions `taken` by the method are more than there are."""
    if not taken or positions is None or longest + taken <= positions:
        return
    room = positions - taken
    raise RecipeError(
        f"method.num_virtual_tokens: {taken:,}, with the {longest:,} tokens of the longest sample, are more than the "
        f"model's {positions:,} positions",
        where=loaded.where("method", "num_virtual_tokens"),
        hint=f"set data.max_length to {room} or less" if room > 1 else f"set it to {positions - longest} or less",
    )


def located(loaded: LoadedRecipe, error: PeftcliError) -> Iterator[Problem]:
    """Yields the error's problems with the recipe's lines, told from the `method.field` that each begins with."""
    for problem in error.problems:
        key = problem.message.partition(":")[0].split(".")
        yield replace(problem, where=loaded.where(*key))
