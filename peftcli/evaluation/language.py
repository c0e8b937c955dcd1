"""Loss, perplexity and token accuracy of a language model, without ever holding more than one batch's logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftcli.data.batching import Batcher
from peftcli.errors import NumericalError
from peftcli.training import loss
from peftcli.training.distributed import Processes, alone

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
    processes: Processes | None = None,
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
        processes: Those that share the dataset among them and must all come here; None for this one alone.

    Raises:
        NumericalError: The loss is not finite.
    """
    model.eval()
    others = processes or alone(device)
    summed, correct, tokens, done = torch.zeros((), device=device), torch.zeros((), device=device), 0, 0
    for batch in batcher.in_order_of_length(batch_size, others.place.rank, others.count):
        scores = score(model, batch.to(device), count_correct=True)
        hits: Tensor | None = scores.correct
        assert hits is not None
        summed += scores.loss
        correct += hits
        tokens += batch.num_supervised
        done = min(done + batch_size * others.count, len(batcher.dataset))
        advance(done, len(batcher.dataset))
    total_loss, total_correct, total_tokens = others.sums(summed, correct, tokens)
    mean = finite_mean(total_loss, int(total_tokens))
    return {
        "eval_loss": mean,
        "eval_perplexity": math.exp(min(mean, LARGEST_EXPONENT)),
        "eval_token_accuracy": total_correct / total_tokens,
        "eval_tokens": int(total_tokens),
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
