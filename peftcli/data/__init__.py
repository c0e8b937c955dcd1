"""Datasets: from the files that a recipe names to batches with a loss mask.

sources -> rows -> formats, chat -> tokenization -> encoding -> dataset -> sampling -> collation
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from peftcli.data.dataset import EncodedDataset, EncodingReport, Sample
from peftcli.data.meaning import Meaning
from peftcli.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftcli.data.images import ImageDataset, ImageReport
    from peftcli.data.rows import Rows
    from peftcli.recipe.schema import DataSection, ModelSection

__all__ = [
    "Dataset",
    "EncodedDataset",
    "EncodingReport",
    "Meaning",
    "PreparedData",
    "RawData",
    "Sample",
    "format_prompt",
    "prepare",
    "prepare_eval",
    "read",
]

Dataset: TypeAlias = "EncodedDataset | ImageDataset"
Report: TypeAlias = "EncodingReport | ImageReport"


@dataclass(frozen=True)
class RawData:
    """The rows of a run as they were read, the format that they have, and what they are encoded for."""

    train: Rows
    eval: Rows | None
    format: str
    meaning: Meaning = field(default_factory=Meaning)


@dataclass(frozen=True)
class PreparedData:
    """The samples of a run, the account of each part, the format of the rows, and what became of them on the disk."""

    train: Dataset
    eval: Dataset | None
    train_report: Report
    eval_report: Report | None
    format: str
    meaning: Meaning = field(default_factory=Meaning)
    remarks: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The names of the labels, by number; None where the samples have no labels."""
        return self.meaning.labels.names if self.meaning.labels is not None else None

    @property
    def num_tasks(self) -> int:
        """How many values the column `task` has; 1 where there is no such column."""
        return max(len(self.meaning.tasks), 1)


def read(data: DataSection, seed: int, model: ModelSection | None = None) -> RawData:
    """Returns the rows that the data section names, for training and for evaluation, their format and labels.

    Needs no tokenizer, so that a wrong file, column or label is found before anything of the model is read. The labels
    are those of all training data, what `eval_fraction` sets aside included.

    Args:
        data: The recipe's data section.
        seed: Decides the held-out rows.
        model: The recipe's model section, which says what the rows are for; None for a causal language model.

    Raises:
        DataError: See `sources.read_rows`, `formats.resolve_format` and `labels.find_labels`.
    """
    from peftcli.data.formats import resolve_format
    from peftcli.data.sampling import split
    from peftcli.data.sources import read_rows

    task = "causal-lm" if model is None else model.task
    images = task == "image-classification"
    train, held_out = read_rows(data.train, "data.train", images=images), None
    form = resolve_format(train, data.format, data.columns, task)
    if data.eval is not None:
        held_out = read_rows(data.eval, "data.eval", images=images)
        resolve_format(held_out, form, data.columns, task)
    meaning = _meaning(train, form, data, model)
    if data.eval_fraction is not None:
        chosen, left = split(len(train), data.eval_fraction, seed)
        train, held_out = train.select(chosen), train.select(left)
    return RawData(train, held_out, form, meaning)


def _meaning(rows: Rows, form: str, data: DataSection, model: ModelSection | None) -> Meaning:
    """Returns what training rows are encoded for."""
    from peftcli.data.labels import LABEL_COLUMN, find_labels, task_names

    tasks = task_names(rows, data.columns)
    if model is None:
        return Meaning(tasks=tasks)
    labels = None
    if form in LABEL_COLUMN:
        labels = find_labels(rows, form, data.columns, model.problem_type, model.num_labels)
    return Meaning(model.task, labels, tasks)


def prepare(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    max_positions: int | None,
    seed: int,
    raw: RawData | None = None,
) -> PreparedData:
    """Returns everything that the data section names, encoded.

    Args:
        data: The recipe's data section.
        tokenizer: The model's; None for images.
        vocab_size: Rows of the model's embedding; 0 for images.
        max_positions: The most tokens that the model can tell apart by position; None if it has no such limit.
        seed: Decides the held-out rows.
        raw: What `read` returned for the same section and seed, if it was read before.

    Raises:
        DataError: See `read`, `encoding.encode` and `images.encode_images`.
        RecipeError: `data.max_length` is more than the model can take.
    """
    rows = raw or read(data, seed)
    part = _Part(data, tokenizer, vocab_size, max_positions, rows.format, rows.meaning)
    train, train_report, kept = part.encoded(rows.train)
    held_out, eval_report, eval_kept = (None, None, None) if rows.eval is None else part.encoded(rows.eval)
    remarks = [f"{name}: {said}" for name, said in (("train", kept), ("eval", eval_kept)) if said is not None]
    return PreparedData(train, held_out, train_report, eval_report, rows.format, rows.meaning, tuple(remarks))


def prepare_eval(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    max_positions: int | None,
    seed: int,
    meaning: Meaning | None = None,
) -> Dataset | None:
    """Returns what `prepare` returns as `eval`, without encoding the training data; None where nothing is held out.

    Args:
        data: See `prepare`.
        tokenizer: See `prepare`.
        vocab_size: See `prepare`.
        max_positions: See `prepare`.
        seed: See `prepare`.
        meaning: What the run found in its training data; None for a causal language model without tasks.
    """
    from peftcli.data.formats import resolve_format
    from peftcli.data.sampling import split
    from peftcli.data.sources import read_rows

    known = meaning or Meaning()
    images = known.task == "image-classification"
    sources, key = (data.eval, "data.eval") if data.eval is not None else (data.train, "data.train")
    if data.eval is None and data.eval_fraction is None:
        _check_length(data, max_positions)
        return None
    rows = read_rows(sources, key, images=images)
    form = resolve_format(rows, data.format, data.columns, known.task)
    if data.eval is None and data.eval_fraction is not None:
        rows = rows.select(split(len(rows), data.eval_fraction, seed)[1])
    samples: Dataset = _Part(data, tokenizer, vocab_size, max_positions, form, known).encoded(rows)[0]
    return samples


@dataclass(frozen=True)
class _Part:
    """All that encoding rows takes, but for the rows."""

    data: DataSection
    tokenizer: PreTrainedTokenizerBase | None
    vocab_size: int
    max_positions: int | None
    form: str
    meaning: Meaning

    def encoded(self, rows: Rows) -> tuple[Any, Any, str | None]:
        """Returns the samples of `rows`, the account of them, and whether they were or are now kept on the disk."""
        if self.tokenizer is None:
            from peftcli.data.images import encode_images

            return (*encode_images(rows, self.data.columns, self.meaning), None)
        from peftcli.data.cache import Job, encode_or_load

        _check_length(self.data, self.max_positions)
        return encode_or_load(Job(rows, self.form, self.data, self.tokenizer, self.vocab_size, self.meaning))


def _check_length(data: DataSection, max_positions: int | None) -> None:
    if max_positions is not None and data.max_length > max_positions:
        raise RecipeError(
            f"data.max_length: {data.max_length:,} tokens are more than the model's {max_positions:,} positions",
            hint=f"set data.max_length to {max_positions} or less",
        )


def format_prompt(text: str, form: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids that inference must feed so that a user's prompt looks as it did in training.

    Args:
        text: What the user says: a turn, an instruction, or the start of a text.
        form: The format that the model was trained in, as in `PreparedData.format`.
        tokenizer: The model's.
    """
    from peftcli.data.chat import check_template, render
    from peftcli.data.formats import alpaca_prompt
    from peftcli.data.tokenization import tokenize

    if form == "messages":
        check_template(tokenizer)
        rendered = render([{"role": "user", "content": text}], tokenizer, prompt=True)
        ids: list[int] = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
    return tokenize([alpaca_prompt(text) if form == "instruction" else text], tokenizer)[0]
