import random

import pytest
import torch

from peftcli.ops import clustering
from tests.methods.building import assert_close
from tests.tolerances import EXACT


def topics(count, size=40, noise=0, seed=0):
    """Returns samples of `count` kinds: 20 words of the kind's 50, 20 of everyone's, `noise` rare ones, a template."""
    source = random.Random(seed)
    samples = [
        [1, 2, 3]
        + [100 + 50 * kind + source.randrange(50) for _ in range(20)]
        + [10 + source.randrange(30) for _ in range(20)]
        + [source.randrange(2000, 9000) for _ in range(noise)]
        + [4]
        for kind in range(count)
        for _ in range(size)
    ]
    source.shuffle(samples)
    return samples


@pytest.mark.parametrize("noise", [0, 20])
@pytest.mark.parametrize("count", range(2, 11))
def test_as_many_clusters_as_there_are_kinds(count, noise):
    assert clustering.num_clusters(topics(count, noise=noise), 10) == count


def test_kinds_of_different_sizes():
    large, small = topics(1, size=200), [[token + 5000 for token in sample] for sample in topics(3, size=30)]
    assert clustering.num_clusters(large + small, 10) == 4


def test_never_more_than_the_most():
    assert clustering.num_clusters(topics(9), 4) in range(2, 5)


def test_the_order_of_samples_and_the_random_state_do_not_matter():
    samples = topics(5, noise=10)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = clustering.k_means_errors(clustering.concepts(clustering.tf_idf(samples)), 11)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert clustering.k_means_errors(clustering.concepts(clustering.tf_idf(samples)), 11) == first
    assert clustering.num_clusters(samples[::-1], 10) == 5


@pytest.mark.parametrize(
    "samples", [[], [[]], [[1, 2]], [[1], [1], [1]], [[], [], [1]], [[1, 2], [3], [4, 5]]], ids=str
)
def test_data_without_structure_gives_two(samples):
    assert clustering.num_clusters(samples, 10) == 2


def test_tf_idf_is_its_formula():
    samples = [[7, 3, 3, 3], [7, 3, 5], [7, 5], [7, 9, 9]]
    weight = {3: torch.tensor(2.0).log(), 5: torch.tensor(2.0).log(), 9: torch.tensor(4.0).log()}
    often = {1: 1.0, 2: 1 + float(torch.tensor(2.0).log()), 3: 1 + float(torch.tensor(3.0).log())}
    expected = torch.tensor(
        [[often[sample.count(t)] * weight[t] if t in sample else 0 for t in weight] for sample in samples]
    )
    expected /= expected.norm(dim=1, keepdim=True)
    X = clustering.tf_idf(samples)  # its features come in another order, and 7 is in all samples
    assert_close(X @ X.T, expected @ expected.T, EXACT[torch.float32])


def test_only_the_weightiest_tokens_are_features(monkeypatch):
    monkeypatch.setattr(clustering, "NUM_FEATURES", 2)
    X = clustering.tf_idf([[1, 2], [1, 2], [1, 3, 4], [1, 3]])
    assert X.shape == (4, 2)
    assert torch.equal(X, torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]))


def test_concepts_keep_the_angles_of_what_lies_in_few_directions():
    X = torch.randn(30, 5) @ torch.randn(5, 200)
    Z, unit = clustering.concepts(X), torch.nn.functional.normalize(X, dim=1)
    assert Z.shape == (30, clustering.NUM_CONCEPTS)
    assert_close(Z @ Z.T, unit @ unit.T, EXACT[torch.float32])


def test_concepts_are_the_strongest_directions():
    X = torch.randn(60, 40) @ torch.diag(0.8 ** torch.arange(40.0))
    V = torch.linalg.svd(X).Vh[: clustering.NUM_CONCEPTS]
    unit = torch.nn.functional.normalize(X @ V.T, dim=1)
    Z = clustering.concepts(X)
    assert float((Z @ Z.T - unit @ unit.T).abs().mean()) < 0.02


def test_k_means_ends_at_the_means_of_its_clusters():
    X, start = torch.randn(50, 3), torch.randn(4, 3)
    centres, nearest = clustering.k_means(X, start)
    labels = clustering.squared_distances(X, centres).argmin(dim=1)
    for k in labels.unique():
        assert_close(centres[k], X[labels == k].mean(dim=0), EXACT[torch.float32])
    assert_close(nearest, (X - centres[labels]).square().sum(dim=1), EXACT[torch.float32])


def test_a_centre_that_no_sample_is_near_stays():
    far = torch.tensor([[9.0, 9.0]])
    centres, nearest = clustering.k_means(torch.randn(20, 2), torch.cat([torch.zeros(1, 2), far]))
    assert torch.equal(centres[1:], far)
    assert torch.isfinite(nearest).all()


def test_the_error_falls_with_every_centre_to_nothing():
    X = torch.randn(12, 4)
    errors = clustering.k_means_errors(X, 20)
    assert len(errors) == 12
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(float((X - X.mean(0)).square().sum()))
    assert errors[-1] <= 12 * EXACT[torch.float32]


@pytest.mark.parametrize(
    ("errors", "k"),
    [
        ([9, 5, 1, 0.5, 0.2, 0], 3),
        ([9, 1, 0.5, 0.2, 0], 2),
        ([9, 8, 7, 6, 0.1, 0], 5),
        ([4, 3, 2, 1, 0], 2),  # a straight line has no elbow
        ([0, 0, 0], 2),
        ([3, 1], 2),
        ([3], 2),
    ],
    ids=str,
)
def test_the_elbow_is_where_the_error_lies_deepest_below_the_line(errors, k):
    assert clustering.elbow(errors) == k
