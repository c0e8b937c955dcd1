"""Each task's objective against the loss that transformers computes for the same batch."""

import numpy as np
import pytest
import torch

from peftcli.data.collation import collate
from peftcli.data.dataset import IGNORED, Sample
from peftcli.data.images import ImageBatch
from peftcli.training.objectives import objective
from tests.families import tiny_model
from tests.tolerances import LOSS

LENGTHS = (7, 3, 5)
HEADS = {"bert": "Bert", "roberta": "Roberta", "llama": "Llama"}


def samples(targets):
    rng = np.random.default_rng(0)
    return [
        Sample(rng.integers(4, 50, length).astype(np.int32), np.zeros(length, np.uint8), target)
        for length, target in zip(LENGTHS, targets, strict=True)
    ]


def agree(model, batch, ours):
    """Checks value and gradient: our sum is the model's own mean times what it is a mean over."""
    given = {name: tensor for name, tensor in batch.model_inputs().items() if tensor is not None}
    summed = ours(model, batch)
    theirs = model(**given, labels=batch.labels).loss * batch.num_supervised
    assert summed.dtype == torch.float32
    assert summed.item() == pytest.approx(theirs.item(), rel=LOSS)
    parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    mine, its = (torch.autograd.grad(loss, parameter)[0] for loss in (summed, theirs))
    torch.testing.assert_close(mine, its, rtol=LOSS, atol=LOSS * float(its.abs().max()))
    assert its.abs().max() > 0


TARGETS = {
    "single-label": [np.array([i], np.int32) for i in (2, 0, 1)],
    "multi-label": [np.array(row, np.float32) for row in ([1, 0, 1], [0, 0, 0], [0, 1, 0])],
    "regression": [np.array(row, np.float32) for row in ([0.5, -1, 2], [3, 0, 1], [0, 0.25, 0])],
}
PROBLEMS = {
    "single-label": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("kind", TARGETS)
def test_sequence_classification(family, kind):
    changes = {"pad_token_id": 0} if family == "llama" else {}
    name = f"{HEADS[family]}ForSequenceClassification"
    model = tiny_model(family, name, num_labels=3, problem_type=PROBLEMS[kind], **changes)
    batch = collate(samples(TARGETS[kind]), 0, "padded", "sample")
    assert batch.num_supervised == 3
    agree(model, batch, objective("sequence-classification", kind))


def test_regression_of_one_number():
    model = tiny_model("bert", "BertForSequenceClassification", num_labels=1, problem_type="regression")
    batch = collate(samples([np.array([x], np.float32) for x in (0.5, -2, 1)]), 0, "padded", "sample")
    agree(model, batch, objective("sequence-classification", "regression"))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_token_classification(family):
    model = tiny_model(family, f"{HEADS[family]}ForTokenClassification", num_labels=3)
    targets = [np.array([IGNORED, *([i % 3, IGNORED][:2] * 4)][:n], np.int32) for i, n in enumerate(LENGTHS)]
    batch = collate(samples(targets), 0, "padded", "token")
    assert batch.num_supervised == sum(int((target >= 0).sum()) for target in targets) > 0
    agree(model, batch, objective("token-classification"))


@pytest.mark.parametrize("tied", [True, False])
def test_answers(tied):
    model = tiny_model("t5", "T5ForConditionalGeneration", tie_word_embeddings=tied)
    batch = collate(
        samples([np.array(ids, np.int32) for ids in ([9, 8, 2], [7, 2], [5, 6, 7, 8, 2])]), 0, "padded", "answer"
    )
    assert batch.labels.tolist() == [[9, 8, 2, -100, -100], [7, 2, -100, -100, -100], [5, 6, 7, 8, 2]]
    assert (batch.num_supervised, batch.num_tokens) == (10, sum(LENGTHS) + 10)
    agree(model, batch, objective("seq2seq-lm"))


def test_images():
    model = tiny_model("vit", "ViTForImageClassification", num_labels=3)
    batch = ImageBatch(torch.randn(3, 3, 16, 16), torch.tensor([2, 0, 1]), torch.zeros(3), 3, 3)
    agree(model, batch, objective("image-classification"))


@pytest.mark.parametrize("kind", TARGETS)
def test_a_batch_without_samples_costs_nothing_but_has_a_gradient(kind):
    model = tiny_model("bert", "BertForSequenceClassification", num_labels=3)
    batch = collate([], 0, "padded", "sample")
    summed = objective("sequence-classification", kind)(model, batch)
    summed.backward()
    assert (summed.item(), batch.num_supervised) == (0, 0)
    assert all(float(one.grad.abs().max()) == 0 for one in model.parameters() if one.grad is not None)
