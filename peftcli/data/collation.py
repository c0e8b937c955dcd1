"""Samples to a batch, padded to a rectangle or laid end to end without padding.

B samples, L tokens of the longest of them, T tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from peftcli.data.dataset import Sample

Layout = Literal["padded", "flat"]

IGNORED = -100  # the label that torch's and transformers' losses leave out


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes.

    Attributes:
        input_ids: Token ids [B, L], flat [1, T].
        labels: The same ids, or -100 where not supervised; not shifted. Same shape.
        attention_mask: 1 for tokens, 0 for padding [B, L]; None for a flat batch.
        position_ids: Positions that start again at 0 with each sample [1, T]; None for a padded batch.
        num_tokens: Tokens, padding excluded.
        num_supervised: Labels that are not -100, all of which the shifted loss uses.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    num_tokens: int
    num_supervised: int

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch on another device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            attention_mask=None if self.attention_mask is None else self.attention_mask.to(device, non_blocking=True),
            position_ids=None if self.position_ids is None else self.position_ids.to(device, non_blocking=True),
        )

    def model_inputs(self) -> dict[str, Tensor | None]:
        """Returns the arguments of the model's forward, labels aside."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }


def collate(samples: Sequence[Sample], pad_token_id: int | None, layout: Layout) -> Batch:
    """Returns the samples as one batch.

    A flat batch carries no attention mask: transformers sees from position ids that start again at 0 that sequences
    are packed, and only without a mask does it keep them from attending to each other.

    No samples at all give one unsupervised token, so that a rank without data can take part in a collective step.

    Args:
        samples: Encoded samples.
        pad_token_id: Fills up padded batches; 0 serves where the tokenizer has none, since padding is masked.
        layout: `padded` (on the right) or `flat`.
    """
    if not samples:
        return replace(collate([_dummy()], pad_token_id, layout), num_tokens=0)
    lengths = [len(sample.input_ids) for sample in samples]
    ids = [torch.from_numpy(sample.input_ids.astype(np.int64)) for sample in samples]
    labels = [_labels(sample) for sample in samples]
    num_supervised = int(sum((label != IGNORED).sum() for label in labels))
    if layout == "flat":
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        return Batch(torch.cat(ids)[None], torch.cat(labels)[None], None, positions, sum(lengths), num_supervised)
    return Batch(
        torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_token_id or 0),
        torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long(),
        None,
        sum(lengths),
        num_supervised,
    )


def _labels(sample: Sample) -> Tensor:
    """Returns the labels [L] of one sample. In a flat batch, the first would follow another sample's last token."""
    labels = np.where(sample.supervised, sample.input_ids, IGNORED).astype(np.int64)
    labels[:1] = IGNORED
    return torch.from_numpy(labels)


def _dummy() -> Sample:
    return Sample(np.zeros(1, np.int32), np.zeros(1, np.uint8))


def samples_of(batch: Batch) -> list[Sample]:
    """Returns the samples that a batch holds, read back from its tensors."""
    ids = batch.input_ids.cpu().numpy().astype(np.int32)
    supervised = (batch.labels != IGNORED).cpu().numpy().astype(np.uint8)
    if batch.position_ids is not None:
        starts = np.flatnonzero(batch.position_ids.cpu().numpy()[0] == 0)[1:]
        parts = zip(np.split(ids[0], starts), np.split(supervised[0], starts), strict=True)
        return [Sample(*part) for part in parts]
    assert batch.attention_mask is not None, "a batch has a mask or positions"
    lengths = batch.attention_mask.sum(dim=1).tolist()
    return [Sample(row[:n], marks[:n]) for row, marks, n in zip(ids, supervised, lengths, strict=True)]


def choose_layout(lengths: Sequence[int], hidden_size: int, linear_params_per_layer: int | None = None) -> Layout:
    """Returns the layout that costs fewer operations for samples of these lengths.

    Per layer, a token costs 2 P operations in the matrices, and n tokens that share a mask cost 4 n² D in attention:
    a dense mask computes the pairs that it hides. Padding therefore wastes matrix work, and a flat batch of T = Σ L
    tokens wastes attention between samples:

        flat:    2 P T       + 4 D T²
        padded:  2 P B max L + 4 D B (max L)²

    Args:
        lengths: Tokens of each sample of the batch.
        hidden_size: D.
        linear_params_per_layer: P; 12 D² where it is not known.
    """
    params = linear_params_per_layer or 12 * hidden_size**2
    tokens, rows, longest = sum(lengths), len(lengths), max(lengths, default=0)
    flat = 2 * params * tokens + 4 * hidden_size * tokens**2
    padded = rows * (2 * params * longest + 4 * hidden_size * longest**2)
    return "flat" if flat < padded else "padded"
