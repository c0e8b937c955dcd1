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
from peftcli.data.labelled import (
    LabelledText,
    TaggedWords,
    encode_answers,
    encode_labelled,
    encode_words,
    labelled_text,
    tagged_words,
)
from peftcli.data.meaning import Meaning
from peftcli.data.readers import MAX_PROBLEMS, type_name
from peftcli.data.rows import Row, Rows
from peftcli.data.tokenization import Tokenized, encode_chats, encode_examples
from peftcli.errors import DataError, ModelError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftcli.recipe.schema import DataSection

CHUNK_ROWS = 512  # enough for the tokenizer to use all cores, little enough to hold as Python lists
SHOWN_TOKENS = 48
Item = Chat | Example | LabelledText | TaggedWords


@dataclass
class _Tally:
    """What has happened so far; `lost` is a sample without supervision, to show if nothing else is left."""

    longest: int = 0
    truncated: int = 0
    dropped_overlong: int = 0
    dropped_unsupervised: int = 0
    straddling: int = 0
    wordless: int = 0
    lost: tuple[str, Sample] | None = None
    problems: list[Problem] = field(default_factory=list)


def encode(
    rows: Rows,
    form: str,
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    meaning: Meaning | None = None,
) -> tuple[EncodedDataset, EncodingReport]:
    """Returns the samples of `rows` and the account of them.

    Args:
        rows: The dataset.
        form: Its format, see `formats.resolve_format`.
        data: The recipe's data section.
        tokenizer: The model's.
        vocab_size: Rows of the model's embedding; every token id must be below it.
        meaning: What they are encoded for; None for a causal language model.

    Raises:
        DataError: Rows cannot be used (up to five are named), or no row leaves anything to learn.
        ModelError: The tokenizer makes ids that the model does not have, or lacks what the format needs.
    """
    encoder = _Encoder(rows, form, data, tokenizer, vocab_size, meaning or Meaning())
    parts = [encoder.chunk(range(at, min(at + CHUNK_ROWS, len(rows)))) for at in range(0, len(rows), CHUNK_ROWS)]
    return encoder.finish(EncodedDataset.join(parts))


class _Encoder:
    """Encodes chunk by chunk and keeps the tally."""

    def __init__(
        self,
        rows: Rows,
        form: str,
        data: DataSection,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        meaning: Meaning,
    ) -> None:
        if form == "messages":
            check_template(tokenizer)
        self.rows, self.form, self.data, self.meaning = rows, form, data, meaning
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.paired = data.columns.get("text_pair", "text_pair") in rows.columns
        self.marks = special_tokens(tokenizer)
        self.tally = _Tally()

    def chunk(self, indices: Sequence[int]) -> EncodedDataset:
        """Returns the samples of some rows; none once a row was bad, from when on rows are only checked."""
        items: list[Item] = []
        origins: list[tuple[int, int]] = []
        if len(self.tally.problems) < MAX_PROBLEMS:
            for index, row in zip(indices, self.rows.take(indices), strict=True):
                found, task = self._items(row, index)
                items += found
                origins += [(index, task)] * len(found)
        if self.tally.problems:
            return EncodedDataset.of([], self.meaning.goal)
        kept = [self._fit(one, *origin) for one, origin in zip(self._tokenize(items), origins, strict=True)]
        return EncodedDataset.of([sample for sample in kept if sample is not None], self.meaning.goal)

    def _items(self, row: Row, index: int) -> tuple[Sequence[Item], int]:
        """Returns what one row says and its task's number; nothing, and a problem in the tally, if it is bad."""
        try:
            row = renamed(row, self.data.columns)
            return self._read(row), self.meaning.task_number(row)
        except BadRow as bad:
            self.tally.problems.append(Problem(str(bad), self.rows.where(index), bad.hint))
            return [], 0

    def _read(self, row: Row) -> Sequence[Item]:
        labels = self.meaning.labels
        if labels is not None and self.form == "classification":
            return [labelled_text(row, labels, paired=self.paired)]
        if labels is not None and self.form == "token-classification":
            return [tagged_words(row, labels)]
        if self.form == "messages":
            return render_answers(messages_of(row), self.tokenizer, self.marks, _tools(row))
        return [example(row, self.form)]

    def _tokenize(self, items: Sequence[Item]) -> list[Tokenized]:
        """Returns the items as ids and what is learned of them; all are of one kind."""
        on_all, limit = self.data.train_on == "all", self.data.max_length
        chats = [item for item in items if isinstance(item, Chat)]
        examples = [item for item in items if isinstance(item, Example)]
        labelled = [item for item in items if isinstance(item, LabelledText)]
        tagged = [item for item in items if isinstance(item, TaggedWords)]
        if chats:
            return encode_chats(chats, self.tokenizer, train_on_all=on_all)
        if labelled:
            return encode_labelled(labelled, self.tokenizer, limit)
        if tagged:
            return encode_words(tagged, self.tokenizer, limit)
        if examples and self.meaning.goal == "answer":
            return encode_answers(examples, self.tokenizer, limit)
        return encode_examples(examples, self.tokenizer, train_on_all=on_all) if examples else []

    def _fit(self, one: Tokenized, index: int, task: int) -> Sample | None:
        """Returns the sample within `data.max_length`, or None where it is dropped."""
        sample, limit, tally = one.sample, self.data.max_length, self.tally
        self._check_ids(sample, index)
        tally.longest = max(tally.longest, one.length)
        tally.straddling += one.straddles
        tally.wordless += one.wordless
        if one.length > limit and self.data.overlong == "error":
            problem = f"{one.length:,} tokens, but data.max_length is {limit:,} and data.overlong is error"
            hint = "raise data.max_length, or set data.overlong to truncate or drop"
            self.tally.problems.append(Problem(problem, self.rows.where(index), hint))
        if one.length > limit and self.data.overlong == "drop":
            tally.dropped_overlong += 1
            return None
        if self.meaning.goal in ("next-token", "token") and not sample.supervised[:limit].any():
            tally.dropped_unsupervised += 1
            tally.lost = tally.lost or (self.rows.where(index), sample)
            return None
        tally.truncated += one.length > limit
        return sample._replace(input_ids=sample.input_ids[:limit], supervised=sample.supervised[:limit], task=task)

    def _check_ids(self, sample: Sample, index: int) -> None:
        """Raises a ModelError where the tokenizer has more tokens than the model."""
        highest = int(sample.input_ids.max(initial=0))
        if self.meaning.goal == "answer" and sample.target is not None:
            highest = max(highest, int(sample.target.max(initial=0)))
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
            supervised=_num_supervised(dataset),
            max_length=self.data.max_length,
            longest=tally.longest,
            truncated=tally.truncated,
            dropped_overlong=tally.dropped_overlong,
            dropped_unsupervised=tally.dropped_unsupervised,
            straddling=tally.straddling,
            wordless=tally.wordless,
            goal=dataset.goal,
            labels=self._labels(dataset),
        )

    def _labels(self, dataset: EncodedDataset) -> str:
        """Returns in words what the samples are labelled with; nothing where they are not."""
        known, targets = self.meaning.labels, dataset.targets
        return known.summary(targets.values) if known is not None and targets is not None else ""

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


def _num_supervised(dataset: EncodedDataset) -> int:
    """Returns how many things there are to predict: tokens, or samples where each has one label."""
    if dataset.goal == "answer" and dataset.targets is not None:
        return len(dataset.targets.values)
    return len(dataset) if dataset.goal == "sample" else int(np.count_nonzero(dataset.supervised))


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
