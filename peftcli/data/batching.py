"""Batches from a dataset: which layout each gets, and the order in which an evaluation goes through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from peftcli.data.collation import Batch, Layout, choose_layout, collate
from peftcli.data.dataset import EncodedDataset


@dataclass(frozen=True)
class Batcher:
    """Makes batches of one dataset's samples.

    Attributes:
        dataset: The samples.
        pad_token_id: Fills up padded batches; None where the tokenizer has no such token.
        hidden_size: The model's hidden size, for choosing the cheaper layout.
        joins: Whether a batch's samples may be laid end to end instead of padded.
        always: Join them in every batch, not just where it is cheaper.
    """

    dataset: EncodedDataset
    pad_token_id: int | None
    hidden_size: int
    joins: bool
    always: bool = False

    def batch(self, indices: Sequence[int]) -> Batch:
        """Returns the samples at `indices` as one batch, in the cheaper layout of those allowed."""
        samples = [self.dataset[index] for index in indices]
        return collate(samples, self.pad_token_id, self._layout([len(sample.input_ids) for sample in samples]))

    def _layout(self, lengths: list[int]) -> Layout:
        if not self.joins:
            return "padded"
        return "flat" if self.always else choose_layout(lengths, self.hidden_size)

    def in_order_of_length(self, batch_size: int) -> Iterator[Batch]:
        """Yields every sample once, longest first, so that padding is least and memory fails at once or never."""
        order = np.argsort(-self.dataset.lengths, kind="stable").tolist()
        for start in range(0, len(order), batch_size):
            yield self.batch(order[start : start + batch_size])
