"""The cross-entropy over a vocabulary without the logits of all rows at once.

    loss = Σₙ (log Σᵥ exp zₙᵥ − zₙ,ₜₙ)        z = project(h), a chunk of rows at a time
    ∂loss/∂z = softmax(z) − onehot(t)

The loss is a sum, so a chunk's gradient depends on no other chunk: it is computed as soon as the chunk's logits are
there, in the forward pass, and neither logits nor probabilities are kept or computed twice. The backward pass has only
to multiply by the gradient of the loss. Liger Kernel (Hsu et al. 2024, arXiv 2410.10989, section 3.2) does the same
for one matrix; here `project` is any function of the rows, and what trains inside it gets its gradient as well.

Shapes: N rows, D hidden, V vocabulary. h [N, D], z [N, V], t [N].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK_BYTES = 64_000_000
"""How large a chunk's logits may be in float32. Up to three tensors of that size are alive at a time: the logits, their
softmax, and one of another dtype; and whatever more the projection keeps for its own gradient."""
FEWEST_ROWS = 16
"""A chunk is never smaller, however large the vocabulary: fewer rows than that leave a matrix product idle."""
FLOAT16_BOOST = 1024.0
"""What probabilities are multiplied by on their way through a projection in float16, whose smallest number is 6e-8.
A loss scale does that for other gradients, and comes too late for one that is computed in the forward pass."""


@dataclass(frozen=True)
class Work:
    """What a loss is computed of, beside what gets a gradient.

    Attributes:
        targets: The rows' classes [N].
        project: Returns the logits [n, V] of n rows [n, D].
        rows: Rows of a chunk, at most.
        count_correct: Whether to count the rows whose target has the highest logit.
    """

    targets: Tensor
    project: Callable[[Tensor], Tensor]
    rows: int
    count_correct: bool = False

    def chunks(self) -> Iterator[slice]:
        """Yields the rows of each chunk, about equally many; one chunk of none where there are no rows."""
        total = len(self.targets)
        count = max(1, -(-total // self.rows))
        size = max(1, -(-total // count))
        return (slice(start, min(start + size, total)) for start in range(0, max(total, 1), size))


def rows_for(vocabulary: int, budget: int = CHUNK_BYTES) -> int:
    """Returns how many rows of float32 logits over `vocabulary` classes fit into `budget` bytes, but some at least."""
    return max(FEWEST_ROWS, budget // (4 * vocabulary))


def chunked_cross_entropy(work: Work, hidden: Tensor, trained: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
    """Returns the summed loss in nats, in float32 or wider, and how many rows were right (0 unless asked for).

    Args:
        work: What to compute.
        hidden: `h` [N, D].
        trained: The leaves inside `project` that may want a gradient.
    """
    if torch.is_grad_enabled() and any(one.requires_grad for one in (hidden, *trained)):
        loss, correct = _WithGradient.apply(work, hidden, *trained)  # type: ignore[no-untyped-call]
        return loss, correct
    with torch.no_grad():
        parts = [_chunk_loss(work.project(hidden[rows]), work.targets[rows], work)[:2] for rows in work.chunks()]
    losses, corrects = zip(*parts, strict=True)
    return torch.stack(losses).sum(), torch.stack(corrects).sum()


class _WithGradient(torch.autograd.Function):
    """The loss, which has its gradient with it."""

    @staticmethod
    def forward(ctx: Any, work: Work, hidden: Tensor, *trained: Tensor) -> tuple[Tensor, Tensor]:
        _, *needed = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * len(needed)
        if needed[0]:
            found[0] = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        losses, corrects = [], []
        for rows in work.chunks():
            with torch.enable_grad():
                h = hidden[rows].detach().requires_grad_(needed[0])
                z = work.project(h)
            loss, correct, slope, boost = _chunk_loss(z, work.targets[rows], work, with_slope=True)
            leaves = [leaf for leaf, needs in zip((h, *trained), needed, strict=True) if needs]
            gradients = iter(torch.autograd.grad(z, leaves, slope, allow_unused=True))
            _add(found, rows, [next(gradients) if needs else None for needs in needed])
            del z, slope
            losses.append(loss)
            corrects.append(correct)
        ctx.save_for_backward(*found)
        ctx.boost = boost
        correct = torch.stack(corrects).sum()
        ctx.mark_non_differentiable(correct)
        return torch.stack(losses).sum(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        factor = slope / ctx.boost  # may be larger than float16's largest number, and must not be rounded to bfloat16
        return None, *(None if one is None else (one * factor.expand(1)).to(one.dtype) for one in ctx.saved_tensors)


def _chunk_loss(
    z: Tensor, targets: Tensor, work: Work, *, with_slope: bool = False
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Returns a chunk's loss, its count of right rows, `∂loss/∂z` in z's dtype, and the factor that is in it too."""
    z = z.detach()
    boost = FLOAT16_BOOST if z.dtype == torch.float16 else 1.0
    correct = (z.argmax(dim=-1) == targets).sum() if work.count_correct else targets.new_zeros(())
    log_p = F.log_softmax(z, dim=-1, dtype=torch.promote_types(z.dtype, torch.float32))
    at_target = targets[:, None]
    loss = -log_p.gather(1, at_target).sum()
    if not with_slope:
        return loss, correct, None, boost
    slope = log_p.exp_()
    slope.scatter_add_(1, at_target, slope.new_full((), -1.0).expand(at_target.shape))
    return loss, correct, (slope * boost if boost != 1 else slope).to(z.dtype), boost


def _add(found: list[Tensor | None], rows: slice, chunk: Sequence[Tensor | None]) -> None:
    """Puts a chunk's gradients where they belong: of `hidden` its own rows, of what trains a part of the sum."""
    if found[0] is not None and chunk[0] is not None:
        found[0][rows] = chunk[0]
    for index, gradient in enumerate(chunk[1:], 1):
        before = found[index]
        if gradient is not None:
            found[index] = gradient if before is None else before.add_(gradient)


def chunked_cross_entropy_reference(work: Work, hidden: Tensor) -> Tensor:
    """Returns what `chunked_cross_entropy`'s loss must equal: all logits at once."""
    z = work.project(hidden)
    return F.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), work.targets, reduction="sum")
