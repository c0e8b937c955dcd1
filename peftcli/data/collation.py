"""Samples to a batch, padded to a rectangle or laid end to end without padding.

B samples, L tokens of the longest of them, T tokens of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from peftcli.data.dataset import IGNORED, Goal, Sample

Layout = Literal["padded", "flat"]


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes.

    Attributes:
        input_ids: Token ids [B, L], flat [1, T]; of the encoder where there is one.
        labels: What is to be predicted, -100 where nothing is. The same ids, not shifted, or a label for each token:
            same shape. A label for each sample: [B], or numbers for each [B, K]. Another text's ids: [B, M].
        attention_mask: 1 for tokens, 0 for padding [B, L]; None for a flat batch.
        position_ids: Positions that start again at 0 with each sample [1, T], or [B, L] where each row is a pack; None
            for a padded batch.
        num_tokens: Tokens, padding excluded and virtual tokens included; of both texts where there are two.
        num_supervised: Labels that count: those that are not -100, or samples where each has one label.
        goal: What the labels are.
        token_type_ids: Which text each token is from [B, L]; None where the model does not tell them apart.
        task_ids: Number of the task of each sample [B], of each token where samples are joined: [1, T] or [B, L].
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    num_tokens: int
    num_supervised: int
    goal: Goal = "next-token"
    token_type_ids: Tensor | None = None
    task_ids: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch on another device."""
        tensors: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)

    def model_inputs(self) -> dict[str, Tensor | None]:
        """Returns the arguments of the model's forward, labels aside."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "token_type_ids": self.token_type_ids,
        }


def collate(
    samples: Sequence[Sample],
    pad_token_id: int | None,
    layout: Layout,
    goal: Goal = "next-token",
    virtual_ids: Sequence[int] = (),
) -> Batch:
    """Returns the samples as one batch.

    A flat batch carries no attention mask: transformers sees from position ids that start again at 0 that sequences
    are packed, and only without a mask does it keep them from attending to each other.

    No samples at all give one unsupervised token, so that a rank without data can take part in a collective step.

    Args:
        samples: Encoded samples.
        pad_token_id: Fills up padded batches; 0 serves where the tokenizer has none, since padding is masked.
        layout: `padded` (on the right) or `flat`.
        goal: What the samples' targets are; each token must have one in a flat batch.
        virtual_ids: Ids to put before each sample's own; they are seen, but never predicted.
    """
    if not samples:
        return _empty(collate([_dummy(goal)], pad_token_id, layout, goal, virtual_ids))
    labels = [_labels(sample, goal, len(virtual_ids)) for sample in samples]
    ids = [_before(sample.input_ids, virtual_ids) for sample in samples]
    lengths = [len(one) for one in ids]
    counted = len(samples) if goal == "sample" else int(sum((label != IGNORED).sum() for label in labels))
    num_tokens = sum(lengths) + (counted if goal == "answer" else 0)
    tasks = torch.tensor([sample.task for sample in samples])
    if layout == "flat":
        assert goal in ("next-token", "token"), "samples laid end to end need a label for each token"
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        per_token = torch.repeat_interleave(tasks, torch.tensor(lengths))[None]
        flat = torch.cat(ids)[None], torch.cat(labels)[None]
        return Batch(*flat, None, positions, num_tokens, counted, goal, _token_types(samples, layout, 0), per_token)
    return Batch(
        torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_token_id or 0),
        _stacked(labels, goal),
        (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long(),
        None,
        num_tokens,
        counted,
        goal,
        _token_types(samples, layout, len(virtual_ids)),
        tasks,
    )


def collate_packs(
    packs: Sequence[Sequence[Sample]],
    pad_token_id: int | None,
    goal: Goal = "next-token",
    virtual_ids: Sequence[int] = (),
) -> Batch:
    """Returns packs of samples as the rows of one batch [B, L], each row flat.

    A dense mask costs the square of a row's length, which makes rows cheaper than all packs end to end. What fills a
    shorter row up is one more sample to the model, and counts for nothing.

    Args:
        packs: The samples of each row; no packs at all give the batch that `collate` gives for no samples.
        pad_token_id: See `collate`.
        goal: See `collate`.
        virtual_ids: See `collate`.
    """
    rows = [collate(samples, pad_token_id, "flat", goal, virtual_ids) for samples in packs or [()]]
    longest = max(row.input_ids.shape[1] for row in rows)

    def stacked(name: str, fill: int | None) -> Tensor:
        """Returns a tensor of each row, filled up with one value; with positions where that is None."""
        parts = []
        for row in rows:
            tensor: Tensor = getattr(row, name)
            more = longest - tensor.shape[1]
            filling = torch.arange(more) if fill is None else torch.full((more,), fill)
            parts.append(torch.cat([tensor[0], filling.to(tensor.dtype)]))
        return torch.stack(parts)

    return replace(
        rows[0],
        input_ids=stacked("input_ids", pad_token_id or 0),
        labels=stacked("labels", IGNORED),
        position_ids=stacked("position_ids", None),
        task_ids=stacked("task_ids", 0),
        num_tokens=sum(row.num_tokens for row in rows),
        num_supervised=sum(row.num_supervised for row in rows),
    )


def join(batches: Sequence[Batch]) -> Batch:
    """Returns the same samples collated with several prompts as one batch, prompt by prompt."""
    first = batches[0]
    if len(batches) == 1:
        return first
    is_flat = first.position_ids is not None and first.position_ids.shape[0] == 1
    joined: dict[str, Any] = {
        name: torch.cat([getattr(batch, name) for batch in batches], dim=int(is_flat))
        for name, value in vars(first).items()
        if isinstance(value, Tensor)
    }
    for count in ("num_tokens", "num_supervised"):
        joined[count] = sum(getattr(batch, count) for batch in batches)
    return replace(first, **joined)


def _before(own: npt.NDArray[Any], virtual_ids: Sequence[int]) -> Tensor:
    """Returns the ids with the virtual ones before them [V + L]."""
    return torch.from_numpy(np.concatenate([np.array(virtual_ids, np.int64), own.astype(np.int64)]))


def _labels(sample: Sample, goal: Goal, num_virtual: int) -> Tensor:
    """Returns one sample's labels: [V + L] where tokens have them, [M] of an answer, [K] or [] of the whole.

    In a flat batch, the first token would follow another sample's last one: it is never predicted.
    """
    if sample.target is not None:
        if goal == "token":
            return _before(sample.target, [IGNORED] * num_virtual)
        if sample.target.dtype == np.float32:
            return torch.from_numpy(sample.target)
        target = torch.from_numpy(sample.target.astype(np.int64))
        return target[0] if goal == "sample" else target
    labels = np.where(sample.supervised, sample.input_ids, IGNORED).astype(np.int64)
    labels[:1] = IGNORED
    return _before(labels, [IGNORED] * num_virtual)


def _stacked(labels: list[Tensor], goal: Goal) -> Tensor:
    """Returns the labels of all samples of a padded batch as one tensor."""
    if goal == "sample":
        return torch.stack(labels)
    return torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)


def _token_types(samples: Sequence[Sample], layout: Layout, num_virtual: int) -> Tensor | None:
    """Returns which text each token is from [B, V + L]; virtual tokens count to the first."""
    types = [_before(one.token_types, [0] * num_virtual) for one in samples if one.token_types is not None]
    if not types:
        return None
    assert layout == "padded", "no model that reads pairs of texts takes them end to end"
    return torch.nn.utils.rnn.pad_sequence(types, batch_first=True, padding_value=0)


def _dummy(goal: Goal) -> Sample:
    target = None if goal == "next-token" else np.zeros(1, np.int32)
    return Sample(np.zeros(1, np.int32), np.zeros(1, np.uint8), target)


def _empty(batch: Batch) -> Batch:
    """Returns a batch of one stand-in sample as one that counts for nothing."""
    return replace(batch, labels=torch.full_like(batch.labels, IGNORED), num_tokens=0, num_supervised=0)


def samples_of(batch: Batch) -> list[Sample]:
    """Returns the samples that a padded or flat batch holds, read back from its tensors."""
    ids = batch.input_ids.cpu().numpy().astype(np.int32)
    labels = batch.labels.cpu().numpy()
    labels = labels.astype(np.float32 if batch.labels.is_floating_point() else np.int32)
    tasks = batch.task_ids.cpu().numpy() if batch.task_ids is not None else np.zeros(ids.shape[0], np.int32)
    if batch.position_ids is not None:
        assert len(ids) == 1, "what fills up a row of packs cannot be told from a sample"
        starts = np.flatnonzero(batch.position_ids.cpu().numpy()[0] == 0)[1:]
        parts = zip(*(np.split(one[0], starts) for one in (ids, labels, tasks)), strict=True)
        return [_sample_of(own, label, batch.goal, int(task[0])) for own, label, task in parts]
    assert batch.attention_mask is not None, "a batch has a mask or positions"
    lengths = batch.attention_mask.sum(dim=1).tolist()
    found = []
    for row, label, n, task in zip(ids, labels, lengths, tasks.tolist(), strict=True):
        cut = label[:n] if batch.goal in ("next-token", "token") else np.atleast_1d(label)
        found.append(_sample_of(row[:n], cut, batch.goal, task))
    return found


def _sample_of(ids: npt.NDArray[np.int32], labels: npt.NDArray[Any], goal: Goal, task: int) -> Sample:
    if goal == "next-token":
        return Sample(ids, (labels != IGNORED).astype(np.uint8), task=task)
    if goal == "token":
        return Sample(ids, (labels != IGNORED).astype(np.uint8), labels, task=task)
    return Sample(
        ids, np.zeros(len(ids), np.uint8), labels[labels != IGNORED] if goal == "answer" else labels, task=task
    )


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
