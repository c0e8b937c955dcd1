"""Encoded samples in flat arrays, and the account of how rows became samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Ids: TypeAlias = npt.NDArray[np.int32]
Mask: TypeAlias = npt.NDArray[np.uint8]
Target: TypeAlias = npt.NDArray[np.int32] | npt.NDArray[np.float32]

IGNORED = -100
"""The label that torch's and transformers' losses leave out."""

Goal: TypeAlias = Literal["next-token", "token", "sample", "answer"]
"""What is predicted: the tokens themselves, a label for each, a label or numbers for the whole, or another text."""


class Sample(NamedTuple):
    """One sequence of L tokens and what a model is to learn from it.

    Attributes:
        input_ids: Token ids [L].
        supervised: 1 where a label is at the token [L]. A causal model predicts these tokens; the first is never one.
        target: What is to be predicted where that is not the tokens themselves: the number of each token's label or
            -100 [L], a label or numbers for the whole [K], or the ids of the answer [M].
        token_types: 0 for the first text and 1 for the second [L]; None where the model does not tell them apart.
        task: Number of the task that the sample belongs to.
    """

    input_ids: Ids
    supervised: Mask
    target: Target | None = None
    token_types: Mask | None = None
    task: int = 0


class Ragged(NamedTuple):
    """N rows of different lengths, laid end to end: row i is values[offsets[i] : offsets[i + 1]]."""

    values: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[npt.NDArray[Any]]) -> Ragged:
        """Returns the rows as one; there must be at least one."""
        return cls(np.concatenate(rows), np.cumsum([0, *map(len, rows)], dtype=np.int64))

    def row(self, index: int) -> npt.NDArray[Any]:
        """Returns one row as a view."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class EncodedDataset:
    """All samples one after the other: 5 bytes a token instead of the 36 and more of Python lists.

    Attributes:
        input_ids: Token ids of all samples [T].
        supervised: Their loss mask [T].
        offsets: Where each of the N samples starts, and at last T; [N + 1].
        goal: What the samples' targets are.
        targets: The samples' targets, one row each; None where the model predicts the tokens themselves.
        token_types: Which text each token is from [T]; None where the model does not tell them apart.
        tasks: Number of each sample's task [N]; None where all have number 0.
    """

    input_ids: Ids
    supervised: Mask
    offsets: npt.NDArray[np.int64]
    goal: Goal = "next-token"
    targets: Ragged | None = None
    token_types: Mask | None = None
    tasks: npt.NDArray[np.int32] | None = None

    @classmethod
    def of(cls, samples: Sequence[Sample], goal: Goal = "next-token") -> EncodedDataset:
        """Returns the samples as one dataset."""
        empty = Sample(np.empty(0, np.int32), np.empty(0, np.uint8))
        targets = [sample.target for sample in samples if sample.target is not None]
        types = [sample.token_types for sample in samples if sample.token_types is not None]
        tasks = np.array([sample.task for sample in samples], np.int32)
        assert len(targets) in (0, len(samples)), "all samples have a target or none has"
        assert len(types) in (0, len(samples)), "all samples have token types or none has"
        return cls(
            np.concatenate([sample.input_ids for sample in samples] or [empty.input_ids]),
            np.concatenate([sample.supervised for sample in samples] or [empty.supervised]),
            np.cumsum([0, *(len(sample.input_ids) for sample in samples)], dtype=np.int64),
            goal,
            Ragged.of(targets) if targets else None,
            np.concatenate(types) if types else None,
            tasks if tasks.any() else None,
        )

    @classmethod
    def join(cls, several: Iterable[EncodedDataset]) -> EncodedDataset:
        """Returns the samples of all parts, which have the same goal, as one dataset."""
        parts = list(several)
        lengths = np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in parts)])
        full = [part for part in parts if len(part)]
        targets = [part.targets for part in full if part.targets is not None]
        types = [part.token_types for part in full if part.token_types is not None]
        tasks = [np.zeros(len(part), np.int32) if part.tasks is None else part.tasks for part in full]
        return cls(
            np.concatenate([np.empty(0, np.int32), *(part.input_ids for part in parts)]),
            np.concatenate([np.empty(0, np.uint8), *(part.supervised for part in parts)]),
            np.cumsum(lengths, dtype=np.int64),
            parts[0].goal if parts else "next-token",
            _joined(targets) if targets else None,
            np.concatenate(types) if types else None,
            np.concatenate(tasks) if any(part.tasks is not None for part in full) else None,
        )

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The number of tokens of each sample [N]."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 of all that training would see, targets and tasks too: equal exactly if that is the same."""
        digest = hashlib.sha256()
        arrays: list[npt.NDArray[Any]] = [self.offsets, self.input_ids, self.supervised]
        more: dict[str, npt.NDArray[Any] | None] = {"token_types": self.token_types, "tasks": self.tasks}
        if self.targets is not None:
            more |= {"targets": self.targets.values, "target_offsets": self.targets.offsets}
        for name, found in more.items():
            arrays += [] if found is None else [np.frombuffer(name.encode(), np.uint8), found]
        for array in arrays:
            plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
            digest.update(plain.data)  # the bytes where they lie: arrays may be larger than memory
        return digest.hexdigest()

    @property
    def num_supervised(self) -> npt.NDArray[np.int64]:
        """How many tokens of each sample are supervised [N]."""
        sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.supervised, dtype=np.int64)])
        return np.diff(sums[self.offsets])

    def cut(self, limit: int) -> EncodedDataset:
        """Returns the samples with at most their first `limit` tokens; targets and token types stay as they are."""
        lengths = self.lengths
        if lengths.max(initial=0) <= limit:
            return self
        positions = np.arange(self.offsets[-1]) - np.repeat(self.offsets[:-1], lengths)
        kept = positions < limit
        offsets = np.cumsum([0, *np.minimum(lengths, limit).tolist()], dtype=np.int64)
        return replace(self, input_ids=self.input_ids[kept], supervised=self.supervised[kept], offsets=offsets)

    def select(self, indices: npt.NDArray[np.int64]) -> EncodedDataset:
        """Returns the samples at `indices`, of which there may be none."""
        return EncodedDataset.of([self[index] for index in indices.tolist()], self.goal)

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Sample:
        """Returns one sample as views of the flat arrays."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        part = slice(self.offsets[index], self.offsets[index + 1])
        return Sample(
            self.input_ids[part],
            self.supervised[part],
            None if self.targets is None else self.targets.row(index),
            None if self.token_types is None else self.token_types[part],
            0 if self.tasks is None else int(self.tasks[index]),
        )

    def __iter__(self) -> Iterator[Sample]:
        """Yields the samples in order."""
        return (self[i] for i in range(len(self)))


def _joined(parts: Sequence[Ragged]) -> Ragged:
    """Returns the rows of all `parts`, of which there is at least one."""
    lengths = [np.diff(part.offsets) for part in parts]
    offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *lengths]), dtype=np.int64)
    return Ragged(np.concatenate([part.values for part in parts]), offsets)


@dataclass(frozen=True)
class EncodingReport:
    """How many rows became how many samples, and what was lost on the way.

    Attributes:
        rows: Rows read.
        samples: Samples left for training. A chat may give several, see `chat.render_answers`.
        tokens: Tokens of those samples.
        supervised: Those of them that the model learns to predict.
        max_length: The recipe's `data.max_length`.
        longest: Tokens of the longest sample before `data.overlong` was applied.
        truncated: Samples left, but cut to `max_length`.
        dropped_overlong: Samples left out because they were longer than `max_length`.
        dropped_unsupervised: Samples left out because no supervised token was left within `max_length`.
        straddling: Rows with a token that covers the end of the prompt and the start of the answer.
        wordless: Words of which the tokenizer makes no token, so that nothing can carry their tag.
        goal: What is predicted.
        labels: What the labels are; empty where there are none.
    """

    rows: int
    samples: int
    tokens: int
    supervised: int
    max_length: int
    longest: int
    truncated: int = 0
    dropped_overlong: int = 0
    dropped_unsupervised: int = 0
    straddling: int = 0
    wordless: int = 0
    goal: Goal = "next-token"
    labels: str = ""

    def lines(self) -> list[str]:
        """Returns the report as sentences; those about what was lost only where something was."""
        lines = [f"{_count(self.rows, 'row')} gave {_count(self.samples, 'sample')} of {self._tokens()}."]
        if self.labels:
            lines.append(f"{self.labels}.")
        limit = f"data.max_length = {self.max_length:,} tokens (the longest has {self.longest:,})"
        if self.truncated:
            lines.append(f"{_count(self.truncated, 'sample')} cut to {limit}.")
        if self.dropped_overlong:
            lines.append(f"{_count(self.dropped_overlong, 'sample')} dropped: longer than {limit}.")
        if self.dropped_unsupervised:
            lines.append(f"{_count(self.dropped_unsupervised, 'sample')} dropped: no supervised token within {limit}.")
        if self.straddling:
            lines.append(
                f"{_count(self.straddling, 'row')} with a token across the end of the prompt, which is supervised; "
                "a completion that starts with a space or a line break avoids that."
            )
        if self.wordless:
            lines.append(f"{_count(self.wordless, 'word')} of which the tokenizer makes no token: not learned.")
        return lines

    def _tokens(self) -> str:
        """Returns how many tokens there are, and how many of them are learned where that is what is learned."""
        if self.goal == "sample":
            return _count(self.tokens, "token")
        if self.goal == "answer":
            return f"{_count(self.tokens, 'token')}, answered with {_count(self.supervised, 'token')}"
        share = 100 * self.supervised / max(self.tokens, 1)
        return f"{_count(self.tokens, 'token')}, {self.supervised:,} of them supervised ({share:.1f} %)"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
