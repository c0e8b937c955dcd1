"""Batches from a dataset: which layout each gets, and the order in which an evaluation goes through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from peftcli.data.collation import Batch, Layout, choose_layout, collate, collate_packs, join
from peftcli.data.dataset import EncodedDataset
from peftcli.data.sampling import shares
from peftcli.errors import RecipeError


class Batches(Protocol):
    """What a loop gets its batches from: a `Batcher`, a `PackBatcher` or an `images.ImageBatcher`."""

    @property
    def dataset(self) -> Any:
        """The samples: sized, with a `fingerprint`."""

    @property
    def num_prompts(self) -> int:
        """How many times a batch holds each of its samples."""

    def batch(self, indices: Sequence[Any]) -> Any:
        """Returns what a plan's micro-batch names, samples or packs of them, as one batch."""

    def in_order_of_length(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Yields every sample once, or one rank's share of them in as many batches as any other rank's."""


@dataclass(frozen=True)
class Batcher:
    """Makes batches of one dataset's samples.

    Attributes:
        dataset: The samples.
        pad_token_id: Fills up padded batches; None where the tokenizer has no such token.
        hidden_size: The model's hidden size, for choosing the cheaper layout.
        joins: Whether a batch's samples may be laid end to end instead of padded.
        always: Join them in every batch, not just where it is cheaper.
        prompts: Ids to put before each sample's own: prompt tuning's, from the vocabulary's size upward. With several
            prompts, a batch holds all its samples with the first, then all with the second, and so on.
        max_positions: The most tokens that the model can tell apart by position; None if it has no such limit.

    Raises:
        RecipeError: The longest sample and the virtual tokens are together more than `max_positions`.
    """

    dataset: EncodedDataset
    pad_token_id: int | None
    hidden_size: int
    joins: bool
    always: bool = False
    prompts: Sequence[tuple[int, ...]] = ()
    max_positions: int | None = None

    def __post_init__(self) -> None:
        longest, virtual = int(self.dataset.lengths.max(initial=0)), self.num_virtual_tokens
        if virtual and self.max_positions is not None and longest + virtual > self.max_positions:
            raise RecipeError(
                f"data.max_length: the longest sample has {longest:,} tokens, and with {virtual} virtual tokens before "
                f"it that is more than the model's {self.max_positions:,} positions",
                hint=f"set data.max_length to {max(self.max_positions - virtual, 0)} or less, or use fewer of them",
            )

    @property
    def num_virtual_tokens(self) -> int:
        """How many ids come before each sample's own."""
        return len(self.prompts[0]) if self.prompts else 0

    @property
    def num_prompts(self) -> int:
        """How many times a batch holds each of its samples."""
        return max(len(self.prompts), 1)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Returns the samples at `indices` as one batch, in the cheaper layout of those allowed."""
        samples = [self.dataset[index] for index in indices]
        layout = self._layout([len(sample.input_ids) + self.num_virtual_tokens for sample in samples])
        goal = self.dataset.goal
        return join([collate(samples, self.pad_token_id, layout, goal, ids) for ids in self.prompts or [()]])

    def _layout(self, lengths: list[int]) -> Layout:
        if not self.joins:
            return "padded"
        return "flat" if self.always else choose_layout(lengths, self.hidden_size)

    def in_order_of_length(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yields a rank's samples, longest first, so that padding is least and memory fails at once or never."""
        order = np.argsort(-self.dataset.lengths, kind="stable").tolist()
        for share in shares(len(order), batch_size, rank, world_size):
            yield self.batch([order[position] for position in share])


@dataclass(frozen=True)
class PackBatcher:
    """Makes batches of packs of one dataset's samples.

    Attributes:
        batcher: What it knows of dataset and model; it joins samples.
        by_row: Give each pack a row of its own, instead of laying all end to end: for attention under a dense mask.
    """

    batcher: Batcher
    by_row: bool

    @property
    def dataset(self) -> EncodedDataset:
        """The samples."""
        return self.batcher.dataset

    @property
    def num_prompts(self) -> int:
        """How many times a batch holds each of its samples."""
        return self.batcher.num_prompts

    def batch(self, indices: Sequence[Sequence[int]]) -> Batch:
        """Returns packs, each the indices of its samples, as one batch."""
        of, rows = self.batcher, [[self.dataset[index] for index in pack] for pack in indices]
        if not self.by_row:
            rows = [[sample for row in rows for sample in row]] if rows else []
        prompts: Sequence[tuple[int, ...]] = of.prompts or [()]
        return join([collate_packs(rows, of.pad_token_id, self.dataset.goal, ids) for ids in prompts])

    def in_order_of_length(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yields a rank's samples; see `Batcher.in_order_of_length`."""
        return self.batcher.in_order_of_length(batch_size, rank, world_size)
