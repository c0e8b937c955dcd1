"""How a recipe's samples become batches: which each step takes, and whether they may be joined."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from peftcli import attention
from peftcli.data.dataset import EncodedDataset
from peftcli.data.packing import PackPlan, Packs
from peftcli.data.sampling import StepPlan
from peftcli.errors import ModelError, RecipeError
from peftcli.training import checks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcli.data import Dataset, PreparedData
    from peftcli.data.sampling import Plan
    from peftcli.methods._protocol import Method, MethodConfig
    from peftcli.recipe import LoadedRecipe, Recipe
    from peftcli.reporting import Reporter


@dataclass(frozen=True)
class Joins:
    """Whether samples may be laid end to end.

    Attributes:
        allowed: Whether they may.
        free: Whether the model's attention then computes each sample for itself, so that joining costs nothing.
        why_not: What keeps them from being joined, or from being joined at no cost; None where nothing does.
    """

    allowed: bool
    free: bool = False
    why_not: str | None = None


def step_plan(wanted: Recipe, samples: Dataset, num_virtual: int, rank: int = 0, world_size: int = 1) -> Plan:
    """Returns which samples each step takes.

    Args:
        wanted: The recipe.
        samples: The training samples.
        num_virtual: Virtual tokens before each of them, for which a pack has room once.
        rank: Whose share the plan gives.
        world_size: Number of processes.
    """
    training = wanted.training
    size, accumulation, seed = (
        training.micro_batch_size,
        training.gradient_accumulation_steps,
        training.seed,
    )
    if wanted.data.packing:
        packs = packed(wanted, samples, num_virtual)
        return PackPlan(packs, StepPlan(len(packs), size, accumulation, seed, rank, world_size))
    lengths = samples.lengths if training.group_by_length and isinstance(samples, EncodedDataset) else None
    return StepPlan(len(samples), size, accumulation, seed, rank, world_size, lengths)


def packed(wanted: Recipe, samples: Dataset, num_virtual: int) -> Packs:
    """Returns the samples in packs of `data.max_length`; see `step_plan`."""
    assert isinstance(samples, EncodedDataset), "only texts are packed"
    return Packs(samples.lengths + num_virtual, wanted.data.max_length + num_virtual, wanted.training.seed)


def longest_first(plan: Plan, samples: Dataset, count: int) -> list[Any]:
    """Returns what a batcher makes its largest batch of: the `count` longest samples, or fullest packs."""
    if isinstance(plan, PackPlan):
        packs = sorted(plan.packs.contents(0), key=lambda pack: -int(plan.packs.lengths[pack].sum()))
        return [pack.tolist() for pack in packs[:count]]
    if not isinstance(samples, EncodedDataset):
        return list(range(count))
    return [int(index) for index in np.argsort(-samples.lengths, kind="stable")[:count]]


def longest_sample(prepared: PreparedData) -> int:
    """Returns the tokens of the longest sample, of training or evaluation; 0 where there are no texts."""
    parts = [part for part in (prepared.train, prepared.eval) if isinstance(part, EncodedDataset)]
    return max((int(part.lengths.max(initial=0)) for part in parts), default=0)


def check_packing(loaded: LoadedRecipe, method: type[Method], config: MethodConfig) -> None:
    """Raises a RecipeError where samples are to be packed and the method cannot have that."""
    obstacle = method.obstacle(config, "flat")
    if loaded.recipe.data.packing and obstacle is not None:
        raise RecipeError(
            f"data.packing: {obstacle}", where=loaded.where("data", "packing"), hint="set data.packing to false"
        )


def try_joining(
    model: PreTrainedModel, device: torch.device, longest: int, obstacle: str | None = None, *, by_sample: bool = True
) -> Joins:
    """Returns whether a causal language model's samples may be joined, having tried it.

    On a CPU the model's attention becomes that of `peftcli.attention` where it can do with it.

    Args:
        model: The base, with or without adapters.
        device: Where it will compute.
        longest: Tokens of the longest sample.
        obstacle: What keeps the method's samples apart, if anything does.
        by_sample: Whether attention may be computed sample by sample, which is another code for each batch.
    """
    name = f"{model.config.model_type} with {model.config._attn_implementation} attention"
    if obstacle is not None:
        return Joins(False, why_not=obstacle)
    window = attention.window(model)
    if window is None or longest <= window:
        undo = attention.use(model, device) if by_sample else None
        if attention.knows_samples(model) and checks.joins_exactly(model):
            return Joins(True, free=True)
        if undo is not None:
            undo()
    if not checks.joins_exactly(model, rows=2):
        return Joins(False, why_not=f"{name} cannot keep joined samples apart")
    whole = "the layers are compiled" if not by_sample else name
    if by_sample and window:
        whole = f"the longest sample has more than the {window:,} tokens of a layer's window"
    return Joins(True, why_not=f"{whole}: a mask hides what it computes between samples")


def settle_joining(
    wanted: Recipe, model: PreTrainedModel, device: torch.device, longest: int, obstacle: str | None, reporter: Reporter
) -> Joins:
    """Returns whether the run's batches may be padding-free or packed, having tried it and said what follows.

    Raises:
        ModelError: The recipe insists and the model, or the method, cannot.
    """
    data = wanted.data
    if wanted.model.task != "causal-lm" or (data.padding_free is False and not data.packing):
        return Joins(False)
    # Compiled layers take joined samples under a mask: cut up by their lengths they would be compiled ever anew.
    found = try_joining(model, device, longest, obstacle, by_sample=not wanted.training.torch_compile)
    if not found.allowed:
        for key, wants, other in (
            ("packing", data.packing, "false"),
            ("padding_free", data.padding_free is True, "auto or false"),
        ):
            if wants:
                raise ModelError(f"data.{key}: {found.why_not}", hint=f"set data.{key} to {other}")
        reporter.note(f"batches are padded: {found.why_not}")
    elif found.free and wanted.training.group_by_length:
        reporter.note("training.group_by_length saves nothing here: batches are joined, and none is padded")
    elif not found.free and (data.packing or data.padding_free is True):
        reporter.note(f"joined samples cost attention: {found.why_not}")
    return found
