"""Rows to encoded samples: every row is checked, cut or dropped by the recipe's policy, and accounted for."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from peftcli.data.backend import TokenBytes
from peftcli.data.chat import Chat, check_template, messages_of
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
from peftcli.data.rendering import Conversation, Renderer
from peftcli.data.rows import Row, Rows
from peftcli.data.tokenization import Chunk, encode_chats, encode_examples
from peftcli.errors import DataError, ModelError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftcli.recipe.schema import DataSection

CHUNK_ROWS = 512  # enough for the tokenizer to use all cores, little enough to hold as Python lists
AHEAD = 2  # chunks that are read and rendered while the tokenizer is at work on another
SHOWN_TOKENS = 48
Item = Chat | Example | LabelledText | TaggedWords
Gather: TypeAlias = Callable[[Iterable[EncodedDataset]], EncodedDataset]


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
    gather: Gather = EncodedDataset.join,
) -> tuple[EncodedDataset, EncodingReport]:
    """Returns the samples of `rows` and the account of them.

    Args:
        rows: The dataset.
        form: Its format, see `formats.resolve_format`.
        data: The recipe's data section.
        tokenizer: The model's.
        vocab_size: Rows of the model's embedding; every token id must be below it.
        meaning: What they are encoded for; None for a causal language model.
        gather: Makes one dataset of the samples, which come some rows at a time.

    Raises:
        DataError: Rows cannot be used (up to five are named), or no row leaves anything to learn.
        ModelError: The tokenizer makes ids that the model does not have, or lacks what the format needs.
    """
    encoder = _Encoder(rows, form, data, tokenizer, vocab_size, meaning or Meaning())
    return encoder.finish(gather(encoder.chunks()))


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
        self.renderer, self.token_bytes = Renderer(tokenizer), TokenBytes(tokenizer)
        self.tally = _Tally()

    def chunks(self) -> Iterator[EncodedDataset]:
        """Yields the samples of all rows, some rows at a time; none once a row was bad, from when on rows are checked.

        The tokenizer, which needs no Python while it works, is always one chunk behind what reads and renders.
        """
        behind: deque[tuple[Future[Chunk | None], list[tuple[int, int]]]] = deque()
        with ThreadPoolExecutor(1, "tokenizer") as thread:
            for at in range(0, len(self.rows), CHUNK_ROWS):
                if len(self.tally.problems) < MAX_PROBLEMS:
                    items, origins = self._items(range(at, min(at + CHUNK_ROWS, len(self.rows))))
                    behind.append((thread.submit(self._tokenize, [] if self.tally.problems else items), origins))
                while len(behind) > AHEAD:
                    yield from self._done(*behind.popleft())
            while behind:
                yield from self._done(*behind.popleft())

    def _done(self, waited: Future[Chunk | None], origins: list[tuple[int, int]]) -> Iterator[EncodedDataset]:
        """Yields the samples of one chunk, within the recipe's limits."""
        chunk = waited.result()
        if chunk is not None and not self.tally.problems:
            yield self._fit(chunk, origins)

    def _items(self, indices: Sequence[int]) -> tuple[list[Item], list[tuple[int, int]]]:
        """Returns what rows say, and of each part its row and the number of its task.

        A row that is bad gives nothing, and a problem in the tally.
        """
        items: list[Item] = []
        origins: list[tuple[int, int]] = []
        kept: list[tuple[int, int, Item | Conversation]] = []
        bad: dict[int, BadRow] = {}
        for index, row in zip(indices, self.rows.take(indices), strict=True):
            try:
                named = renamed(row, self.data.columns)
                kept.append((index, self.meaning.task_number(named), self._read(named)))
            except BadRow as error:
                bad[index] = error
        chats = iter(self.renderer.answers([one for _, _, one in kept if isinstance(one, Conversation)]))
        for index, task, one in kept:
            found = next(chats) if isinstance(one, Conversation) else [one]
            if isinstance(found, BadRow):
                bad[index] = found
                continue
            items += found
            origins += [(index, task)] * len(found)
        for index in sorted(bad):
            self.tally.problems.append(Problem(str(bad[index]), self.rows.where(index), bad[index].hint))
        return items, origins

    def _read(self, row: Row) -> Item | Conversation:
        labels = self.meaning.labels
        if labels is not None and self.form == "classification":
            return labelled_text(row, labels, paired=self.paired)
        if labels is not None and self.form == "token-classification":
            return tagged_words(row, labels)
        if self.form == "messages":
            return Conversation(messages_of(row), _tools(row))
        return example(row, self.form)

    def _tokenize(self, items: Sequence[Item]) -> Chunk | None:
        """Returns the items as ids and what is learned of them; all are of one kind. None where there is none."""
        on_all, limit, goal = self.data.train_on == "all", self.data.max_length, self.meaning.goal
        chats = [item for item in items if isinstance(item, Chat)]
        examples = [item for item in items if isinstance(item, Example)]
        labelled = [item for item in items if isinstance(item, LabelledText)]
        tagged = [item for item in items if isinstance(item, TaggedWords)]
        if chats:
            return encode_chats(chats, self.tokenizer, self.token_bytes, train_on_all=on_all)
        if labelled:
            return Chunk.of(encode_labelled(labelled, self.tokenizer, limit), goal)
        if tagged:
            return Chunk.of(encode_words(tagged, self.tokenizer, limit), goal)
        if examples and goal == "answer":
            return Chunk.of(encode_answers(examples, self.tokenizer, limit), goal)
        return encode_examples(examples, self.tokenizer, train_on_all=on_all) if examples else None

    def _fit(self, chunk: Chunk, origins: Sequence[tuple[int, int]]) -> EncodedDataset:
        """Returns the samples of a chunk that stay, within `data.max_length`, each with its task."""
        limit, tally = self.data.max_length, self.tally
        samples = replace(chunk.samples, tasks=_tasks([task for _, task in origins]))
        self._check_ids(samples, origins)
        tally.longest = max(tally.longest, int(chunk.lengths.max(initial=0)))
        tally.straddling += chunk.straddling
        tally.wordless += chunk.wordless
        overlong = chunk.lengths > limit
        if self.data.overlong == "error":
            hint = "raise data.max_length, or set data.overlong to truncate or drop"
            for at in np.flatnonzero(overlong).tolist():
                problem = f"{chunk.lengths[at]:,} tokens, but data.max_length is {limit:,} and data.overlong is error"
                tally.problems.append(Problem(problem, self.rows.where(origins[at][0]), hint))
        dropped = overlong if self.data.overlong == "drop" else np.zeros(len(samples), np.bool_)
        cut = samples.cut(limit)
        if self.meaning.goal in ("next-token", "token"):
            empty = ~dropped & (cut.num_supervised == 0)
            tally.dropped_unsupervised += int(empty.sum())
            for at in np.flatnonzero(empty)[: tally.lost is None].tolist():
                tally.lost = (self.rows.where(origins[at][0]), samples[at])
        else:
            empty = np.zeros(len(samples), np.bool_)
        tally.dropped_overlong += int(dropped.sum())
        tally.truncated += int((overlong & ~dropped & ~empty).sum())
        return cut if not (dropped | empty).any() else cut.select(np.flatnonzero(~(dropped | empty)))

    def _check_ids(self, samples: EncodedDataset, origins: Sequence[tuple[int, int]]) -> None:
        """Raises a ModelError where the tokenizer has more tokens than the model."""
        targets = samples.targets.values if self.meaning.goal == "answer" and samples.targets is not None else None
        highest = int(samples.input_ids.max(initial=0))
        if max(highest, 0 if targets is None else int(targets.max(initial=0))) < self.vocab_size:
            return
        for sample, (index, _) in zip(samples, origins, strict=True):
            highest = int(sample.input_ids.max(initial=0))
            if targets is not None and sample.target is not None:
                highest = max(highest, int(sample.target.max(initial=0)))
            if highest >= self.vocab_size:
                token = self.tokenizer.convert_ids_to_tokens(highest)
                rows = f"the model's embedding has {self.vocab_size} rows"
                raise ModelError(
                    f'the tokenizer makes id {highest} ("{token}"), but {rows}',
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


def _tasks(numbers: list[int]) -> npt.NDArray[np.int32] | None:
    """Returns each sample's task; None where all have number 0."""
    return np.array(numbers, np.int32) if any(numbers) else None


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
