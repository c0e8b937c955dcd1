"""Samples as readable text with what is supervised in them, decoded from the ids that training uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from peftcli.data.dataset import EncodedDataset, Goal, Sample
from peftcli.data.labels import Labels

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftcli.data import Dataset

UNFINISHED = "\ufffd"  # how a decoder shows the first bytes of a character whose others follow
ARROW = " → "


@dataclass(frozen=True)
class Segment:
    """A stretch of text, all of it supervised or none of it."""

    text: str
    supervised: bool


def render(dataset: Dataset, index: int, processor: Any, labels: Labels | None) -> list[Segment]:
    """Returns one sample of a dataset as text; see `render_sample`. An image is told by its file and size.

    Args:
        dataset: The samples.
        index: Which one.
        processor: The model's tokenizer; not used for images.
        labels: The labels that the samples have; None where they have none.
    """
    if isinstance(dataset, EncodedDataset):
        return render_sample(dataset[index], processor, dataset.goal, labels)
    image = dataset.image(index)
    told = f"{dataset.rows.where(index)} ({image.width} × {image.height} {image.mode})"
    assert labels is not None
    return [Segment(told + ARROW, False), Segment(labels.shown(dataset.targets[index : index + 1]), True)]


def render_sample(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, goal: Goal = "next-token", labels: Labels | None = None
) -> list[Segment]:
    """Returns the text of a sample, special tokens included, in stretches of equal supervision.

    A label of the whole, or an answer of its own, comes after an arrow; the tag of a word after a slash.
    """
    if goal == "next-token":
        return _segments(sample, tokenizer, [""] * len(sample.input_ids))
    target = sample.target
    assert target is not None
    if goal == "token":
        assert labels is not None
        return _segments(sample, tokenizer, [f"/{labels.names[tag]}" if tag >= 0 else "" for tag in target.tolist()])
    given = _segments(sample, tokenizer, [""] * len(sample.input_ids))
    if goal == "answer":
        return [*given, Segment(ARROW, False), Segment(_decoded(target.tolist(), tokenizer), True)]
    assert labels is not None
    return [*given, Segment(ARROW, False), Segment(labels.shown(target), True)]


def _segments(sample: Sample, tokenizer: PreTrainedTokenizerBase, tags: Sequence[str]) -> list[Segment]:
    """Returns the stretches of equal supervision and tag; a tag is written after its stretch.

    Each stretch is what the text gains by its tokens, because tokens decoded by themselves would lose leading spaces
    and the characters that are split over several tokens. Such a character belongs to the stretch that completes it.
    """
    ids, marks = sample.input_ids.tolist(), sample.supervised.tolist()
    segments: list[Segment] = []
    done, end = "", 0
    # Each tagged token is a stretch of its own, even where its neighbour has the same tag.
    for (mark, tag, _), run in groupby(range(len(ids)), key=lambda i: (marks[i], tags[i], i if tags[i] else -1)):
        end += len(list(run))
        text = _decoded(ids[:end], tokenizer)
        if end < len(ids):
            text = text.rstrip(UNFINISHED)
        if len(text) > len(done):
            segments.append(Segment(text[len(done) :] + tag, bool(mark)))
            done = text
    return segments


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
