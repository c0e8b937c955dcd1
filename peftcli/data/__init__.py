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

__all__ = ["EncodedDataset", "EncodingReport", "PreparedData", "Sample", "format_prompt", "prepare"]


@dataclass(frozen=True)
class PreparedData:
    """The samples of a run, the account of each part, and the format that the rows were read in."""

    train: EncodedDataset
    eval: EncodedDataset | None
    train_report: EncodingReport
    eval_report: EncodingReport | None
    format: str


def prepare(
    data: DataSection, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, max_positions: int | None, seed: int
) -> PreparedData:
    """Returns everything that the data section names, encoded.

    Args:
        data: The recipe's data section.
        tokenizer: The model's.
        vocab_size: Rows of the model's embedding.
        max_positions: The most tokens that the model can tell apart by position; None if it has no such limit.
        seed: Decides the held-out rows.

    Raises:
        DataError: See `sources.read_rows`, `formats.resolve_format` and `encoding.encode`.
        RecipeError: `data.max_length` is more than the model can take.
    """
    from peftcli.data.encoding import encode
    from peftcli.data.formats import resolve_format

    if max_positions is not None and data.max_length > max_positions:
        raise RecipeError(
            f"data.max_length: {data.max_length:,} tokens are more than the model's {max_positions:,} positions",
            hint=f"set data.max_length to {max_positions} or less",
        )
    train_rows, eval_rows = _rows(data, seed)
    form = resolve_format(train_rows, data.format, data.columns)
    if eval_rows is not None:
        resolve_format(eval_rows, form, data.columns)
    train, train_report = encode(train_rows, form, data, tokenizer, vocab_size)
    held_out, eval_report = (
        encode(eval_rows, form, data, tokenizer, vocab_size) if eval_rows is not None else (None, None)
    )
    return PreparedData(train, held_out, train_report, eval_report, form)


def _rows(data: DataSection, seed: int) -> tuple[Rows, Rows | None]:
    """Returns the rows for training and for evaluation: from files of their own, or held out."""
    from peftcli.data.sampling import split
    from peftcli.data.sources import read_rows

    rows = read_rows(data.train, "data.train")
    if data.eval is not None:
        return rows, read_rows(data.eval, "data.eval")
    if data.eval_fraction is None:
        return rows, None
    train, held_out = split(len(rows), data.eval_fraction, seed)
    return rows.select(train), rows.select(held_out)


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
