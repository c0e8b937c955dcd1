"""Products with a matrix S [m, n] of few entries, whose places are fixed and whose p values are trained."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Places(NamedTuple):
    """Where S has its entries, sorted by row and then in the order given.

    Attributes:
        order: Which of the values each entry has [p].
        rows: Each entry's row [p].
        columns: Each entry's column [p].
        row_starts: At which entry each row begins, and where the last one ends [m + 1].
        by_column: The entries in the order of their columns [p].
        column_starts: As `row_starts`, for the columns in that order [n + 1].
    """

    order: Tensor
    rows: Tensor
    columns: Tensor
    row_starts: Tensor
    by_column: Tensor
    column_starts: Tensor


def places(rows: Tensor, columns: Tensor, m: int, n: int) -> Places:
    """Returns the places whose k-th value is at (`rows[k]`, `columns[k]`) of a matrix [m, n]; no place comes twice."""
    order = rows.argsort(stable=True)
    rows, columns = rows[order], columns[order]
    by_column = columns.argsort(stable=True)
    starts = torch.searchsorted(rows, torch.arange(m + 1)), torch.searchsorted(columns[by_column], torch.arange(n + 1))
    return Places(order, rows, columns, starts[0], by_column, starts[1])


def sparse_product(values: Tensor, x: Tensor, at: Places) -> Tensor:
    """Returns `S x` [m, T] for `x` [n, T] and the `values` [p] of S, sorted as the places are.

    Costs p·T multiplications and nothing of size m·n or p·T; only the gradient of the values gathers p·T numbers.
    """
    return _SparseProduct.apply(values, x, *at[1:])  # type: ignore[no-untyped-call, no-any-return]


def dense(values: Tensor, at: Places) -> Tensor:
    """Returns S [m, n] itself, from its `values` [p], sorted as the places are."""
    empty = values.new_zeros(len(at.row_starts) - 1, len(at.column_starts) - 1)
    return empty.index_put((at.rows, at.columns), values)


def sparse_product_reference(values: Tensor, x: Tensor, at: Places) -> Tensor:
    """Returns what `sparse_product` must equal."""
    return dense(values, at) @ x


class _SparseProduct(torch.autograd.Function):
    """The product, with gradients that cost what it costs: autograd would keep p·T numbers for each layer."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, *at: Tensor) -> Tensor:
        _, columns, row_starts, *_ = at
        ctx.save_for_backward(values, x, *at)
        return _sums_of_rows(values, x, columns, row_starts)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        values, x, rows, columns, _, by_column, column_starts = ctx.saved_tensors
        for_values = for_x = None
        if ctx.needs_input_grad[0]:
            for_values = g.index_select(0, rows).mul_(x.index_select(0, columns)).sum(1)
        if ctx.needs_input_grad[1]:
            for_x = _sums_of_rows(values[by_column], g, rows[by_column], column_starts)
        return for_values, for_x, None, None, None, None, None


def _sums_of_rows(values: Tensor, x: Tensor, picked: Tensor, starts: Tensor) -> Tensor:
    """Returns, for each range that begins in `starts`, the sum of `values` times the rows of `x` that are `picked`."""
    return F.embedding_bag(
        picked, x.contiguous(), starts, mode="sum", per_sample_weights=values, include_last_offset=True
    )
