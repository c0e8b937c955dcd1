"""The learning rate, against transformers' schedulers."""

from itertools import pairwise

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from peftcli.recipe import TrainingSection
from peftcli.training.schedule import learning_rate_schedule, total_steps
from tests.tolerances import EXACT

THEIRS = {
    "cosine": get_cosine_schedule_with_warmup,
    "linear": get_linear_schedule_with_warmup,
    "constant": lambda optimizer, warmup, _: get_constant_schedule_with_warmup(optimizer, warmup),
}


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (7, 0), (7, 3), (40, 12), (100, 100), (100, 130)])
def test_equals_transformers(kind, total, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    scheduler = THEIRS[kind](optimizer, warmup, total)
    factor = learning_rate_schedule(TrainingSection(lr_scheduler_type=kind, warmup_steps=warmup), total)
    for step in range(total):
        assert factor(step) == pytest.approx(scheduler.get_last_lr()[0], abs=EXACT[torch.float64]), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(("ratio", "total", "rises_for"), [(0.0, 100, 0), (0.03, 100, 3), (0.03, 101, 4), (0.5, 3, 2)])
def test_a_share_of_the_steps_rounds_up_as_the_trainer_does(ratio, total, rises_for):
    factor = learning_rate_schedule(TrainingSection(warmup_ratio=ratio), total)
    factors = [factor(step) for step in range(total)]
    assert factors.index(1.0) == rises_for
    assert all(early < late for early, late in pairwise(factors[: rises_for + 1]))


def test_steps_given_go_before_the_share():
    factor = learning_rate_schedule(TrainingSection(warmup_steps=0, warmup_ratio=0.5), 10)
    assert factor(0) == 1.0


@pytest.mark.parametrize(
    ("settings", "steps_per_epoch", "expected"),
    [
        ({"max_steps": 5}, 100, 5),
        ({"max_steps": 5}, 2, 5),
        ({"num_train_epochs": 3.0}, 7, 21),
        ({"num_train_epochs": 0.5}, 7, 4),
        ({"num_train_epochs": 1.25}, 8, 10),
        ({"num_train_epochs": 0.001}, 7, 1),
    ],
)
def test_total_steps(settings, steps_per_epoch, expected):
    assert total_steps(TrainingSection(**settings), steps_per_epoch) == expected
