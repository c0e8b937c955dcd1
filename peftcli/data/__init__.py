"""Datasets: from the files that a recipe names to batches with a loss mask.

sources -> rows -> formats, chat -> tokenization -> encoding -> dataset -> sampling -> collation
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from peftcli.data.dataset import EncodedDataset, EncodingReport, Sample
from peftcli.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftcli.data.rows import Rows
    from peftcli.recipe.schema import DataSection

__all__ = [
    "EncodedDataset",
    "EncodingReport",
    "PreparedData",
    "RawData",
    "Sample",
    "format_prompt",
    "prepare",
    "prepare_eval",
    "read",
]


@dataclass(frozen=True)
class RawData:
    """The rows of a run as they were read, and the format that they have."""

    train: Rows
    eval: Rows | None
    format: str


@dataclass(frozen=True)
class PreparedData:
    """The samples of a run, the account of each part, and the format that the rows were read in."""

    train: EncodedDataset
    eval: EncodedDataset | None
    train_report: EncodingReport
    eval_report: EncodingReport | None
    format: str


def read(data: DataSection, seed: int) -> RawData:
    """Returns the rows that the data section names, for training and for evaluation, and their format.

    Needs no tokenizer, so that a wrong file or column is found before anything of the model is read.

    Args:
        data: The recipe's data section.
        seed: Decides the held-out rows.

    Raises:
        DataError: See `sources.read_rows` and `formats.resolve_format`.
    """
    from peftcli.data.formats import resolve_format
    from peftcli.data.sampling import split
    from peftcli.data.sources import read_rows

    train, held_out = read_rows(data.train, "data.train"), None
    if data.eval is not None:
        held_out = read_rows(data.eval, "data.eval")
    elif data.eval_fraction is not None:
        chosen, left = split(len(train), data.eval_fraction, seed)
        train, held_out = train.select(chosen), train.select(left)
    form = resolve_format(train, data.format, data.columns)
    if held_out is not None:
        resolve_format(held_out, form, data.columns)
    return RawData(train, held_out, form)


def prepare(
    data: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    max_positions: int | None,
    seed: int,
    raw: RawData | None = None,
) -> PreparedData:
    """Returns everything that the data section names, encoded.

    Args:
        data: The recipe's data section.
        tokenizer: The model's.
        vocab_size: Rows of the model's embedding.
        max_positions: The most tokens that the model can tell apart by position; None if it has no such limit.
        seed: Decides the held-out rows.
        raw: What `read` returned for the same section and seed, if it was read before.

    Raises:
        DataError: See `read` and `encoding.encode`.
        RecipeError: `data.max_length` is more than the model can take.
    """
    from peftcli.data.encoding import encode

    _check_length(data, max_positions)
    rows = raw or read(data, seed)
    train, train_report = encode(rows.train, rows.format, data, tokenizer, vocab_size)
    if rows.eval is None:
        return PreparedData(train, None, train_report, None, rows.format)
    held_out, eval_report = encode(rows.eval, rows.format, data, tokenizer, vocab_size)
    return PreparedData(train, held_out, train_report, eval_report, rows.format)


def prepare_eval(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, max_positions: int | None, seed: int
) -> EncodedDataset | None:
    """Returns what `prepare` returns as `eval`, without encoding the training data; None where nothing is held out."""
    from peftcli.data.encoding import encode
    from peftcli.data.formats import resolve_format
    from peftcli.data.sources import read_rows

    _check_length(data, max_positions)
    if data.eval is not None:
        rows = read_rows(data.eval, "data.eval")
        form = resolve_format(rows, data.format, data.columns)
        return encode(rows, form, data, tokenizer, vocab_size)[0]
    if data.eval_fraction is None:
        return None
    raw = read(data, seed)
    assert raw.eval is not None
    return encode(raw.eval, raw.format, data, tokenizer, vocab_size)[0]


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
