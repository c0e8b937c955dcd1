"""Labelled texts, tagged words, and prompts with an answer of their own, as token ids and targets.

Unlike a causal model's text, these end in special tokens that must stay (`[SEP]`, `</s>`): what is too long is cut by
the tokenizer, not by us.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from peftcli.data.chat import end_of_text
from peftcli.data.dataset import IGNORED, Sample, Target
from peftcli.data.formats import BadRow, Example, checked_text, missing, text_field
from peftcli.data.labels import Labels
from peftcli.data.readers import type_name
from peftcli.data.rows import Row
from peftcli.data.tokenization import Tokenized, without_second_bos
from peftcli.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LabelledText:
    """A text, perhaps with a second one, and the target that its label stands for."""

    text: str
    pair: str | None
    target: Target


@dataclass(frozen=True)
class TaggedWords:
    """The words of a sentence and the number of each one's tag."""

    words: list[str]
    tags: list[int]


def labelled_text(row: Row, labels: Labels, *, paired: bool) -> LabelledText:
    """Returns what one row of the format `classification` says.

    Raises:
        BadRow: A field is missing, empty, or of another type.
    """
    if "label" not in row:
        raise missing(row, "label")
    pair = text_field(row, "text_pair") if paired else None
    return LabelledText(text_field(row, "text"), pair, labels.target(row["label"]))


def tagged_words(row: Row, labels: Labels) -> TaggedWords:
    """Returns what one row of the format `token-classification` says.

    Raises:
        BadRow: A field is missing, there is not a tag for each word, or a word or tag is not one.
    """
    for name in ("tokens", "tags"):
        if name not in row:
            raise missing(row, name)
        if not isinstance(row[name], list):
            raise BadRow(f"{name} is {type_name(row[name])}, not a list")
    words, tags = row["tokens"], row["tags"]
    if not words:
        raise BadRow("tokens is empty", "take the row out")
    if len(words) != len(tags):
        raise BadRow(f"{len(words)} tokens, but {len(tags)} tags")
    checked = [checked_text(word, f"tokens[{i}]") for i, word in enumerate(words)]
    return TaggedWords(checked, [labels.number(tag, f"tags[{i}]") for i, tag in enumerate(tags)])


def encode_labelled(items: Sequence[LabelledText], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[Tokenized]:
    """Returns each text, or pair of texts, as the tokenizer joins it, cut to `limit` tokens, with its target."""
    texts = [item.text for item in items]
    pairs = [item.pair for item in items if item.pair is not None] or None
    # In this order: the tokenizer keeps its last setting, and must not be saved as one that cuts.
    cut: Any = tokenizer(texts, pairs, return_attention_mask=False, truncation=True, max_length=limit, verbose=False)
    whole: Any = tokenizer(texts, pairs, return_attention_mask=False, verbose=False)
    types = cut["token_type_ids"] if pairs and "token_type_ids" in cut else [None] * len(items)
    return [
        Tokenized(
            Sample(
                np.array(ids, np.int32),
                np.zeros(len(ids), np.uint8),
                item.target,
                None if kinds is None else np.array(kinds, np.uint8),
            ),
            len(full),
        )
        for item, ids, full, kinds in zip(items, cut["input_ids"], whole["input_ids"], types, strict=True)
    ]


def encode_words(items: Sequence[TaggedWords], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[Tokenized]:
    """Returns each sentence cut to `limit` tokens, with a word's tag at its first token and -100 everywhere else.

    Raises:
        ModelError: The tokenizer cannot say which word a token is of.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            f"{type(tokenizer).__name__} cannot say which word a token is of, as tags need",
            hint="the model folder needs a tokenizer.json",
        )
    words = [item.words for item in items]
    options: dict[str, Any] = {"is_split_into_words": True, "return_attention_mask": False, "verbose": False}
    cut: Any = tokenizer(words, truncation=True, max_length=limit, **options)
    whole: Any = tokenizer(words, **options)
    encoded = []
    for i, item in enumerate(items):
        ids = np.array(cut["input_ids"][i], np.int32)
        target = _aligned(cut.word_ids(i), item.tags)
        wordless = len(item.words) - len({word for word in whole.word_ids(i) if word is not None})
        sample = Sample(ids, (target != IGNORED).astype(np.uint8), target)
        encoded.append(Tokenized(sample, len(whole["input_ids"][i]), wordless=wordless))
    return encoded


def _aligned(word_ids: Sequence[int | None], tags: Sequence[int]) -> Target:
    """Returns the tag's number at the first token of each word and -100 at all other tokens [L]."""
    before: list[int | None] = [None, *word_ids]
    labels = [
        IGNORED if word is None or word == last else tags[word] for last, word in zip(before, word_ids, strict=False)
    ]
    return np.array(labels, np.int32)


def encode_answers(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[Tokenized]:
    """Returns each prompt as the encoder's ids and its answer as the decoder's, each cut to `limit` tokens.

    An answer ends in EOS, unless it is cut: a model that learned to end there would stop short.
    """
    end_of_text(tokenizer)
    prompts = [example.prompt for example in examples]
    options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    cut: Any = tokenizer(prompts, truncation=True, max_length=limit, **options)
    whole: Any = tokenizer(prompts, **options)
    answers: Any = tokenizer(text_target=[example.answer for example in examples], **options)
    encoded = []
    for ids, full, answer in zip(cut["input_ids"], whole["input_ids"], answers["input_ids"], strict=True):
        kept = without_second_bos(ids, tokenizer)
        ended = answer if answer[-1:] == [tokenizer.eos_token_id] else [*answer, tokenizer.eos_token_id]
        sample = Sample(np.array(kept, np.int32), np.zeros(len(kept), np.uint8), np.array(ended[:limit], np.int32))
        encoded.append(Tokenized(sample, max(len(full), len(ended))))
    return encoded
