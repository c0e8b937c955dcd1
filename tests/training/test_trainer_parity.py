"""The loop against an independent one: transformers' Trainer over PEFT's model, step by step."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import SequentialSampler

from peftcli import inject, methods, models, recipe
from peftcli.data.collation import IGNORED
from peftcli.data.sampling import StepPlan
from peftcli.run.opening import encode_data, open_base, read_data
from tests.conftest import Recorder
from tests.tolerances import LOSS_CURVE

# PEFT asks transformers for a property by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STEPS, BATCH, ACCUMULATION, SEED = 14, 4, 2, 3
RATE, WARMUP_RATIO, CLIP = 0.02, 0.2, 0.5


def _rows_in_order(samples):
    """Returns the samples as the Trainer takes them, in the order in which our steps use them."""
    plan = StepPlan(len(samples), BATCH, ACCUMULATION, SEED)
    order = [index for step in range(STEPS) for micro in plan.step(step) for index in micro]
    chosen = [samples[index] for index in order]
    labels = [np.where(one.supervised, one.input_ids, IGNORED).tolist() for one in chosen]
    return [{"input_ids": one.input_ids.tolist(), "labels": own} for one, own in zip(chosen, labels, strict=True)]


def _padded(rows):
    longest = max(len(row["input_ids"]) for row in rows)

    def fill(values, value):
        return values + [value] * (longest - len(values))

    return {
        "input_ids": torch.tensor([fill(row["input_ids"], 1) for row in rows]),
        "labels": torch.tensor([fill(row["labels"], IGNORED) for row in rows]),
        "attention_mask": torch.tensor([fill([1] * len(row["input_ids"]), 0) for row in rows]),
    }


def _peft_model(base, loaded):
    """Returns PEFT's model of the same method, started from our adapters' tensors."""
    from peft import LoraConfig, get_peft_model

    method, fields = methods.load(loaded.recipe.method["type"]), loaded.recipe.method
    config = method.Config.model_validate(dict(fields))
    ours, _ = models.load_model(base.section, base.source, base.config, torch.device("cpu"))
    inject.graft(ours, method, config, SEED)
    start = {
        f"base_model.model.{path}.{name}": tensor.detach().clone()
        for path, adapter in inject.adapters(ours).items()
        for name, tensor in adapter.peft_tensors().items()
    }
    inject.ungraft(ours)
    theirs = get_peft_model(
        ours,
        LoraConfig(
            r=fields["r"],
            lora_alpha=fields["alpha"],
            target_modules="all-linear",
            use_dora=fields["type"] == "dora",
            task_type="CAUSAL_LM",
        ),
    )
    copied = set()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            key = name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            if key in start:
                assert parameter.requires_grad
                parameter.copy_(start[key])
                copied.add(key)
    assert copied == set(start)
    return theirs


def _trainer_losses(model, rows, folder, weight_decay):
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(STEPS * WARMUP_RATIO),
        weight_decay=weight_decay,
        max_grad_norm=CLIP,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=SEED,
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=rows, data_collator=_padded)
    trainer.train()
    return [(entry["loss"], entry["grad_norm"], entry["learning_rate"]) for entry in trainer.state.log_history[:-1]]


@pytest.mark.parametrize(
    ("method", "weight_decay", "padding_free"),
    [("lora", 0.1, True), ("dora", 0.0, False)],  # the Trainer would decay DoRA's magnitudes, which we do not
)
def test_every_step_as_the_trainer_does_it(recipe_file, train, tmp_path, method, weight_decay, padding_free):
    path = recipe_file(
        data={"padding_free": padding_free},
        method={"type": method, "r": 4, "alpha": 8.0},
        training={
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "learning_rate": RATE,
            "warmup_ratio": WARMUP_RATIO,
            "weight_decay": weight_decay,
            "max_grad_norm": CLIP,
            "seed": SEED,
        },
    )
    recorder = Recorder()
    train(path, reporter=recorder)
    ours = [(m["loss"], m["grad_norm"], m["learning_rate"]) for _, m in recorder.logged if "loss" in m]

    loaded = recipe.load(path)
    base = open_base(loaded.recipe.model)
    rows = _rows_in_order(encode_data(loaded.recipe, read_data(loaded.recipe), base).train)
    theirs = _trainer_losses(_peft_model(base, loaded), rows, tmp_path / "theirs", weight_decay)

    assert len(ours) == len(theirs) == STEPS
    assert ours[-1][0] < ours[0][0] - 100 * LOSS_CURVE  # it learns: there is a curve to compare
    assert max(norm for _, norm, _ in ours) > CLIP  # and is clipped
    for mine, its in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(its, abs=LOSS_CURVE, rel=LOSS_CURVE)
