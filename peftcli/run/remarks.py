"""What a run finds out about its model, and says, before its first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from peftcli import inject, models
from peftcli.training import checks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcli.data import PreparedData
    from peftcli.recipe import TrainingSection
    from peftcli.reporting import Reporter
    from peftcli.run.opening import Base
    from peftcli.training.distributed import Processes
    from peftcli.training.head import Finish


def note_fresh(fresh: list[str], reporter: Reporter) -> None:
    """Says which parameters the checkpoint lacks."""
    if fresh:
        reporter.note(
            f"the checkpoint has none of {', '.join(fresh)}: they start from random numbers and train in full"
        )


def note_data(prepared: PreparedData, base: Base, reporter: Reporter) -> None:
    """Says what was found in the data, and of the base's files."""
    for remark in base.remarks:
        reporter.note(remark)
    for remark in prepared.remarks:
        reporter.note(remark)
    for line in prepared.train_report.lines():
        reporter.note(f"train: {line}")
    for line in prepared.eval_report.lines() if prepared.eval_report else ():
        reporter.note(f"eval: {line}")


def finish_of(task: str, model: PreTrainedModel, reporter: Reporter) -> Finish | None:
    """Returns what a language model does to its head's logits, having tried it; None where that is nothing known."""
    if task not in models.LANGUAGE_TASKS:
        return None
    found = checks.finish_of(model)
    if found is None:
        reporter.note(
            f"the loss takes the logits of all supervised tokens at once: what {model.config.model_type} does to them "
            "after its head is not known"
        )
    return found


def note_sizes(
    model: PreTrainedModel, counts: dict[str, int | float], device: torch.device, precision: str, reporter: Reporter
) -> None:
    """Says how much of the model trains, and in which numbers."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    reporter.note(
        f"{counts['trainable_params']:,} of {counts['total_params']:,} parameters train "
        f"({counts['trainable_percent']:.3f} %) in {len(inject.adapters(model))} modules; "
        f"base in {dtype} on {device}, mixed precision {precision}"
    )


def note_processes(group: Processes, settings: TrainingSection, unit: str, reporter: Reporter) -> None:
    """Says how many processes take part, where it is not one; `unit` is what batches are made of."""
    if group.count == 1:
        return
    threads = f", {torch.get_num_threads()} CPU threads each" if group.device.type == "cpu" else ""
    samples = settings.micro_batch_size * settings.gradient_accumulation_steps * group.count
    reporter.note(f"{group.count} processes over {group.backend}{threads}: {samples} {unit} a step")
