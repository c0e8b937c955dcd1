"""Virtual tokens: how many there are, and the real tokens that they may start from.

Prompts and prefixes both learn faster from where real words are. Which words is chosen here for both; what a word
gives, an embedding or keys and values, is each method's own.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from pydantic import Field, field_validator, model_validator

from peftcli.errors import RecipeError
from peftcli.methods._protocol import Facts, MethodConfig

NUM_FREQUENT = 5000
"""How many of the most frequent tokens a start is sampled from (Lester et al. 2021, section 3.2)."""

SAMPLED = ("sampled-vocab", "class-label")
"""The values of `init` that sample tokens, all of them or the rest."""
FROM_TOKENS = (*SAMPLED, "text")
"""The values of `init` that start from real tokens."""

Config = TypeVar("Config", bound="VirtualTokens")


class VirtualTokens(MethodConfig):
    """The fields that say how many virtual tokens there are, and which real ones they start from."""

    num_virtual_tokens: int = Field(20, ge=1, description="How many virtual tokens go before every sample.")
    init: str = "random"
    init_text: str | None = Field(
        None, min_length=1, description="With init text: the words to start from, repeated or cut to fit."
    )
    init_tokens: list[list[int]] | None = Field(
        None, description="The token ids that each virtual token starts from, averaged. Left out: as init says."
    )
    init_vocabulary: list[int] | None = Field(
        None, min_length=1, description="The token ids to sample from. Left out: the 5,000 that the data uses most."
    )

    @field_validator("init_tokens")
    @classmethod
    def _each_has_a_token(cls, value: list[list[int]] | None) -> list[list[int]] | None:
        if value is not None and not all(value):
            raise ValueError("each virtual token needs at least one token to start from")
        return value

    @model_validator(mode="after")
    def _text_belongs_to_init(self) -> VirtualTokens:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init_text: it says the words of init: text, and nothing else")
        if self.init_tokens is not None and self.init not in FROM_TOKENS:
            raise ValueError(f"init_tokens: init {self.init} starts from no tokens")
        if self.init_vocabulary is not None and self.init not in SAMPLED:
            raise ValueError(f"init_vocabulary: init {self.init} samples no tokens")
        if len(self.init_tokens or ()) > self.num_virtual_tokens:
            raise ValueError(f"init_tokens: there are more than num_virtual_tokens = {self.num_virtual_tokens}")
        return self


def prepare(config: Config, facts: Facts) -> Config:
    """Returns `config` with the tokens that its `init` means: those of a text, or those to sample from.

    Raises:
        RecipeError: The text has no tokens.
    """
    if config.init == "text" and config.init_tokens is None:
        ids = facts.tokenize(config.init_text or "")
        if not ids:
            raise RecipeError("method.init_text: the model's tokenizer has no tokens for it")
        tiled = ids * (config.num_virtual_tokens // len(ids) + 1)
        return config.model_copy(update={"init_tokens": [[index] for index in tiled[: config.num_virtual_tokens]]})
    if config.init_vocabulary is None and config.init in SAMPLED:
        return config.model_copy(update={"init_vocabulary": list(facts.frequent_ids[:NUM_FREQUENT])})
    return config


def check(config: VirtualTokens, vocabulary: int) -> list[str]:
    """Returns what is wrong with the start that `config` names for a model of `vocabulary` ids, one message each."""
    named = [index for one in config.init_tokens or () for index in one]
    problems = []
    for field, ids in (("init_tokens", named), ("init_vocabulary", config.init_vocabulary or [])):
        unknown = next((index for index in ids if not 0 <= index < vocabulary), None)
        if unknown is not None:
            problems.append(f"{field}: {unknown} is not an id of this model, which has 0 to {vocabulary - 1}")
    return problems


def choose(config: VirtualTokens, vocabulary: int, generator: torch.Generator) -> list[list[int]]:
    """Returns the ids that each virtual token starts from: those that `config` names, and for the rest sampled ones.

    No id is sampled twice unless there are fewer than are needed. An unprepared `config` samples from the lowest ids,
    as the official code does, since tokenizers number their tokens roughly by frequency.
    """
    named = config.init_tokens or []
    pool = config.init_vocabulary or range(min(NUM_FREQUENT, vocabulary))
    missing = config.num_virtual_tokens - len(named)
    if missing > len(pool):
        order = torch.randint(len(pool), (missing,), generator=generator)
    else:
        order = torch.randperm(len(pool), generator=generator)[:missing]
    return named + [[pool[position]] for position in order.tolist()]
