"""How well labels are told: of whole samples, of words, and numbers in their place.

Counts and sums over the whole dataset are kept, so no figure depends on how it is cut into batches.

Shapes: N samples or words, K labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcli.data.batching import Batches
from peftcli.data.dataset import IGNORED
from peftcli.evaluation.ensemble import majority_vote
from peftcli.evaluation.language import finite_mean
from peftcli.training.distributed import Processes, alone
from peftcli.training.objectives import OF_KIND, label_logits

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


class Tally(Protocol):
    """What a dataset's answers add up to."""

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch: logits in float32, labels as in the batch."""

    def gather(self, rows: Callable[[Tensor], Tensor]) -> None:
        """Adds what the other processes have: `rows` returns those of a tensor from every process."""

    def metrics(self) -> dict[str, float]:
        """Returns the figures of all that was added."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batcher: Batches,
    batch_size: int,
    device: torch.device,
    advance: Callable[[int, int], None] = lambda done, total: None,
    *,
    kind: str,
    processes: Processes | None = None,
) -> dict[str, float]:
    """Returns `eval_loss`, `eval_samples` or `eval_tokens`, and the figures of the kind of label.

    They are `eval_accuracy` (of words: `eval_token_accuracy`) and `eval_macro_f1` for single labels, `eval_micro_f1`
    and `eval_macro_f1` for multiple ones, `eval_mse`, `eval_pearson` and `eval_spearman` for numbers. The model is left
    in eval mode.

    Args:
        model: The model, prepared or not.
        batcher: Makes the dataset's batches.
        batch_size: Samples a batch.
        device: Where the model is.
        advance: Called with the samples done and in all.
        kind: What the labels are, as in `data.labels.Labels.kind`.
        processes: Those that share the dataset among them and must all come here; None for this one alone.

    Raises:
        NumericalError: The loss is not finite.
    """
    model.eval()
    others = processes or alone(device)
    summed, count, done, total = 0.0, 0, 0, len(batcher.dataset)
    of_words = batcher.dataset.goal == "token"
    kinds: dict[str, type[Tally]] = {"single-label": Confusion, "multi-label": Hits, "regression": Numbers}
    tally = kinds[kind]()
    for on_host in batcher.in_order_of_length(batch_size, others.place.rank, others.count):
        batch = on_host.to(device)
        logits = label_logits(model, batch)
        summed += float(OF_KIND[kind](logits, batch.labels))
        count += batch.num_supervised
        answers, labels = _together(logits, batch.labels, batcher.num_prompts, kind)
        if not batch.num_supervised:  # a stand-in, in a share that had no more samples
            answers, labels = answers[:0], (labels if kind == "single-label" else answers)[:0]
        tally.add(answers, labels)
        done = min(done + batch_size * others.count, total)
        advance(done, total)
    tally.gather(others.rows)
    summed, count = others.sums(summed)[0], int(others.sums(count)[0])
    figures = tally.metrics()
    if of_words:
        figures["token_accuracy"] = figures.pop("accuracy")
    named = {f"eval_{name}": value for name, value in figures.items()}
    seen = count // batcher.num_prompts
    return {"eval_loss": finite_mean(summed, count), **named, "eval_tokens" if of_words else "eval_samples": seen}


def _together(logits: Tensor, labels: Tensor, num_prompts: int, kind: str) -> tuple[Tensor, Tensor]:
    """Returns one answer for each sample from those of all prompts: the majority's label, or the mean of numbers.

    With virtual tokens in front, a word has as many places as with any other prompt: labels are the same for all.
    """
    if num_prompts == 1:
        return logits, labels
    by_prompt = logits.unflatten(0, (num_prompts, -1))
    labels = labels.unflatten(0, (num_prompts, -1))[0]
    if kind != "single-label":
        return by_prompt.mean(dim=0), labels
    return F.one_hot(majority_vote(by_prompt), logits.shape[-1]).to(logits.dtype), labels


class Confusion:
    """How often each label was taken for each [K, K]: rows are the true ones."""

    def __init__(self) -> None:
        self.counts: Counts = np.zeros((0, 0), np.int64)

    def add(self, logits: Tensor, labels: Tensor) -> None:  # noqa: D102
        size = logits.shape[-1]
        kept = labels.reshape(-1) != IGNORED
        chosen = logits.reshape(-1, size).argmax(dim=-1)[kept]
        cells = torch.bincount(labels.reshape(-1)[kept] * size + chosen, minlength=size * size)
        found = cells.reshape(size, size).cpu().numpy()
        self.counts = found if not self.counts.size else self.counts + found

    def gather(self, rows: Callable[[Tensor], Tensor]) -> None:  # noqa: D102
        self.counts = rows(torch.from_numpy(self.counts)[None]).sum(dim=0).numpy()

    def metrics(self) -> dict[str, float]:  # noqa: D102
        hits, wrong = np.diag(self.counts), self.counts.sum(axis=0) + self.counts.sum(axis=1)
        return {"accuracy": float(hits.sum() / self.counts.sum()), "macro_f1": macro_f1(hits, wrong)}


class Hits:
    """How often each of several labels [K] was right, and how often it was given or true; given means above 1/2."""

    def __init__(self) -> None:
        self.hits: Counts = np.zeros(0, np.int64)
        self.given_and_true: Counts = np.zeros(0, np.int64)

    def add(self, logits: Tensor, labels: Tensor) -> None:  # noqa: D102
        given, true = logits > 0, labels > 0.5
        hits = (given & true).sum(dim=0).cpu().numpy()
        both = (given.sum(dim=0) + true.sum(dim=0)).cpu().numpy()
        self.hits = self.hits + hits if self.hits.size else hits
        self.given_and_true = self.given_and_true + both if self.given_and_true.size else both

    def gather(self, rows: Callable[[Tensor], Tensor]) -> None:  # noqa: D102
        self.hits = rows(torch.from_numpy(self.hits)[None]).sum(dim=0).numpy()
        self.given_and_true = rows(torch.from_numpy(self.given_and_true)[None]).sum(dim=0).numpy()

    def metrics(self) -> dict[str, float]:  # noqa: D102
        micro = 2 * self.hits.sum() / max(self.given_and_true.sum(), 1)
        return {"micro_f1": float(micro), "macro_f1": macro_f1(self.hits, self.given_and_true)}


class Numbers:
    """All predicted and true numbers [N, K], which the rank correlation needs whole."""

    def __init__(self) -> None:
        self.given: list[Floats] = []
        self.true: list[Floats] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:  # noqa: D102
        self.given.append(logits.double().cpu().numpy())
        self.true.append(labels.double().cpu().numpy())

    def gather(self, rows: Callable[[Tensor], Tensor]) -> None:  # noqa: D102
        self.given = [rows(torch.from_numpy(np.concatenate(self.given))).numpy()]
        self.true = [rows(torch.from_numpy(np.concatenate(self.true))).numpy()]

    def metrics(self) -> dict[str, float]:
        """Returns the mean over the K numbers of each figure; no correlation where all are equal: it has none."""
        given, true = np.concatenate(self.given), np.concatenate(self.true)
        found = {"mse": float(((given - true) ** 2).mean())}
        pairs = list(zip(given.T, true.T, strict=True))
        if all(np.ptp(one) > 0 and np.ptp(other) > 0 for one, other in pairs):
            found["pearson"] = float(np.mean([pearson(one, other) for one, other in pairs]))
            found["spearman"] = float(np.mean([pearson(ranks(one), ranks(other)) for one, other in pairs]))
        return found


def macro_f1(hits: Counts, given_and_true: Counts) -> float:
    """Returns the mean of the labels' F1: 2 hits / (times given + times true), over labels given or true at all."""
    present = given_and_true > 0
    return float((2 * hits[present] / given_and_true[present]).mean()) if present.any() else 0.0


def pearson(one: Floats, other: Floats) -> float:
    """Returns the linear correlation of two samples [N], neither of which is constant."""
    a, b = one - one.mean(), other - other.mean()
    return float((a @ b) / np.sqrt((a @ a) * (b @ b)))


def ranks(values: Floats) -> Floats:
    """Returns the rank of each value [N], from 0; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: Floats = ends - (counts + 1) / 2
    found: Floats = means[inverse]
    return found
