"""Loss, perplexity and accuracy, against the same over one sample at a time and all logits."""

import math

import numpy as np
import pytest
import torch

from peftcli.data.batching import Batcher
from peftcli.data.collation import collate
from peftcli.data.dataset import EncodedDataset, Sample
from peftcli.errors import NumericalError
from peftcli.evaluation.language import evaluate
from peftcli.training.loss import score_reference
from tests.conftest import Recorder
from tests.tolerances import LOSS

LENGTHS = (9, 3, 14, 6, 20, 5, 7)
CPU = torch.device("cpu")


@pytest.fixture
def samples():
    rng = np.random.default_rng(1)
    return [
        Sample(rng.integers(2, 120, length).astype(np.int32), (np.arange(length) > length // 3).astype(np.uint8))
        for length in LENGTHS
    ]


def batcher(samples, joins=True):
    return Batcher(EncodedDataset.of(samples), 1, 48, joins)


def by_hand(model, samples):
    """Returns the summed loss, the number of tokens and of those guessed right, one sample at a time."""
    summed, tokens, right = 0.0, 0, 0
    for one in samples:
        batch = collate([one], 1, "padded")
        with torch.no_grad():
            summed += score_reference(model, batch).item()
            choices = model(input_ids=batch.input_ids).logits[0, :-1].argmax(-1)
        wanted = batch.labels[0, 1:]
        tokens += int((wanted != -100).sum())
        right += int((choices == wanted).sum())
    return summed, tokens, right


def test_the_metrics_are_those_of_all_supervised_tokens(make_model, samples):
    model = make_model()
    with torch.no_grad():  # so that some tokens are guessed right, say, what comes next is what is there
        for one in samples[:3]:
            choice = int(
                model(input_ids=torch.tensor(one.input_ids[None, :-1].astype(np.int64))).logits[0, -1].argmax()
            )
            one.input_ids[-1] = choice
    summed, tokens, right = by_hand(model, samples)
    found = evaluate(model, batcher(samples), 3, CPU)
    assert right >= 3
    assert found == {
        "eval_loss": pytest.approx(summed / tokens, rel=LOSS),
        "eval_perplexity": pytest.approx(math.exp(summed / tokens), rel=10 * LOSS),
        "eval_token_accuracy": right / tokens,
        "eval_tokens": tokens,
    }


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 50])
def test_batches_change_no_metric(make_model, samples, batch_size, joins):
    model = make_model()
    expected = evaluate(model, batcher(samples, joins=False), 1, CPU)
    assert evaluate(model, batcher(samples, joins), batch_size, CPU) == pytest.approx(expected, rel=10 * LOSS)


def test_the_recipes_eval_batch_size_changes_no_metric(recipe_file, train):
    path, found = recipe_file(training={"max_steps": 2}), []
    for size, done in ((1, [1, 2, 3, 4, 5, 6, 7, 8]), (3, [3, 6, 8])):
        recorder = Recorder()
        overrides = (f"training.per_device_eval_batch_size={size}", f"output_dir=run-{size}")
        found.append(train(path, *overrides, reporter=recorder)["result"]["eval"])
        assert recorder.advanced == [(number, 8) for number in done]
    assert found[0] == pytest.approx(found[1], rel=10 * LOSS)


def test_dropout_is_off_and_no_gradient_is_kept(make_model, samples):
    model = make_model("gpt2").train()  # has dropout
    first = evaluate(model, batcher(samples), 2, CPU)
    assert not model.training
    assert evaluate(model.train(), batcher(samples), 2, CPU) == first
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_counts_samples(make_model, samples):
    seen = []
    evaluate(make_model(), batcher(samples), 3, CPU, lambda done, total: seen.append((done, total)))
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_a_hopeless_loss_is_still_a_number(make_model, samples):
    model = make_model()
    model.lm_head.weight.data *= 1e6
    found = evaluate(model, batcher(samples), 3, CPU)
    assert found["eval_loss"] > 1000
    assert math.isfinite(found["eval_perplexity"])


def test_a_loss_that_is_none_is_refused(make_model, samples):
    model = make_model()
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NumericalError, match="the evaluation loss is nan"):
        evaluate(model, batcher(samples), 3, CPU)
