"""Opens what a recipe names, as far as each command needs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from pydantic import ValidationError

from peftcli import data, inject, methods, models, recipe, startup, targets
from peftcli.data.batching import Batcher, Batches
from peftcli.data.meaning import Meaning
from peftcli.errors import ModelError, PeftcliError, Problem, RecipeError
from peftcli.quantization import stored_fields
from peftcli.recipe import LoadedRecipe, Recipe
from peftcli.reporting import Reporter
from peftcli.run.packing import check_quantization, load_packed, pack
from peftcli.run.prepacked import held
from peftcli.training import memory

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from peftcli.data import Dataset, PreparedData, RawData
    from peftcli.methods._protocol import Method, MethodConfig, Site
    from peftcli.models import ModelSource


@dataclass(frozen=True)
class Base:
    """A base model, opened but without its weights.

    Attributes:
        section: The recipe's model section.
        source: Where its files are.
        config: Its configuration, which knows the labels.
        processor: Its tokenizer, or its image processor.
        meaning: What its data is encoded for.
        remarks: What was decided on the way and the user should know.
        quantization: How its linear layers are held in 4 bits; None where they are not.
        dense: Paths, or their ends, of modules that are not, beside the heads.
    """

    section: recipe.ModelSection
    source: ModelSource
    config: PretrainedConfig
    processor: PreTrainedTokenizerBase | BaseImageProcessor
    meaning: Meaning = field(default_factory=Meaning)
    remarks: tuple[str, ...] = ()
    quantization: recipe.QuantizationSection | None = None
    dense: tuple[str, ...] = ()

    @property
    def comes_packed(self) -> bool:
        """Whether its layers are packed in its files already."""
        return bool(stored_fields(self.config))

    @property
    def reads_images(self) -> bool:
        """Whether the model's inputs are images instead of text."""
        return self.section.task == "image-classification"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of a model that reads text."""
        assert not self.reads_images
        return cast("PreTrainedTokenizerBase", self.processor)

    @property
    def pad_token_id(self) -> int | None:
        """The id that batches are padded with: a decoder that labels texts finds their end by it."""
        ids: tuple[int | None, ...] = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return ids[0] if ids[0] is not None or self.section.task != "sequence-classification" else ids[1]

    @property
    def revision(self) -> str | None:
        """The hub commit that was read, or the revision asked for."""
        return getattr(self.config, "_commit_hash", None) or self.section.revision


def open_base(
    section: recipe.ModelSection,
    tokenizer_from: Path | None = None,
    meaning: Meaning | None = None,
    packed: recipe.QuantizationSection | None = None,
) -> Base:
    """Returns the base model's configuration and tokenizer or image processor.

    Args:
        section: The recipe's model section.
        tokenizer_from: A folder whose tokenizer or image processor is to be used, if it has one.
        meaning: The labels and tasks of the data; None where there are none.
        packed: The recipe's quantization section.
    """
    source = models.locate(section)
    config = models.load_config(section, source)
    known = in_order_of(config, meaning or Meaning(section.task))
    if known.labels is not None:
        models.set_labels(config, known.labels.names, known.labels.kind)
    images = section.task == "image-classification"
    load = models.load_image_processor if images else models.load_tokenizer
    kept = "preprocessor_config.json" if images else "tokenizer_config.json"
    own = section
    if tokenizer_from is not None and (tokenizer_from / kept).is_file():
        own = recipe.ModelSection.model_construct(name=str(tokenizer_from))
    where = source if own is section else models.ModelSource(own.name, True, {})
    quantization = held(packed, config, section.name)
    base = _with_padding(Base(section, source, config, load(own, where), known, (), quantization))
    startup.done()  # transformers is in by now, which is the last large thing to import
    return base


def in_order_of(config: PretrainedConfig, meaning: Meaning) -> Meaning:
    """Returns the labels in the model's own order, where it has a head for exactly these names, else as they are."""
    labels = meaning.labels
    own: dict[Any, str] = config.id2label or {}
    if labels is None or set(own.values()) != set(labels.names):
        return meaning
    return replace(meaning, labels=replace(labels, names=tuple(own[i] for i in sorted(own))))


def _with_padding(base: Base) -> Base:
    """Returns `base` with the padding token that a decoder needs to find the end of a text that it labels."""
    if base.section.task != "sequence-classification":
        return base
    text, pad = base.config.get_text_config(), base.pad_token_id
    if pad is None:
        raise ModelError(
            "model.task: sequence-classification needs a padding or end-of-sequence token, and the tokenizer has none"
        )
    if getattr(text, "pad_token_id", None) == pad:
        return base
    text.pad_token_id = pad
    token = base.tokenizer.convert_ids_to_tokens(pad)
    return replace(
        base,
        remarks=(
            *base.remarks,
            f"texts are padded with {token}: the model names no padding token",
        ),
    )


def load_weights(
    base: Base,
    device: torch.device,
    seed: int = 0,
    reporter: Reporter | None = None,
    *,
    wide: bool = False,
    hold_on: torch.device | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """Returns the base model with its weights, and the names of the parameters that start anew.

    Args:
        base: The model, opened.
        device: Where it will compute, which decides its dtypes.
        seed: Decides the start of what starts anew.
        reporter: Where is noted what was packed.
        wide: Hold the weights in float32 where the recipe leaves it open, because they are to train themselves.
        hold_on: Where the weights lie for now, if not on `device`, which may have no room for all of them.
    """
    section, home = base.section, hold_on or device
    if wide and section.dtype == "auto":
        section = section.model_copy(update={"dtype": "float32"})
    dtype = str(models.resolve_dtype(section, base.config, device)).removeprefix("torch.")
    section = section.model_copy(update={"dtype": dtype})
    with memory.loading_explained(section.name, dtype, device, packed=base.quantization is not None):
        if base.quantization is None:
            return models.load_model(section, base.source, base.config, home, seed)
        if base.comes_packed:
            return load_packed(base, section, device, seed, reporter, home)
        model, fresh = models.load_model(section, base.source, base.config, torch.device("cpu"), seed)
        return pack(model, base, fresh, device, reporter, home), fresh


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


def read_data(wanted: Recipe) -> RawData:
    """Returns the recipe's rows, not yet encoded: its files' mistakes show before the model is touched."""
    return data.read(wanted.data, wanted.training.seed, wanted.model)


def encode_data(wanted: Recipe, raw: RawData, base: Base) -> PreparedData:
    """Returns the recipe's rows, encoded for its model."""
    return data.prepare(
        wanted.data,
        None if base.reads_images else base.tokenizer,
        vocab_size=models.vocabulary_size(base.config),
        max_positions=models.max_positions(base.config),
        seed=wanted.training.seed,
        raw=replace(raw, meaning=base.meaning),
    )


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


SPREADABLE = ("adamw", "sgd")
"""Optimizers whose arithmetic is right on a share of a tensor: each number's step depends on that number alone."""


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


def make_batcher(
    dataset: Dataset, base: Base, *, joins: bool, always: bool = False, prompts: Sequence[tuple[int, ...]] = ()
) -> Batches:
    """Returns what makes batches of `dataset`; see `Batcher` for `joins`, `always` and `prompts`."""
    if not isinstance(dataset, data.EncodedDataset):
        from peftcli.data.images import ImageBatcher

        channels = int(getattr(base.config, "num_channels", 3))
        return ImageBatcher(dataset, cast("BaseImageProcessor", base.processor), channels)
    hidden = int(base.config.get_text_config().hidden_size)
    positions = models.max_positions(base.config)
    return Batcher(dataset, base.pad_token_id, hidden, joins, always, prompts, positions)
