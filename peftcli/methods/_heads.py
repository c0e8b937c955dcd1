"""What the methods with several low-rank heads share: their fields, tasks, start and names on file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from peftcli.errors import DataError, RecipeError
from peftcli.methods._place import Site
from peftcli.methods._protocol import Shared, Targets
from peftcli.methods.lora import kaiming


class HeadsConfig(Targets):
    """The fields of every method with several heads."""

    r: int = Field(8, ge=1, description="Rank of each head.")
    alpha: float | None = Field(None, gt=0, description="Scale: the update counts alpha / r. Left out: 2 r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapter's inputs zeroed in training.")

    @property
    def alpha_or_default(self) -> float:
        """`alpha`, or twice the rank where it is left out."""
        return 2.0 * self.r if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        """The factor s of the update."""
        return self.alpha_or_default / self.r


class Tasks(Shared):
    """Which head each sample of the batch under way goes through. Holds no tensors that are saved.

    Attributes:
        num_heads: N.
        task_head: The head for batches that name no tasks; None refuses them. May be set at any time.
        task_ids: What `see` was told last.
    """

    def __init__(self, num_heads: int, task_head: int | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.task_head = task_head
        self.task_ids: Tensor | None = None

    def see(self, task_ids: Tensor | None) -> None:
        """Takes note of the tasks of the next forward pass.

        Raises:
            DataError: There is no head for a task.
        """
        without = () if task_ids is None else task_ids[(task_ids < 0) | (task_ids >= self.num_heads)].tolist()
        if without:
            raise DataError(
                f"the data has a task {without[0]}, but there are only {self.num_heads} heads, which count from 0",
                hint="set method.num_heads to the number of tasks",
            )
        self.task_ids = task_ids

    def gates(self, x: Tensor, name: str) -> Tensor:
        """Returns `ω` for the input `x` [..., I] of the module `name`, true for the head to go through: [..., N].

        Dimensions along which all of `x` goes through one head have length 1.

        Raises:
            RecipeError: No task is known, or `x` cannot be told apart by samples.
        """
        places, ids = x.shape[:-1], self.task_ids
        if ids is None:
            if self.task_head is None:
                raise RecipeError(
                    "method.combine: task needs to know whose head is to answer, and no task is named",
                    hint="choose one: method.task_head=0",
                )
            ids = torch.full([1] * len(places), self.task_head, device=x.device)
        elif ids.ndim == 1 and places[:1] == ids.shape:
            ids = ids.view(-1, *[1] * (len(places) - 1))
        elif places != ids.shape:
            raise RecipeError(
                f"method.combine: task cannot adapt {name}, whose inputs are not laid out by samples",
                hint="leave it out with method.exclude_modules",
            )
        return ids[..., None] == torch.arange(self.num_heads, device=x.device)

    def peft_tensors(self) -> dict[str, Tensor]:
        """Returns nothing: tasks are the batch's."""
        return {}


def draw(rows: int, site: Site, generator: torch.Generator) -> Tensor:
    """Returns a matrix [rows, I] uniform in ±1/√I, on the site's device; an empty one where only shapes are wanted."""
    if site.device.type == "meta":
        return torch.empty(rows, site.in_features, device=site.device)
    return kaiming(rows, site.in_features, generator).to(site.device)


def parts(name: str, tensor: Tensor, num_heads: int, dim: int) -> dict[str, Tensor]:
    """Returns the heads' parts of `tensor`, views of it along `dim`, by their names on file: `lora_B0.weight`, …."""
    return {f"lora_{name}{i}.weight": part for i, part in enumerate(tensor.chunk(num_heads, dim))}


def to_peft(config: HeadsConfig) -> dict[str, Any]:
    """Returns the fields of `HeadsConfig` by the names that PEFT has for a LoRA's."""
    return {"r": config.r, "lora_alpha": config.alpha_or_default, "lora_dropout": config.dropout}


def from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `HeadsConfig` that `to_peft` wrote."""
    return {"r": fields["r"], "alpha": float(fields["lora_alpha"]), "dropout": float(fields["lora_dropout"])}
