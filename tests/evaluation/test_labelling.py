"""Figures over a whole dataset, against their definitions written out, whatever the batches."""

import numpy as np
import pytest
import torch

from peftcli.data.batching import Batcher
from peftcli.data.dataset import IGNORED, EncodedDataset, Sample
from peftcli.evaluation.labelling import Confusion, Hits, Numbers, pearson, ranks
from peftcli.evaluation.tasks import evaluator
from tests.families import tiny_model
from tests.tolerances import EXACT, LOSS

ROUNDING = EXACT[torch.float64]


def one_hot(chosen, size):
    return torch.nn.functional.one_hot(torch.tensor(chosen), size).float()


def test_accuracy_and_macro_f1():
    true, chosen = [0, 0, 1, 1, 1, IGNORED], [0, 1, 1, 1, 0, 2]
    tally = Confusion()
    tally.add(one_hot(chosen[:2], 4), torch.tensor(true[:2]))
    tally.add(one_hot(chosen[2:], 4), torch.tensor(true[2:]))
    # Label 0: 1 hit of 2 true and 2 given. Label 1: 2 hits of 3 and 3. Labels 2 and 3 are neither true nor given.
    assert tally.metrics() == pytest.approx({"accuracy": 3 / 5, "macro_f1": (1 / 2 + 2 / 3) / 2}, rel=ROUNDING)


def test_a_label_that_is_only_given_counts_as_wrong():
    tally = Confusion()
    tally.add(one_hot([0, 2], 3), torch.tensor([0, 0]))
    assert tally.metrics() == pytest.approx({"accuracy": 1 / 2, "macro_f1": (2 / 3 + 0) / 2}, rel=ROUNDING)


def test_several_labels():
    tally = Hits()
    tally.add(torch.tensor([[1.0, -1, 2], [3, 1, -1]]), torch.tensor([[1.0, 0, 0], [1, 1, 0]]))
    tally.add(torch.tensor([[-1.0, -1, -1]]), torch.tensor([[0.0, 1, 0]]))
    # Hits 2, 1, 0; given 2, 1, 1; true 2, 2, 0.
    expected = {"micro_f1": 2 * 3 / (4 + 4), "macro_f1": (1 + 2 / 3 + 0) / 3}
    assert tally.metrics() == pytest.approx(expected, rel=ROUNDING)


def test_numbers():
    given, true = torch.tensor([[1.0], [2], [3], [10]]), torch.tensor([[1.0], [3], [2], [4]])
    tally = Numbers()
    tally.add(given[:3], true[:3])
    tally.add(given[3:], true[3:])
    found = tally.metrics()
    assert found["mse"] == pytest.approx((0 + 1 + 1 + 36) / 4, rel=ROUNDING)
    assert found["pearson"] == pytest.approx(float(np.corrcoef(given[:, 0], true[:, 0])[0, 1]), rel=ROUNDING)
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15), rel=ROUNDING)  # no ties: 1 - 6 Σd² / n(n² - 1)


def test_constant_numbers_have_no_correlation():
    tally = Numbers()
    tally.add(torch.ones(3, 1), torch.tensor([[1.0], [2], [3]]))
    assert tally.metrics().keys() == {"mse"}


def test_equal_values_share_a_rank():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0, 2.5, 1]
    assert pearson(np.array([0.0, 1.0]), np.array([5.0, 3.0])) == pytest.approx(-1, rel=ROUNDING)


def dataset(goal, targets):
    rng = np.random.default_rng(0)
    lengths = [3 + 5 * i % 11 for i in range(len(targets))]
    return EncodedDataset.of(
        [
            Sample(
                rng.integers(4, 50, n).astype(np.int32), np.zeros(n, np.uint8), target(n) if goal == "token" else target
            )
            for n, target in zip(lengths, targets, strict=True)
        ],
        goal,
    )


def words(i):
    return lambda n: np.array([IGNORED, *(j * i % 3 for j in range(n - 1))], np.int32)


CASES = {
    "single-label": ("sequence-classification", "sample", lambda i: np.array([i % 3], np.int32)),
    "multi-label": ("sequence-classification", "sample", lambda i: np.array([i & 1, i & 2, 1], np.float32) > 0),
    "regression": ("sequence-classification", "sample", lambda i: np.array([i, -i, i * i], np.float32)),
    "words": ("token-classification", "token", words),
    "answers": ("seq2seq-lm", "answer", lambda i: np.arange(4, 6 + i % 4, dtype=np.int32)),
}


@pytest.mark.parametrize("case", CASES)
def test_batches_do_not_matter(case):
    task, goal, target = CASES[case]
    kind = case if task == "sequence-classification" else "single-label"
    names = {
        "sequence-classification": "BertForSequenceClassification",
        "token-classification": "BertForTokenClassification",
    }
    model = (
        tiny_model("t5", "T5ForConditionalGeneration")
        if goal == "answer"
        else tiny_model("bert", names[task], num_labels=3)
    )
    rows = [target(i) for i in range(10)]
    rows = [row.astype(np.float32) for row in rows] if case == "multi-label" else rows
    batcher = Batcher(dataset(goal, rows), 0, 32, joins=False)
    seen = []
    measure = evaluator(task, kind)
    found = [measure(model, batcher, size, torch.device("cpu"), lambda *at: seen.append(at)) for size in (1, 4, 10)]
    assert seen[-1] == (10, 10)
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=10 * LOSS)
    assert next(iter(found[0])) == "eval_loss"
    assert found[0]["eval_tokens" if goal != "sample" else "eval_samples"] == sum(
        {"sample": 1, "token": max(0, n - 1), "answer": 0 if goal != "answer" else len(row)}[goal]
        for n, row in zip(batcher.dataset.lengths.tolist(), rows, strict=True)
    )
