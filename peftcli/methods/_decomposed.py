"""DoRA's weight decomposition around any low-rank update: the update turns each row of V, `m` sets its length.

V = W + s·B A        n = ‖V‖ by row, over the inputs        W' = diag(m ⊘ n) V
A [R, I]   B [O, R]   m, n [O]   W, V [O, I]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from peftcli.methods._place import Base, Site
from peftcli.methods._protocol import MethodConfig
from peftcli.ops import decomposition
from peftcli.ops.decomposition import Rescaling
from peftcli.ops.dropout import dropout
from peftcli.ops.low_rank import low_rank, may_be_written
from peftcli.ops.precision import without_autocast


class LowRank(Protocol):
    """What a method must offer so that its update can be decomposed."""

    dropout: float

    def forward(self, base: Base, x: Tensor, rescaling: Rescaling | None = None) -> Tensor:
        """Returns `x Wᵀ + b + s·drop(x) Aᵀ Bᵀ` [..., O], a fresh tensor, or what `rescaling` makes of it."""
        ...

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Returns `A` [R, I], `B` [O, R] and `s`."""
        ...


class DecomposedConfig(MethodConfig):
    """The fields of the decomposition itself."""

    detach_norm: bool = Field(True, description="Treat the norm as a constant in the backward pass, as the paper does.")
    dropout_mode: Literal["branch", "paper"] = Field(
        "branch", description="paper also drops the inputs of the rescaled base, at the cost of a second base product."
    )


AT_ONCE = ("cpu",)
"""Devices that are not waited for: what they are asked, they have computed."""


@dataclass
class Question:
    """Something about tensors that is true or not, for which an accelerator is waited for once a step.

    It computes behind the program, which would have to wait for it at each of a model's modules. So in training its
    last answer stands until `answer` brings the next one. What is asked for here comes about over many steps.

    Attributes:
        last: The last answer; None before the first.
        asked: What is to be the next one, a tensor of one truth value.
    """

    last: bool | None = None
    asked: Tensor | None = None

    def holds(self, found: Tensor, *, training: bool) -> bool:
        """Returns whether it is true, of which `found` will tell."""
        if self.last is None or not training or found.device.type in AT_ONCE:
            self.last, self.asked = bool(found), None
        else:
            self.asked = found
        return self.last


def answer(decompositions: Iterable[Decomposition]) -> None:
    """Brings all answers that are outstanding, after a step."""
    asked = [(one, one.asked) for each in decompositions for one in each.questions if one.asked is not None]
    if asked:
        for (question, _), found in zip(asked, torch.stack([found for _, found in asked]).tolist(), strict=True):
            question.last, question.asked = found, None


class _Known(NamedTuple):
    """The norms `n` [O] of the factors `A` and `B`."""

    A: Tensor
    B: Tensor
    n: Tensor


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)


class Decomposition(nn.Module):
    """The magnitudes `m` [O] at one site, and `c` [O], the squared row norms of W.

    `m` starts as the row norms of W. Every function takes the update it is for; None for an update of nothing.
    """

    def __init__(self, config: DecomposedConfig, site: Site) -> None:
        super().__init__()
        self.detach_norm = config.detach_norm
        self.dropout_mode = config.dropout_mode
        self.kept = site.result_is_kept
        if site.device.type == "meta":
            c = torch.empty(site.out_features, device="meta")
        else:
            c = decomposition.squared_row_norms(site.dense()).to(site.device)
        self.m = nn.Parameter(c.sqrt())
        self.register_buffer("c", c, persistent=False)
        self.c: Tensor
        self._known: _Known | None = None
        self._loses_digits, self._has_small = self.questions = Question(), Question()

    def output(self, base: Base, x: Tensor, inner: LowRank | None) -> Tensor:
        """Returns `x W'ᵀ + b` [..., O]; the bias is never scaled."""
        n = self.norms(base, inner)
        if inner is not None and self._drops_all(base, inner):
            return self._output_as_in_paper(base, x, inner, decomposition.magnitude_ratio(self.m, n))
        rescaling = Rescaling(self.m, n, self.kept and self._can_be_kept(n))
        if inner is not None:
            return inner.forward(base, x, rescaling)
        h = base.forward(x)
        return rescaling._replace(kept=rescaling.kept and may_be_written(h))(h, base.bias)

    def _drops_all(self, base: Base, inner: LowRank) -> bool:
        """Returns whether the base's inputs are dropped too."""
        return self.dropout_mode == "paper" and self.training and bool(inner.dropout) and base.kind != "embedding"

    def _can_be_kept(self, n: Tensor) -> bool:
        """Returns whether the gradient of the factors `m ⊘ n` can be told from the result."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return False
        return not self._has_small.holds(decomposition.has_small(self.m, n), training=self.training)

    def norms(self, base: Base, inner: LowRank | None) -> Tensor:
        """Returns `n` [O], the row norms of `V`, in float32 or wider.

        They cost R further tokens. Outside of training, where they are the same for every batch and every token that
        is generated, the last ones are kept with a copy of the factors they are for: a version counter would miss what
        is written through `.data`, or by an optimizer's own kernels.
        """
        if inner is None:
            return self.c.sqrt()
        tracked = torch.is_grad_enabled() and not self.detach_norm
        with torch.set_grad_enabled(tracked), without_autocast(self.c.device.type):
            A, B, scale = inner.factors()
            if tracked or self.training or torch.compiler.is_compiling():
                if self._known is not None:
                    self._known = None
                return self._computed_norms(base, A, B, scale)
            known = self._known
            if known is None or not (_is_same(known.A, A) and _is_same(known.B, B)):
                n = self._computed_norms(base, A, B, scale)
                known = self._known = _Known(A.detach().clone(), B.detach().clone(), n)
            return known.n

    def _computed_norms(self, base: Base, A: Tensor, B: Tensor, scale: float) -> Tensor:
        n, lost = decomposition.factored_row_norms(self.c, base.project(A), A, B, scale)
        # Compiled code cannot branch on data; there the factored value, clamped at zero, stands.
        if not torch.compiler.is_compiling() and self._loses_digits.holds(lost.any(), training=self.training):
            direct = decomposition.direct_row_norms(base.dense(), A, B, scale)
            n = torch.where(lost, direct.to(n.dtype), n)
        return n

    def _output_as_in_paper(self, base: Base, x: Tensor, inner: LowRank, g: Tensor) -> Tensor:
        """Returns `x Wᵀ + b + (g−1) ⊙ (x̃ Wᵀ) + g ⊙ s x̃ Aᵀ Bᵀ` [..., O] with `x̃ = drop(x)`."""
        dropped = dropout(x, inner.dropout)
        y: Tensor = base.forward(x)
        y_dropped: Tensor = base.forward(dropped)
        y_dropped = y_dropped if base.bias is None else y_dropped - base.bias
        return (y + (g - 1) * y_dropped + g * low_rank(dropped, *inner.factors())).to(y.dtype)

    def merged(self, weight: Tensor, inner: LowRank | None) -> Tensor:
        """Returns `W'` [O, I] in `weight`'s dtype."""
        if inner is None:
            return decomposition.merged_decomposition(weight, torch.zeros(()), self.m)
        A, B, scale = inner.factors()
        return decomposition.merged_decomposition(weight, scale * (B @ A), self.m)
