"""A training task on a tiny model without the files of a run: for what the loop itself does."""

import numpy as np
import pytest
import torch

from peftcli import inject, methods
from peftcli.checkpoint import adapter as adapter_files
from peftcli.checkpoint.adapter import Origin
from peftcli.data.batching import Batcher
from peftcli.data.dataset import EncodedDataset, Sample
from peftcli.data.sampling import StepPlan
from peftcli.recipe import TrainingSection
from tests.conftest import Recorder


def dataset(lengths):
    """Returns samples of these lengths, of which the last half of the tokens is supervised."""
    rng = np.random.default_rng(0)
    return EncodedDataset.of(
        [
            Sample(rng.integers(2, 120, length).astype(np.int32), (np.arange(length) >= length // 2).astype(np.uint8))
            for length in lengths
        ]
    )


@pytest.fixture
def make_trainer(make_model, tmp_path):
    """Makes a Trainer: `make_trainer(max_steps=3)`; its task, reporter and all are attributes of it.

    `eval_losses` are what its evaluations find, one after the other; without them there is no evaluation.
    """

    def make(
        eval_losses=None,
        method="lora",
        lengths=(9, 3, 14, 6, 11, 5, 7, 4),
        joins=True,
        model=None,
        fields=None,
        accelerator=None,
        **settings,
    ):
        from accelerate import Accelerator

        from peftcli.training.checks import finish_of
        from peftcli.training.distributed import alone
        from peftcli.training.logs import MetricsLog
        from peftcli.training.loop import Task, Trainer
        from peftcli.training.objectives import objective

        kind = methods.load(method)
        config = kind.Config.model_validate({"r": 4, **(fields or {})})
        settings = TrainingSection(
            **{"per_device_train_batch_size": 2, "learning_rate": 0.01, "logging_steps": 1, **settings}
        )
        model = make_model() if model is None else model
        finish = finish_of(model)
        inject.graft(model, kind, config, settings.seed)
        samples = dataset(lengths)
        size, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
        found = None if eval_losses is None else iter(eval_losses)

        def evaluate():
            return {"eval_loss": next(found), "eval_tokens": 1}

        task = Task(
            run=tmp_path,
            model=model,
            origin=Origin(kind, config, "tiny", None, "causal-lm"),
            settings=settings,
            learning_rate=settings.learning_rate,
            head_learning_rate=settings.learning_rate,
            objective=objective("causal-lm", finish=finish),
            plan=StepPlan(len(samples), size, accumulation, settings.seed),
            batcher=Batcher(samples, 1, 48, joins, joins),
            evaluate=None if found is None else evaluate,
            reporter=Recorder(),
            logs=[MetricsLog(tmp_path, 0)],
        )
        return Trainer(task, accelerator or Accelerator(cpu=True), alone(torch.device("cpu")))

    return make


@pytest.fixture
def tensors():
    """Returns a copy of a model's adapters' tensors."""

    def copies(model):
        return {name: tensor.detach().clone() for name, tensor in adapter_files.adapter_tensors(model).items()}

    return copies
