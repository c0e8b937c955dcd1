"""Text to token ids and loss masks, a batch at a time.

Masks follow from positions alone, never from ids: where the padding token is the EOS token, as in many models, a mask
by id would hide the end of every answer and the model would never learn to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from peftcli.data.chat import Chat, common_prefix, end_of_text
from peftcli.data.dataset import Ids, Mask, Sample
from peftcli.data.formats import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokenized:
    """One sample, and what is to be known of how it came about.

    Attributes:
        sample: The tokens: all of them, or, where the tokenizer must do the cutting, those within the limit.
        length: How many tokens there were before anything was cut; of the longer text where there are two.
        straddles: Whether one of its tokens covers both prompt and answer.
        wordless: Words of which the tokenizer makes no token.
    """

    sample: Sample
    length: int
    straddles: bool = False
    wordless: int = 0


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, train_on_all: bool
) -> list[Tokenized]:
    """Returns prompt and answer as one sequence that ends in EOS, supervised after the prompt.

    The prompt ends where the ids of prompt and answer together stop being the ids of the prompt alone: a token that
    covers the end of one and the start of the other is not part of what inference feeds, so it is supervised.
    Text without a prompt is supervised throughout.
    """
    end_of_text(tokenizer)
    prompts = tokenize([example.prompt for example in examples], tokenizer)
    wholes = tokenize([example.prompt + example.answer for example in examples], tokenizer)
    encoded = []
    for example, prompt, whole in zip(examples, prompts, wholes, strict=True):
        ids = whole if whole[-1:] == [tokenizer.eos_token_id] else [*whole, tokenizer.eos_token_id]
        given = common_prefix(prompt, ids)
        straddles = bool(example.prompt) and given < len(_without_end(prompt, tokenizer))
        mask = np.ones(len(ids), np.uint8)
        mask[: 0 if train_on_all else given] = 0
        encoded.append(Tokenized(_sample(np.array(ids, np.int32), mask), len(ids), straddles))
    return encoded


def encode_chats(chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, *, train_on_all: bool) -> list[Tokenized]:
    """Returns rendered chats as ids, supervised where a token covers any character of an answer."""
    batch = tokenizer(
        [chat.text for chat in chats],
        add_special_tokens=False,  # the template has written them
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    pairs: list[tuple[list[int], list[tuple[int, int]]]] = list(
        zip(batch["input_ids"], batch["offset_mapping"], strict=True)
    )
    encoded = []
    for chat, (ids, offsets) in zip(chats, pairs, strict=True):
        spans = ((0, len(chat.text)),) if train_on_all else chat.spans
        mask = _mask_of_spans(np.array(offsets, np.int64).reshape(-1, 2), spans)
        encoded.append(Tokenized(_sample(np.array(ids, np.int32), mask), len(ids)))
    return encoded


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the ids of each text, with the special tokens that the tokenizer adds by itself, but never two BOS."""
    batch: Any = tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False)
    return [without_second_bos(ids, tokenizer) for ids in batch["input_ids"]]


def without_second_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns ids with one BOS where the text had it written out and the tokenizer has put its own before it."""
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns ids without an EOS that the tokenizer has added to them."""
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def _mask_of_spans(offsets: npt.NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> Mask:
    """Returns 1 for each token [L] that covers a character of one of the spans.

    A token is taken to start where the one before it ended: some tokenizers leave the white space of a token out of
    its offsets [L, 2], and the token of a lone space would otherwise cover nothing. The later bytes of a character
    that is split over several tokens have the offsets of the first, and its mask.
    """
    if not len(offsets):
        return np.zeros(0, np.uint8)
    ends = np.maximum.accumulate(offsets[:, 1])
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    mask = np.zeros(len(ends), np.bool_)
    for start, end in spans:
        mask |= (starts < end) & (ends > start)
    covers = ends > starts
    first_of_char = np.maximum.accumulate(np.where(covers, np.arange(len(ends)), 0))
    return mask[first_of_char].astype(np.uint8)


def _sample(ids: Ids, mask: Mask) -> Sample:
    """Returns the sample; nothing comes before its first token, so that one cannot be predicted."""
    mask[:1] = 0
    return Sample(ids, mask)
