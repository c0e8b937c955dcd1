"""Samples as readable text with what is supervised in them, decoded from the ids that training uses."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from peftcli.data.dataset import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # how a decoder shows the first bytes of a character whose others follow


@dataclass(frozen=True)
class Segment:
    """A stretch of text, all of it supervised or none of it."""

    text: str
    supervised: bool


def render_sample(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Returns the text of a sample, special tokens included, in stretches of equal supervision.

    Each stretch is what the text gains by its tokens, because tokens decoded by themselves would lose leading spaces
    and the characters that are split over several tokens. Such a character belongs to the stretch that completes it.
    """
    ids, marks = sample.input_ids.tolist(), sample.supervised.tolist()
    segments: list[Segment] = []
    done, end = "", 0
    for mark, run in groupby(marks):
        end += len(list(run))
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if end < len(ids):
            text = text.rstrip(UNFINISHED)
        if len(text) > len(done):
            segments.append(Segment(text[len(done) :], bool(mark)))
            done = text
    return segments
