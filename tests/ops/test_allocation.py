import pytest
import torch

from peftcli.ops.allocation import (
    cubic_budget,
    distance_from_orthogonal,
    score_to_beat,
    smooth_,
    smoothed_reference,
    triplet_scores,
    with_gaps,
)
from tests.methods.building import assert_close
from tests.tolerances import EXACT

FP64 = EXACT[torch.float64]


def test_the_budget_at_and_between_its_boundaries():
    def budget(step):
        return cubic_budget(step, warmup=10, end=50, initial=120, target=80)

    assert [budget(step) for step in (0, 1, 10)] == [120, 120, 120]
    assert [budget(step) for step in (50, 51, 1000)] == [80, 80, 80]
    assert budget(20) == int(80 + 40 * (3 / 4) ** 3)  # a quarter of the way
    assert budget(30) == 80 + 40 / 8  # half of it
    falling = [budget(step) for step in range(60)]
    assert falling == sorted(falling, reverse=True)
    assert budget(11) < 120  # the fall begins with the first step after the warm-up


def test_the_budget_is_rounded_down():
    assert cubic_budget(1, warmup=0, end=2, initial=15, target=8) == 8  # 8.875
    assert cubic_budget(1, warmup=0, end=2, initial=16, target=8) == 9


def test_the_averages_are_the_papers():
    shapes, beta1, beta2 = (3, 5), 0.85, 0.7
    mean, deviation = torch.zeros(shapes, dtype=torch.float64), torch.zeros(shapes, dtype=torch.float64)
    expected = mean.clone(), deviation.clone()
    for _ in range(4):
        sensitivity = torch.rand(shapes, dtype=torch.float64)
        kept = sensitivity.clone()
        smooth_(mean, deviation, sensitivity, beta1, beta2)
        expected = smoothed_reference(*expected, sensitivity, beta1, beta2)
        assert torch.equal(sensitivity, kept)
    assert_close(mean, expected[0], FP64)
    assert_close(deviation, expected[1], FP64)


def test_a_triplet_scored_by_hand():
    """E's own score, the mean of its row of A, and the mean of its column of B."""
    A = torch.tensor([[1.0, 3.0, 5.0], [0.0, 0.0, 6.0]])
    E = torch.tensor([10.0, 0.5])
    B = torch.tensor([[2.0, 0.0], [4.0, 1.0]])
    assert triplet_scores(A, E, B).tolist() == [10 + 3 + 3, 0.5 + 2 + 0.5]


def test_as_many_beat_the_score_as_there_is_budget_for():
    scores = [torch.tensor([5.0, 1.0, 4.0]), torch.tensor([2.0, 3.0, 6.0])]
    for budget in range(6):
        threshold = score_to_beat(scores, budget)
        assert sum(int((own > threshold).sum()) for own in scores) == budget
    assert score_to_beat(scores, 2) == 4
    assert score_to_beat(scores, 6) is None  # nothing has to go
    assert score_to_beat(scores, 7) is None


def test_ties_with_the_worst_go_with_it():
    assert score_to_beat([torch.tensor([1.0, 1.0, 1.0, 2.0])], 3) == 1


@pytest.mark.parametrize("rows", [2, 5])
def test_the_distance_from_orthogonal(rows):
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q[:rows]
    assert distance_from_orthogonal(Q) <= FP64 * 6
    assert_close(distance_from_orthogonal(2 * Q), torch.tensor(3 * rows**0.5, dtype=torch.float64), FP64)
    R = torch.randn(rows, 7, dtype=torch.float64)
    expected = sum(((R[i] @ R[j]) - float(i == j)) ** 2 for i in range(rows) for j in range(rows)) ** 0.5
    assert_close(distance_from_orthogonal(R), expected, FP64)


def test_at_orthogonal_rows_the_distance_has_a_finite_gradient():
    R = torch.eye(2, 4, requires_grad=True)
    distance_from_orthogonal(R).backward()
    assert not R.grad.any()


@pytest.mark.parametrize("dim", [0, 1])
def test_gaps_are_zeros_between_what_was_kept(dim):
    kept = torch.tensor([False, True, True, False, True])
    whole = torch.randn(5, 2) if dim == 0 else torch.randn(2, 5)
    found = with_gaps(whole[kept] if dim == 0 else whole[:, kept], kept, dim)
    assert torch.equal(found, whole * (kept[:, None] if dim == 0 else kept))
    none = with_gaps(whole.narrow(dim, 0, 0), torch.zeros(5, dtype=torch.bool), dim)
    assert torch.equal(none, torch.zeros_like(whole))
