import pytest
import torch

from peftcli.evaluation.ensemble import majority_answer, majority_vote, mean_log_probability


def log_odds(*rows):
    """Returns logits [N, 1, C] whose softmax are the given probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()[:, None]


def test_the_mean_is_that_of_the_logarithms():
    logits = torch.randn(3, 4, 5, dtype=torch.float64)
    expected = sum(torch.log_softmax(one, -1) for one in logits) / 3
    assert torch.allclose(mean_log_probability(logits), expected, rtol=1e-12)
    assert torch.equal(mean_log_probability(logits[:1]), torch.log_softmax(logits[0], -1))
    assert mean_log_probability(logits.bfloat16()).dtype == torch.float32
    shifted = logits + torch.randn(3, 4, 1, dtype=torch.float64)
    assert torch.allclose(mean_log_probability(shifted), mean_log_probability(logits))


def test_most_votes_win_over_one_sure_prompt():
    logits = log_odds([0.4, 0.35, 0.25], [0.4, 0.35, 0.25], [0.01, 0.98, 0.01])
    assert mean_log_probability(logits).argmax() == 1
    assert majority_vote(logits).tolist() == [0]


def test_a_tie_goes_to_the_higher_mean_score():
    logits = log_odds([0.6, 0.3, 0.1], [0.2, 0.7, 0.1])
    assert majority_vote(logits).tolist() == [1]
    assert majority_vote(logits.flip(0)).tolist() == [1], "not to the first prompt"
    assert majority_vote(logits.flip(-1)).tolist() == [1], "not to the lowest choice"
    assert majority_vote(log_odds([0.7, 0.2, 0.1], [0.3, 0.6, 0.1])).tolist() == [0]


def test_a_choice_without_most_votes_cannot_win_a_tie_of_others():
    logits = log_odds([0.48, 0.04, 0.48 - 1e-9], [0.04, 0.48, 0.48 - 1e-9])
    assert mean_log_probability(logits).argmax() == 2
    assert majority_vote(logits).item() in (0, 1)


def test_each_sample_is_voted_on_by_itself():
    logits = torch.randn(5, 7, 3)
    together = majority_vote(logits)
    assert together.tolist() == [majority_vote(logits[:, i : i + 1]).item() for i in range(7)]
    assert torch.equal(majority_vote(logits[:1]), logits[0].argmax(-1))


def test_texts_are_voted_on_in_the_same_way():
    assert majority_answer(["a", "b", "a"], [-9.0, -0.1, -9.0]) == "a"
    assert majority_answer(["a", "b"], [-2.0, -1.0]) == "b"
    assert majority_answer(["a", "b", "b", "a"], [-1.0, -2.0, -1.5, -3.0]) == "b"
    assert majority_answer(["only"], [-5.0]) == "only"
    with pytest.raises(ValueError, match="zip"):
        majority_answer(["a", "b"], [-1.0])
