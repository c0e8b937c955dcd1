"""What a method may learn from tokenizer and data before its adapters are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from peftcli.data.dataset import EncodedDataset

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NUM_SAMPLES = 2000
"""As many samples tell what a dataset is made of; more would only take longer."""


CHUNK_TOKENS = 1_000_000
"""Tokens that are counted at a time: `bincount` takes them at 8 bytes each."""


@dataclass(frozen=True)
class DataFacts:
    """The answers to a method's questions, `methods._protocol.Facts`.

    Attributes:
        tokenizer: The model's.
        dataset: The encoded training samples.
        labels: The names of the classes, if the task has classes.
        num_tasks: How many values the column `task` has.
    """

    tokenizer: PreTrainedTokenizerBase
    dataset: EncodedDataset
    labels: Sequence[str] = ()
    num_tasks: int = 1

    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of `text`, without special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @cached_property
    def frequent_ids(self) -> Sequence[int]:
        """The ordinary tokens' ids, those that the training data uses most first; no special or added token."""
        size = max(len(self.tokenizer), int(self.dataset.input_ids.max(initial=0)) + 1)
        counts = np.zeros(size, np.int64)
        for at in range(0, len(self.dataset.input_ids), CHUNK_TOKENS):
            counts += np.bincount(self.dataset.input_ids[at : at + CHUNK_TOKENS], minlength=size)
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        order = np.argsort(-counts, kind="stable").tolist()  # stable: ties by id, low ids are the commoner ones
        return [token for token in order if token not in special and token < len(self.tokenizer)]

    @cached_property
    def samples(self) -> Sequence[Sequence[int]]:
        """Token ids of the first training samples."""
        return [self.dataset[index].input_ids.tolist() for index in range(min(NUM_SAMPLES, len(self.dataset)))]
