"""What is learned does not depend on how a step's samples are cut up and laid out."""

import pytest
import torch

from peftcli.training import optimizers
from tests.tolerances import EXACT, SAME_STEPS

LENGTHS = (9, 3, 14, 6, 20, 5, 7, 4) * 2  # so the micro-batches have different numbers of supervised tokens
STEPS = 6


def trained(make_trainer, tensors, method, size, accumulation, **options):
    trainer = make_trainer(
        method=method,
        lengths=LENGTHS,
        max_steps=STEPS,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        **options,
    )
    trainer.run()
    return tensors(trainer.task.model), trainer.task.reporter.losses


def assert_same(ours, theirs):
    for name, expected in theirs[0].items():
        torch.testing.assert_close(ours[0][name], expected, rtol=0, atol=SAME_STEPS)
    assert ours[1] == pytest.approx(theirs[1], rel=EXACT[torch.float32])


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_accumulation_equals_one_batch(make_trainer, tensors, method):
    whole = trained(make_trainer, tensors, method, 8, 1)
    assert_same(trained(make_trainer, tensors, method, 1, 8), whole)
    assert_same(trained(make_trainer, tensors, method, 4, 2), whole)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_padding_free_equals_padded(make_trainer, tensors, method):
    padded = trained(make_trainer, tensors, method, 4, 2, joins=False)
    assert_same(trained(make_trainer, tensors, method, 4, 2, joins=True), padded)


def test_everything_that_was_compared_has_been_trained(make_trainer, tensors):
    trainer = make_trainer(max_steps=STEPS, lengths=LENGTHS, per_device_train_batch_size=8)
    before = tensors(trainer.task.model)
    trainer.run()
    after = tensors(trainer.task.model)
    assert len(optimizers.trainable_parameters(trainer.task.model)) == len(before)
    assert all((after[name] - before[name]).abs().max() > 1e-3 for name in before)
