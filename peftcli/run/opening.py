"""Opens what a recipe names, as far as each command needs it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from peftcli import data, inject, methods, models, recipe
from peftcli.data.batching import Batcher
from peftcli.errors import Problem, RecipeError
from peftcli.recipe import LoadedRecipe, Recipe

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from peftcli.data import PreparedData, RawData
    from peftcli.methods._protocol import Method, Site, Targets
    from peftcli.models import ModelSource


@dataclass(frozen=True)
class Base:
    """A base model, opened but without its weights."""

    section: recipe.ModelSection
    source: ModelSource
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase

    @property
    def revision(self) -> str | None:
        """The hub commit that was read, or the revision asked for."""
        return getattr(self.config, "_commit_hash", None) or self.section.revision


def open_base(section: recipe.ModelSection, tokenizer_from: Path | None = None) -> Base:
    """Returns the base model's configuration and tokenizer; the tokenizer of the folder `tokenizer_from` if given."""
    source = models.locate(section)
    config = models.load_config(section, source)
    if tokenizer_from is not None and (tokenizer_from / "tokenizer_config.json").is_file():
        kept = recipe.ModelSection(name=str(tokenizer_from))
        return Base(section, source, config, models.load_tokenizer(kept, models.ModelSource(kept.name, True, {})))
    return Base(section, source, config, models.load_tokenizer(section, source))


def load_weights(base: Base, device: torch.device) -> PreTrainedModel:
    """Returns the base model with its weights on `device`."""
    return models.load_model(base.section, base.source, base.config, device)


def check_method(loaded: LoadedRecipe) -> tuple[type[Method], Targets]:
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
    return data.read(wanted.data, wanted.training.seed)


def encode_data(wanted: Recipe, raw: RawData, base: Base) -> PreparedData:
    """Returns the recipe's rows, encoded for its model."""
    return data.prepare(
        wanted.data,
        base.tokenizer,
        vocab_size=models.vocabulary_size(base.config),
        max_positions=models.max_positions(base.config),
        seed=wanted.training.seed,
        raw=raw,
    )


def find_sites(loaded: LoadedRecipe, base: Base, method: type[Method], config: Targets) -> list[Site]:
    """Returns the modules that the recipe adapts, found without weights.

    Raises:
        RecipeError: They cannot be; each problem carries the recipe's line.
    """
    try:
        sites = inject.find_sites(models.skeleton(base.config), config)
        inject.check(method, config, sites)
    except RecipeError as error:
        raise RecipeError.of(_located(loaded, error)) from error
    return sites


def _located(loaded: LoadedRecipe, error: RecipeError) -> Iterator[Problem]:
    """Yields the error's problems with the recipe's lines, told from the `method.field` that each begins with."""
    for problem in error.problems:
        key = problem.message.partition(":")[0].split(".")
        yield replace(problem, where=loaded.where(*key))


def make_batcher(dataset: data.EncodedDataset, base: Base, *, joins: bool, always: bool = False) -> Batcher:
    """Returns what makes batches of `dataset`; see `Batcher` for `joins` and `always`."""
    hidden = int(base.config.get_text_config().hidden_size)
    return Batcher(dataset, base.tokenizer.pad_token_id, hidden, joins, always)
