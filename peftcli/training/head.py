"""The output head of a language model: who sees what of it, and what becomes of its logits.

The loss of chunks of rows is computed where the model calls its head, inside that call. What is gathered for the head
(weights that are spread over processes) is then there, once for all chunks, autocast is as the model has it, and no
forward is copied: the model goes on with the logits of no rows at all. What it would have done to them (scaling,
capping) is a `Finish`, found by trying (`checks.finish_of`), since the same field of a configuration divides logits
in one family and multiplies them in another.

Shapes: B batch, L length, D hidden, V vocabulary, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcli import inject
from peftcli.ops.cross_entropy import CHUNK_BYTES, Work, chunked_cross_entropy, rows_for
from peftcli.targets import output_head

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Fields of configurations that logits are multiplied with or divided by: Cohere's, Granite's, Falcon-H1's, …"""
CAPS = ("final_logit_softcapping",)
"""Fields of configurations that keep logits below a bound: Gemma's."""


@dataclass(frozen=True)
class Finish:
    """What a model does to its head's logits z: `z·scale`, then `cap·tanh(z / cap)`.

    Attributes:
        scale: The factor.
        cap: What no logit exceeds; None for no bound.
    """

    scale: float = 1.0
    cap: float | None = None

    @property
    def chunk_bytes(self) -> int:
        """How large a chunk's logits may be: half where a cap doubles the tensors that are alive with them."""
        return CHUNK_BYTES if self.cap is None else CHUNK_BYTES // 2

    def __call__(self, z: Tensor) -> Tensor:
        """Returns the model's logits, in `z`'s dtype."""
        z = z if self.scale == 1 else z * self.scale
        return z if self.cap is None else torch.tanh(z / self.cap) * self.cap


def possible_finishes(config: Any) -> list[Finish]:
    """Returns what a model with `config` may do to its logits."""
    text = config.get_text_config(decoder=True)
    given = [float(value) for name in SCALES if (value := getattr(text, name, None))]
    caps = [float(value) for name in CAPS if (value := getattr(text, name, None))]
    scales = [1.0, *given, *(1 / value for value in given)]
    return [Finish(scale, cap) for scale in scales for cap in (None, *caps)]


@contextmanager
def head_sees(model: nn.Module, what: Callable[[nn.Module, Tensor], Tensor]) -> Iterator[None]:
    """While entered, `model`'s output head gets `what(head, hidden)` in place of its hidden states [B, L, D].

    A model whose head is no module of its own goes on as it would.
    """
    head = output_head(model)
    if head is None:
        yield
        return

    def change(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (what(head, arguments[0]), *arguments[1:])

    handle = head.register_forward_pre_hook(change)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def head_scores(
    model: nn.Module, targets_BL: Tensor, keep_BL: Tensor, finish: Finish, *, count_correct: bool
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """While entered, `model`'s head computes the loss of the positions `keep_BL`, and logits of no position.

    Yields a list that then holds, for the one call of the head, the summed loss and how many targets had the highest
    logit (0 unless asked for).
    """
    found: list[tuple[Tensor, Tensor]] = []
    shared = inject.shared_part(model)

    def score(head: nn.Module, hidden: Tensor) -> Tensor:
        rows_ND = hidden[keep_BL]
        # Not `head(...)`: the call under way has gathered the weights, and lets go of them when it ends.
        work = Work(
            targets_BL[keep_BL],
            lambda chunk: finish(head.forward(chunk.unsqueeze(0))).squeeze(0),
            rows_for(len(head.weight), finish.chunk_bytes),  # type: ignore[arg-type]
            count_correct,
        )
        inside = [*head.parameters(), *(shared.parameters() if shared is not None else ())]
        found.append(chunked_cross_entropy(work, rows_ND, [one for one in inside if one.requires_grad]))
        return rows_ND[:0].unsqueeze(0)

    with head_sees(model, score):
        yield found
