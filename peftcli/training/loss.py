"""The loss of a language model, computed only where there is something to learn.

The output head and the cross-entropy run on the supervised positions alone: of a prompt and its answer, only the
answer's tokens cost a row of the vocabulary's size. And of these rows, only a chunk exists at a time, if it is known
what the model does to its logits after the head (`Finish`): what a step needs does not grow with tokens × vocabulary.
Where it is not known, the model's own code makes of all supervised rows what it makes of them.

Shapes: B batch, L length, M length of the answer, D hidden, V vocabulary, N supervised positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcli import inject
from peftcli.data.collation import Batch
from peftcli.data.dataset import IGNORED
from peftcli.training.head import Finish, head_scores, head_sees


class Scores(NamedTuple):
    """What a batch's supervised tokens cost.

    Attributes:
        loss: The sum of the negative log-likelihoods in nats, a scalar in float32 or wider that carries the gradient.
        correct: How many of the tokens had the highest logit, a scalar; None unless asked for.
    """

    loss: Tensor
    correct: Tensor | None


def score(model: nn.Module, batch: Batch, *, finish: Finish | None = None, count_correct: bool = False) -> Scores:
    """Returns the summed loss of the batch's supervised tokens, in float32 whatever the model computes in.

    Args:
        model: The model; it may be wrapped for distributed training: the head is found in the module inside.
        batch: What it reads, and the labels.
        finish: What `checks.finish_of` found; None where it is not known what the model does to its logits.
        count_correct: Whether to count the tokens that had the highest logit.
    """
    return _score(model, batch, _next_tokens(batch), finish, count_correct)


def score_answers(
    model: nn.Module, batch: Batch, *, finish: Finish | None = None, count_correct: bool = False
) -> Scores:
    """Returns what `score` returns, for a model that reads one text and answers with another.

    The decoder's inputs are the answer shifted by the model itself.
    """
    inner: Any = getattr(model, "module", model)
    shifted = inner.prepare_decoder_input_ids_from_labels(labels=batch.labels)
    return _score(model, batch, batch.labels, finish, count_correct, decoder_input_ids=shifted)


def _next_tokens(batch: Batch) -> Tensor:
    return F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)  # position t predicts token t + 1


def _score(
    model: nn.Module, batch: Batch, targets_BL: Tensor, finish: Finish | None, count_correct: bool, **inputs: Tensor
) -> Scores:
    if finish is None:
        logits, targets = _supervised_logits(model, batch, targets_BL, **inputs)
        hits = (logits.detach().argmax(dim=-1) == targets).sum() if count_correct else None
        return Scores(F.cross_entropy(_wide(logits), targets, reduction="sum"), hits)
    inner, keep_BL = getattr(model, "module", model), targets_BL != IGNORED
    with head_scores(inner, targets_BL, keep_BL, finish, count_correct=count_correct) as found:
        nothing = logits_of(model, batch, use_cache=False, **inputs)
    ((loss, correct),) = found
    # The sum of no logits ties the loss to what the model returned: FSDP2 waits for a gradient to come back there.
    return Scores(loss + nothing.sum().to(loss.dtype), correct if count_correct else None)


def supervised_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns the logits [N, V] that predict the supervised tokens, and these tokens' ids [N]."""
    return _supervised_logits(model, batch, _next_tokens(batch))


def _supervised_logits(model: nn.Module, batch: Batch, targets_BL: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    keep_BL = targets_BL != IGNORED

    def pick(_: nn.Module, hidden: Tensor) -> Tensor:
        return hidden[keep_BL].unsqueeze(0) if hidden.shape[:2] == keep_BL.shape else hidden

    with head_sees(getattr(model, "module", model), pick):
        logits = logits_of(model, batch, use_cache=False, **inputs)
    if logits.shape[:2] == keep_BL.shape:  # a model whose head is not a module of its own
        logits = logits[keep_BL]
    return logits.reshape(-1, logits.shape[-1]), targets_BL[keep_BL]


def logits_of(model: nn.Module, batch: Any, **options: Any) -> Tensor:
    """Returns what `model`, whose adapters are told of the batch's tasks, makes of it."""
    inject.see(getattr(model, "module", model), batch.task_ids)
    given = {name: tensor for name, tensor in batch.model_inputs().items() if tensor is not None}
    logits: Tensor = model(**given, **options).logits
    return logits


def score_reference(model: nn.Module, batch: Batch) -> Tensor:
    """Returns what `score`'s loss must equal: all logits, shifted by one, unsupervised positions ignored."""
    logits = logits_of(model, batch, use_cache=False)
    loss: Tensor = F.cross_entropy(
        _wide(logits[:, :-1].flatten(0, 1)), batch.labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


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
