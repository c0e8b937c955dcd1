"""Loss, perplexity and token accuracy of a language model, without ever holding more than one batch's logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftcli.data.batching import Batcher
from peftcli.errors import NumericalError
from peftcli.training import loss

LARGEST_EXPONENT = 700.0
"""Beyond this, exp overflows a float: a perplexity that large says only that the model is broken."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batcher: Batcher,
    batch_size: int,
    device: torch.device,
    advance: Callable[[int, int], None] = lambda done, total: None,
    *,
    score: Callable[..., loss.Scores] = loss.score,
) -> dict[str, float]:
    """Returns `eval_loss` (nats a token), `eval_perplexity`, `eval_token_accuracy` (0 … 1) and `eval_tokens`.

    All are over the supervised tokens of the whole dataset, whatever the batches; the model is left in eval mode.

    Args:
        model: The model, prepared or not.
        batcher: Makes the dataset's batches.
        batch_size: Samples a batch.
        device: Where the model is.
        advance: Called with the samples done and in all.
        score: `loss.score`, or `loss.score_answers` for a model that answers one text with another.

    Raises:
        NumericalError: The loss is not finite.
    """
    model.eval()
    summed, correct, tokens, done = torch.zeros((), device=device), torch.zeros((), device=device), 0, 0
    for batch in batcher.in_order_of_length(batch_size):
        scores = score(model, batch.to(device), count_correct=True)
        hits: Tensor | None = scores.correct
        assert hits is not None
        summed += scores.loss
        correct += hits
        tokens += batch.num_supervised
        done = min(done + batch_size, len(batcher.dataset))
        advance(done, len(batcher.dataset))
    mean = finite_mean(float(summed), tokens)
    return {
        "eval_loss": mean,
        "eval_perplexity": math.exp(min(mean, LARGEST_EXPONENT)),
        "eval_token_accuracy": float(correct) / tokens,
        "eval_tokens": tokens,
    }


def finite_mean(summed: float, count: int) -> float:
    """Returns the mean loss.

    Raises:
        NumericalError: It is not finite.
    """
    mean = summed / count
    if not math.isfinite(mean):
        raise NumericalError(
            f"the evaluation loss is {mean}", hint="the model's weights or their number format cannot hold its values"
        )
    return mean
