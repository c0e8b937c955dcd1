"""How many kinds of samples there are: the elbow of k-means over what samples are about, told from their tokens.

The same samples always give the same number: nothing here depends on a process's random source.

Shapes: S samples, F features, C concepts, k clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_FEATURES = 2048
"""Tokens that a sample is described by."""
NUM_CONCEPTS = 16
"""Directions in which samples are compared: more than clusters to tell apart, few enough to leave out the noise."""
MAX_ITERATIONS = 100
"""k-means converges long before; this only bounds a cycle of ties."""


def num_clusters(samples: Sequence[Sequence[int]], most: int) -> int:
    """Returns how many clusters the samples, token ids each, fall into: from 2 to `most`."""
    return elbow(k_means_errors(concepts(tf_idf(samples)), most + 1))


def tf_idf(samples: Sequence[Sequence[int]]) -> Tensor:
    """Returns a vector of length 1 for each sample [S, F] (0 where it has no token that tells it from others).

    A token counts `(1 + log n) · log(S / S_t)`, n times in this sample and in S_t of all. So a token of every sample,
    such as a chat template's, counts nothing. The F tokens that sum up to most are the features.
    """
    ids = torch.tensor([token for sample in samples for token in sample], dtype=torch.int64)
    rows = torch.repeat_interleave(torch.tensor([len(sample) for sample in samples], dtype=torch.int64))
    vocabulary = int(ids.max()) + 1 if len(ids) else 1
    pairs, times = (rows * vocabulary + ids).unique(return_counts=True)
    rows, ids = pairs // vocabulary, pairs % vocabulary
    holders = torch.bincount(ids, minlength=vocabulary)
    weights = (1 + times.log()) * (len(samples) / holders[ids]).log()
    totals = torch.zeros(vocabulary).index_add_(0, ids, weights)
    features = totals.argsort(descending=True, stable=True)[:NUM_FEATURES]
    columns = torch.full((vocabulary,), -1).index_put_((features,), torch.arange(len(features)))[ids]
    known = columns >= 0
    X = torch.zeros(len(samples), len(features))
    X[rows[known], columns[known]] = weights[known]
    return torch.nn.functional.normalize(X, dim=1)


def concepts(X: Tensor) -> Tensor:
    """Returns each sample of `X` [S, F] in its C strongest directions, the right singular vectors; of length 1 [S, C].

    Two texts of one kind share few words: among all the words they are hardly nearer than any other two, but in the
    directions in which whole groups differ they are (latent semantic analysis).
    """
    start = torch.Generator().manual_seed(0)  # of an iteration that ends at the same place from any other
    Q = torch.randn(X.shape[1], min(NUM_CONCEPTS, *X.shape), generator=start)
    for _ in range(8):
        Q = torch.linalg.qr(X.T @ (X @ Q)).Q
    return torch.nn.functional.normalize(X @ Q, dim=1)


def k_means_errors(X: Tensor, most: int) -> list[float]:
    """Returns the k-means error of `X` [S, C], the sum of squared distances, for k = 1 … `most` or S.

    Each k starts from the centres of k − 1 and the sample where one more centre lowers the error most (fast global
    k-means: Likas et al. 2003, "The global k-means clustering algorithm", section 3.1).
    """
    apart = squared_distances(X, X)
    centres, nearest = k_means(X, X.mean(dim=0, keepdim=True))
    errors = [float(nearest.sum())]
    for _ in range(min(most, len(X)) - 1):
        gain = (nearest - apart).clamp_min(0).sum(dim=1)
        centres, nearest = k_means(X, torch.cat([centres, X[gain.argmax()][None]]))
        errors.append(float(nearest.sum()))
    return errors


def k_means(X: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the `centres` [k, C] that k-means moves to, and each sample's squared distance from its own [S]."""
    labels = torch.full((len(X),), -1)
    for _ in range(MAX_ITERATIONS):
        nearest, found = squared_distances(X, centres).min(dim=1)
        if torch.equal(found, labels):
            break
        labels = found
        sizes = torch.bincount(labels, minlength=len(centres))
        sums = torch.zeros_like(centres).index_add_(0, labels, X)
        centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centres)
    return centres, nearest


def squared_distances(X: Tensor, Y: Tensor) -> Tensor:
    """Returns the squared distance of each row of `X` [S, C] from each of `Y` [k, C], as [S, k]."""
    lengths = X.square().sum(dim=1)[:, None] + Y.square().sum(dim=1)
    return torch.addmm(lengths, X, Y.T, alpha=-2).clamp_min(0)


def elbow(errors: Sequence[float]) -> int:
    """Returns the k ≥ 2 whose error lies deepest below the line from the first (k = 1) to the last; 2 if none does."""
    last = len(errors) - 1
    depths = [errors[0] + (errors[-1] - errors[0]) * i / last - error for i, error in enumerate(errors)] if last else []
    return max(range(2, len(errors)), key=lambda k: depths[k - 1], default=2)
