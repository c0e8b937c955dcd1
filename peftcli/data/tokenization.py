"""Text to token ids and loss masks, a batch at a time.

Masks follow from positions alone, never from ids: where the padding token is the EOS token, as in many models, a mask
by id would hide the end of every answer and the model would never learn to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from peftcli.data.backend import TokenBytes, num_bytes, token_ids
from peftcli.data.chat import Chat, common_prefix, end_of_text
from peftcli.data.dataset import EncodedDataset, Goal, Sample
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


@dataclass(frozen=True)
class Chunk:
    """The samples of some rows, and what is to be known of how they came about.

    Attributes:
        samples: Their tokens, as in `Tokenized`.
        lengths: How many tokens each had before anything was cut [N].
        straddling: How many have a token that covers both prompt and answer.
        wordless: Words of which the tokenizer makes no token.
    """

    samples: EncodedDataset
    lengths: npt.NDArray[np.int64]
    straddling: int = 0
    wordless: int = 0

    @classmethod
    def of(cls, encoded: Sequence[Tokenized], goal: Goal) -> Chunk:
        """Returns samples that were made one by one as a chunk."""
        return cls(
            EncodedDataset.of([one.sample for one in encoded], goal),
            np.array([one.length for one in encoded], np.int64),
            sum(one.straddles for one in encoded),
            sum(one.wordless for one in encoded),
        )


def encode_examples(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, train_on_all: bool) -> Chunk:
    """Returns prompt and answer as one sequence that ends in EOS, supervised after the prompt.

    The prompt ends where the ids of prompt and answer together stop being the ids of the prompt alone: a token that
    covers the end of one and the start of the other is not part of what inference feeds, so it is supervised.
    Text without a prompt is supervised throughout.
    """
    end_of_text(tokenizer)
    eos = tokenizer.eos_token_id
    distinct = {example.prompt: index for index, example in enumerate(examples)}
    prompts = dict(zip(distinct, tokenize(list(distinct), tokenizer), strict=True))
    wholes = tokenize([example.prompt + example.answer for example in examples], tokenizer)
    givens, straddling = [], 0
    for example, ids in zip(examples, wholes, strict=True):
        if ids[-1:] != [eos]:
            ids.append(eos)
        prompt = prompts[example.prompt]
        given = common_prefix(prompt, ids)
        straddling += bool(example.prompt) and given < len(prompt) - (prompt[-1:] == [eos])
        givens.append(0 if train_on_all else given)
    flat, offsets = _flat(wholes)
    lengths = np.diff(offsets)
    positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    mask = positions >= np.repeat(np.array(givens, np.int64), lengths)
    return Chunk(_dataset(flat, mask, offsets), lengths, straddling)


def encode_chats(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerBase, token_bytes: TokenBytes, *, train_on_all: bool
) -> Chunk:
    """Returns rendered chats as ids, supervised where a token covers any character of an answer."""
    texts = [chat.text for chat in chats]
    spans = [((0, len(chat.text)),) if train_on_all else chat.spans for chat in chats]
    ids = token_ids(texts, tokenizer, add_special_tokens=False)  # the template has written them
    flat, offsets = _flat(ids)
    ends = token_bytes.ends(texts, flat, offsets)
    sizes = [*map(num_bytes, texts)]
    if ends is None:
        ends, sizes = _character_ends(texts, tokenizer), [*map(len, texts)]
    else:
        spans = [
            tuple((num_bytes(text[:a]), num_bytes(text[:b])) for a, b in some)
            for text, some in zip(texts, spans, strict=True)
        ]
    # All texts in a line, each a place apart from the next, so that a place's number says whose it is.
    begins = np.cumsum([0, *(size + 1 for size in sizes)], dtype=np.int64)[:-1]
    pairs = [
        (begin + start, begin + end) for begin, some in zip(begins.tolist(), spans, strict=True) for start, end in some
    ]
    mask = _mask_of_spans(ends, np.array(pairs, np.int64).reshape(-1, 2), begins, offsets)
    return Chunk(_dataset(flat, mask, offsets), np.diff(offsets))


def _character_ends(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> npt.NDArray[np.int64]:
    """Returns after how many characters of its own text each token ends [T]."""
    batch = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    assert batch.encodings is not None, "`chat.check_template` refuses tokenizers that do not know offsets"
    return np.fromiter((end for one in batch.encodings for _, end in one.offsets), np.int64)


def _flat(ids: Sequence[Sequence[int]]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Returns all ids in one array [T], and where each text's start, and at last T [N + 1]."""
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return np.fromiter(chain.from_iterable(ids), np.int32, int(offsets[-1])), offsets


def _dataset(
    flat: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_], offsets: npt.NDArray[np.int64]
) -> EncodedDataset:
    """Returns the samples; nothing comes before the first token of one, so that one cannot be predicted."""
    supervised = mask.astype(np.uint8)
    supervised[offsets[:-1][np.diff(offsets) > 0]] = 0
    return EncodedDataset(flat, supervised, offsets)


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the ids of each text, with the special tokens that the tokenizer adds by itself, but never two BOS."""
    return [without_second_bos(ids, tokenizer) for ids in token_ids(texts, tokenizer)]


def without_second_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns ids with one BOS where the text had it written out and the tokenizer has put its own before it."""
    bos = tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def _mask_of_spans(
    ends: npt.NDArray[np.int64],
    spans: npt.NDArray[np.int64],
    begins: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
) -> npt.NDArray[np.bool_]:
    """Returns whether each of T tokens covers a character of one of the spans.

    A token is taken to start where the one before it ended: some tokenizers leave the white space of a token out of
    its offsets, and the token of a lone space would otherwise cover nothing. The later bytes of a character that is
    split over several tokens have the offsets of the first, and its mask.

    Args:
        ends: Where each token ends in its own text, in characters or bytes [T].
        spans: Start and end of each span in the line of all texts [S, 2].
        begins: Where each text begins in that line [N].
        offsets: Where each text's tokens start, and at last T [N + 1].
    """
    if not len(ends) or not len(spans):
        return np.zeros(len(ends), np.bool_)
    lengths, full = np.diff(offsets), np.diff(offsets) > 0
    first = offsets[:-1][full]
    # Texts follow each other in the line, so that what was reached before never lies in the next one.
    reached = np.maximum.accumulate(ends + np.repeat(begins, lengths))
    starts = np.concatenate([np.zeros(1, np.int64), reached[:-1]])
    starts[first] = begins[full]
    order = np.argsort(spans[:, 0], kind="stable")
    span_starts, span_ends = spans[order, 0], np.maximum.accumulate(spans[order, 1])
    # The first span that ends after the token's start is the one that it covers, if it covers any.
    index = np.searchsorted(span_ends, starts, side="right")
    known = np.concatenate([span_starts, [np.iinfo(np.int64).max]])
    mask = known[index] < reached
    covers = np.where(reached > starts, np.arange(len(ends)), 0)
    own_first = np.repeat(offsets[:-1], lengths)
    return np.asarray(mask[np.maximum(np.maximum.accumulate(covers), own_first)])
