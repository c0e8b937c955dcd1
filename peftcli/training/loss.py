"""The causal language-model loss, computed only where there is something to learn.

The output head and the cross-entropy run on the supervised positions alone: of a prompt and its answer, only the
answer's tokens cost a row of the vocabulary's size. The head is reached by a forward pre-hook that picks these rows
from the hidden states, so whatever a model does to its logits afterwards (scaling, capping) stays the model's own code.

Shapes: B batch, L length, D hidden, V vocabulary, N supervised positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcli import inject
from peftcli.data.collation import Batch
from peftcli.data.dataset import IGNORED
from peftcli.targets import output_head


class Scores(NamedTuple):
    """What a batch's supervised tokens cost.

    Attributes:
        loss: The sum of the negative log-likelihoods in nats, a float32 scalar that carries the gradient.
        correct: How many of the tokens had the highest logit, a scalar; None unless asked for.
    """

    loss: Tensor
    correct: Tensor | None


@contextmanager
def head_sees(model: nn.Module, keep_BL: Tensor) -> Iterator[None]:
    """While entered, the model's output head gets only the hidden states [1, N, D] at `keep_BL`, in reading order."""
    head = output_head(model)
    if head is None:
        yield
        return

    def pick(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0]
        return (hidden[keep_BL].unsqueeze(0), *arguments[1:]) if hidden.shape[:2] == keep_BL.shape else arguments

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def supervised_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the logits [N, V] that predict the supervised tokens, and these tokens' ids [N].

    `model` may be wrapped for distributed training; the head is found in the module inside.
    """
    targets_BL = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)  # position t predicts token t + 1
    keep_BL = targets_BL != IGNORED
    with head_sees(getattr(model, "module", model), keep_BL):
        logits = logits_of(model, batch, use_cache=False)
    if logits.shape[:2] == keep_BL.shape:  # a model whose head is not a module of its own
        logits = logits[keep_BL]
    return logits.reshape(-1, logits.shape[-1]), targets_BL[keep_BL]


def score_answers(model: nn.Module, batch: Batch, *, count_correct: bool = False) -> Scores:
    """Returns what `score` returns, for a model that reads one text and answers with another.

    The decoder's inputs are the answer shifted by the model itself.
    """
    inner: Any = getattr(model, "module", model)
    keep_BM = batch.labels != IGNORED
    shifted = inner.prepare_decoder_input_ids_from_labels(labels=batch.labels)
    with head_sees(inner, keep_BM):
        logits = logits_of(model, batch, decoder_input_ids=shifted, use_cache=False)
    if logits.shape[:2] == keep_BM.shape:
        logits = logits[keep_BM]
    logits, targets = logits.reshape(-1, logits.shape[-1]), batch.labels[keep_BM]
    correct = (logits.detach().argmax(dim=-1) == targets).sum() if count_correct else None
    return Scores(F.cross_entropy(logits.float(), targets, reduction="sum"), correct)


def logits_of(model: nn.Module, batch: Any, **options: Any) -> Tensor:
    """Returns what `model`, whose adapters are told of the batch's tasks, makes of it."""
    inject.see(getattr(model, "module", model), batch.task_ids)
    given = {name: tensor for name, tensor in batch.model_inputs().items() if tensor is not None}
    logits: Tensor = model(**given, **options).logits
    return logits


def score(model: nn.Module, batch: Batch, *, count_correct: bool = False) -> Scores:
    """Returns the summed loss of the batch's supervised tokens, in float32 whatever the model computes in."""
    logits, targets = supervised_logits(model, batch)
    correct = (logits.detach().argmax(dim=-1) == targets).sum() if count_correct else None
    return Scores(F.cross_entropy(logits.float(), targets, reduction="sum"), correct)


def score_reference(model: nn.Module, batch: Batch) -> Tensor:
    """Returns what `score`'s loss must equal: all logits, shifted by one, unsupervised positions ignored."""
    logits = logits_of(model, batch, use_cache=False)
    loss: Tensor = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss


def noise_seed(seed: int, *where: int) -> int:
    """Returns the seed of all randomness at one place of a run, such as (step, micro-batch, rank).

    A pure function: dropout then depends on where a run is, never on how it got there, and a resumed run draws what
    an uninterrupted one would have drawn.
    """
    mixed = seed
    for value in where:
        mixed = (mixed * 6364136223846793005 + value + 1442695040888963407) % 2**64
        mixed ^= mixed >> 29
    return mixed % 2**63


def seed_noise(seed: int, *where: int) -> None:
    """Seeds torch's random sources for one place of a run; see `noise_seed`."""
    torch.manual_seed(noise_seed(seed, *where))
