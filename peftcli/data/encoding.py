"""Rows to encoded samples: every row is checked, cut or dropped by the recipe's policy, and accounted for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from peftcli.data.chat import Chat, check_template, messages_of, render_answers, special_tokens
from peftcli.data.dataset import EncodedDataset, EncodingReport, Sample
from peftcli.data.formats import BadRow, Example, example, renamed
from peftcli.data.readers import MAX_PROBLEMS, type_name
from peftcli.data.rows import Row, Rows
from peftcli.data.tokenization import Tokenized, encode_chats, encode_examples
from peftcli.errors import DataError, ModelError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftcli.recipe.schema import DataSection

CHUNK_ROWS = 512  # enough for the tokenizer to use all cores, little enough to hold as Python lists
SHOWN_TOKENS = 48


@dataclass
class _Tally:
    """What has happened so far; `lost` is a sample without supervision, to show if nothing else is left."""

    longest: int = 0
    truncated: int = 0
    dropped_overlong: int = 0
    dropped_unsupervised: int = 0
    straddling: int = 0
    lost: tuple[str, Sample] | None = None
    problems: list[Problem] = field(default_factory=list)


def encode(
    rows: Rows, form: str, data: DataSection, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> tuple[EncodedDataset, EncodingReport]:
    """Returns the samples of `rows` and the account of them.

    Args:
        rows: The dataset.
        form: Its format, see `formats.resolve_format`.
        data: The recipe's data section.
        tokenizer: The model's.
        vocab_size: Rows of the model's embedding; every token id must be below it.

    Raises:
        DataError: Rows cannot be used (up to five are named), or no row leaves anything to learn.
        ModelError: The tokenizer makes ids that the model does not have, or lacks what the format needs.
    """
    encoder = _Encoder(rows, form, data, tokenizer, vocab_size)
    parts = [encoder.chunk(range(at, min(at + CHUNK_ROWS, len(rows)))) for at in range(0, len(rows), CHUNK_ROWS)]
    return encoder.finish(EncodedDataset.join(parts))


class _Encoder:
    """Encodes chunk by chunk and keeps the tally."""

    def __init__(
        self, rows: Rows, form: str, data: DataSection, tokenizer: PreTrainedTokenizerBase, vocab_size: int
    ) -> None:
        if form == "messages":
            check_template(tokenizer)
        self.rows, self.form, self.data = rows, form, data
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.marks = special_tokens(tokenizer)
        self.tally = _Tally()

    def chunk(self, indices: Sequence[int]) -> EncodedDataset:
        """Returns the samples of some rows; none once a row was bad, from when on rows are only checked."""
        texts: list[Chat | Example] = []
        origins: list[int] = []
        if len(self.tally.problems) < MAX_PROBLEMS:
            for index, row in zip(indices, self.rows.take(indices), strict=True):
                found = self._texts(row, index)
                texts += found
                origins += [index] * len(found)
        if self.tally.problems:
            return EncodedDataset.of([])
        kept = [self._fit(one, origin) for one, origin in zip(self._tokenize(texts), origins, strict=True)]
        return EncodedDataset.of([sample for sample in kept if sample is not None])

    def _texts(self, row: Row, index: int) -> Sequence[Chat | Example]:
        """Returns what one row says; nothing, and a problem in the tally, if it is bad."""
        try:
            row = renamed(row, self.data.columns)
            if self.form == "messages":
                return render_answers(messages_of(row), self.tokenizer, self.marks, _tools(row))
            return [example(row, self.form)]
        except BadRow as bad:
            self.tally.problems.append(Problem(str(bad), self.rows.where(index), bad.hint))
            return []

    def _tokenize(self, texts: Sequence[Chat | Example]) -> list[Tokenized]:
        """Returns the texts as ids and masks; all are chats or none is."""
        on_all = self.data.train_on == "all"
        chats = [text for text in texts if isinstance(text, Chat)]
        examples = [text for text in texts if isinstance(text, Example)]
        found = encode_chats(chats, self.tokenizer, train_on_all=on_all) if chats else []
        return found + (encode_examples(examples, self.tokenizer, train_on_all=on_all) if examples else [])

    def _fit(self, one: Tokenized, index: int) -> Sample | None:
        """Returns the sample within `data.max_length`, or None where it is dropped."""
        sample, limit, tally = one.sample, self.data.max_length, self.tally
        self._check_ids(sample, index)
        length = len(sample.input_ids)
        tally.longest = max(tally.longest, length)
        tally.straddling += one.straddles
        if length > limit and self.data.overlong == "error":
            problem = f"{length:,} tokens, but data.max_length is {limit:,} and data.overlong is error"
            hint = "raise data.max_length, or set data.overlong to truncate or drop"
            self.tally.problems.append(Problem(problem, self.rows.where(index), hint))
        if length > limit and self.data.overlong == "drop":
            tally.dropped_overlong += 1
            return None
        if not sample.supervised[:limit].any():
            tally.dropped_unsupervised += 1
            tally.lost = tally.lost or (self.rows.where(index), sample)
            return None
        tally.truncated += length > limit
        return Sample(sample.input_ids[:limit], sample.supervised[:limit])

    def _check_ids(self, sample: Sample, index: int) -> None:
        """Raises a ModelError where the tokenizer has more tokens than the model."""
        highest = int(sample.input_ids.max(initial=0))
        if highest >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            raise ModelError(
                f'the tokenizer makes id {highest} ("{token}"), but the model\'s embedding has {self.vocab_size} rows',
                where=self.rows.where(index),
                hint="tokenizer and model do not belong together, or tokens were added to only one of them",
            )

    def finish(self, dataset: EncodedDataset) -> tuple[EncodedDataset, EncodingReport]:
        """Returns the dataset with its report, or raises what is wrong with it."""
        tally = self.tally
        if tally.problems:
            raise DataError.of(tally.problems[:MAX_PROBLEMS])
        if not len(dataset):
            raise self._nothing_left()
        return dataset, EncodingReport(
            rows=len(self.rows),
            samples=len(dataset),
            tokens=len(dataset.input_ids),
            supervised=int(np.count_nonzero(dataset.supervised)),
            max_length=self.data.max_length,
            longest=tally.longest,
            truncated=tally.truncated,
            dropped_overlong=tally.dropped_overlong,
            dropped_unsupervised=tally.dropped_unsupervised,
            straddling=tally.straddling,
        )

    def _nothing_left(self) -> DataError:
        """Returns the error for a dataset without one supervised token; it shows a sample and says why."""
        limit = self.data.max_length
        if self.tally.lost is None:
            return DataError(
                f"every sample is longer than data.max_length = {limit:,} tokens, and data.overlong is drop",
                where=self.rows.name,
                hint=f"raise data.max_length (the longest sample has {self.tally.longest:,} tokens)",
            )
        where, sample = self.tally.lost
        answer = np.flatnonzero(sample.supervised)
        shown = self.tokenizer.convert_ids_to_tokens(sample.input_ids[: min(limit, SHOWN_TOKENS)].tolist())
        start = f"nothing to learn in any of {len(self.rows):,} rows. This one, as the model would see it: "
        tokens = " ".join(map(repr, shown)) + (" ..." if len(sample.input_ids) > len(shown) else "")
        if len(answer):
            why = f"its answer starts at token {answer[0] + 1:,}, and data.max_length is {limit:,}"
            hint = f"raise data.max_length; this row needs {len(sample.input_ids):,}"
        else:
            why, hint = "the tokenizer has no tokens for its answer", "check that the tokenizer is the model's"
        return DataError(f"{start}{tokens}; {why}", where=where, hint=hint)


def _tools(row: Row) -> list[Any] | None:
    """Returns the tools that the row offers the model; some datasets hold them as JSON text."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise BadRow(f"tools is not JSON: {error.msg} at column {error.colno}") from None
    if tools in (None, "", []):
        return None
    if not isinstance(tools, list):
        raise BadRow(f"tools is {type_name(tools)}, not a list")
    return tools
