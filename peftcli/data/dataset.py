"""Encoded samples in flat arrays, and the account of how rows became samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

Ids: TypeAlias = npt.NDArray[np.int32]
Mask: TypeAlias = npt.NDArray[np.uint8]


class Sample(NamedTuple):
    """One sequence: token ids [L] and, for each, 1 where the model is to predict it. The first is never predicted."""

    input_ids: Ids
    supervised: Mask


@dataclass(frozen=True)
class EncodedDataset:
    """All samples one after the other: 5 bytes a token instead of the 36 and more of Python lists.

    Attributes:
        input_ids: Token ids of all samples [T].
        supervised: Their loss mask [T].
        offsets: Where each of the N samples starts, and at last T; [N + 1].
    """

    input_ids: Ids
    supervised: Mask
    offsets: npt.NDArray[np.int64]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> EncodedDataset:
        """Returns the samples as one dataset."""
        empty = Sample(np.empty(0, np.int32), np.empty(0, np.uint8))
        return cls(
            np.concatenate([sample.input_ids for sample in samples] or [empty.input_ids]),
            np.concatenate([sample.supervised for sample in samples] or [empty.supervised]),
            np.cumsum([0, *(len(sample.input_ids) for sample in samples)], dtype=np.int64),
        )

    @classmethod
    def join(cls, parts: Sequence[EncodedDataset]) -> EncodedDataset:
        """Returns the samples of all `parts` as one dataset."""
        lengths = np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in parts)])
        return cls(
            np.concatenate([np.empty(0, np.int32), *(part.input_ids for part in parts)]),
            np.concatenate([np.empty(0, np.uint8), *(part.supervised for part in parts)]),
            np.cumsum(lengths, dtype=np.int64),
        )

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The number of tokens of each sample [N]."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """A SHA-256 of all tokens, masks and boundaries: equal exactly if training would see the same samples."""
        digest = hashlib.sha256()
        for array in (self.offsets, self.input_ids, self.supervised):
            digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Sample:
        """Returns one sample as views of the flat arrays."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        start, end = self.offsets[index % len(self)], self.offsets[index % len(self) + 1]
        return Sample(self.input_ids[start:end], self.supervised[start:end])

    def __iter__(self) -> Iterator[Sample]:
        """Yields the samples in order."""
        return (self[i] for i in range(len(self)))


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

    def lines(self) -> list[str]:
        """Returns the report as sentences; those about what was lost only where something was."""
        share = 100 * self.supervised / max(self.tokens, 1)
        lines = [
            f"{_count(self.rows, 'row')} gave {_count(self.samples, 'sample')} of {_count(self.tokens, 'token')}, "
            f"{self.supervised:,} of them supervised ({share:.1f} %)."
        ]
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
        return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
