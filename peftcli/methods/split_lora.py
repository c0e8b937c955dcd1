"""LoRA-Split: several LoRAs side by side on one layer, added up or chosen between.

Tian et al. 2024, "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning", arXiv 2404.19245, section 2.2,
whose baseline it is:

    y = x Wᵀ + b + s · Σ_i ω_i ⊙ (drop(x) A_iᵀ B_iᵀ)        s = alpha / r
    x [..., I]   A_i [r, I]   B_i [O, r]   ω [..., N], N = num_heads   W [O, I], frozen

    combine   ω_i
    sum       1: exactly a LoRA of rank N·r and alpha N·alpha, and written as one
    mean      1 / N: the same with alpha
    task      1 for the head of the sample's task and 0 for the others, which learn nothing from it
    router    softmax(x Rᵀ)_i, R [N, I], for every token, as in HydraLoRA: a mixture of LoRAs

Init: A_i and R uniform in ±1/√I, B_i = 0, so that the model starts as its base.
Trainable per site: num_heads r (I + O) + num_heads I.
Merge: sum and mean W' = W + s·Σ_i ω_i B_i A_i; task the same for one task, that of `task_head`; router none, since ω
differs from token to token.

Deviates from the paper: it does not say how heads are combined where a sample's task is unknown, nor give code. With
`sum`, heads can learn no more than one LoRA of their total rank. R trains with `router` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from peftcli.errors import RecipeError
from peftcli.methods import _heads, lora
from peftcli.methods._place import Base, Site
from peftcli.methods._protocol import Facts, Method, Shared
from peftcli.ops.dropout import dropout
from peftcli.ops.heads import add_heads, gates
from peftcli.ops.low_rank import add_low_rank, merged_low_rank

Combine = Literal["sum", "mean", "task", "router"]


class SplitLoRAConfig(_heads.HeadsConfig):
    """The fields of `method:` when `type: split_lora`."""

    type: Literal["split_lora"] = "split_lora"
    num_heads: int = Field(3, ge=1, description="Number of heads, each with an A and a B of its own.")
    # The default is the only one that needs no tasks and is not a LoRA by another name.
    combine: Combine = Field(
        "router",
        description="What the heads' updates add up to: their sum, their mean, that of the sample's task alone, or a "
        "mixture that a router makes for every token. sum and mean are a plain LoRA of rank r · num_heads.",
    )
    task_head: int | None = Field(
        None, ge=0, description="With combine task: the head that answers where no task is named, and that is merged."
    )

    @model_validator(mode="after")
    def _task_head_is_a_head(self) -> SplitLoRAConfig:
        if self.task_head is not None and self.combine != "task":
            raise ValueError(f"task_head: with combine {self.combine} every head takes part")
        if self.task_head is not None and self.task_head >= self.num_heads:
            raise ValueError(f"task_head: {self.task_head} is none of the {self.num_heads} heads, which count from 0")
        return self

    @property
    def is_lora(self) -> bool:
        """Whether the heads are exactly one LoRA."""
        return self.combine in ("sum", "mean")


class SplitLoRA(Method):
    """The heads of one site, stacked: A [N·r, I], B [O, N·r]; with a router also R [N, I]."""

    Config = SplitLoRAConfig
    default_learning_rate = 2e-4
    peft_type = "SPLIT_LORA"
    kinds = frozenset({"linear", "conv1d"})  # a router has nothing to read from a token's number
    router_parameters = frozenset({"R"})

    def __init__(self, config: SplitLoRAConfig, site: Site, seed: int, shared: Shared | None = None) -> None:
        super().__init__(config, site, seed, shared or self.shared(config, [site], seed))
        self.name = site.name
        self.combine: Combine = config.combine
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.scale = config.scale / (config.num_heads if config.combine == "mean" else 1)
        rank, generator = config.num_heads * config.r, site.generator(seed)
        self.A = nn.Parameter(_heads.draw(rank, site, generator))
        self.B = nn.Parameter(torch.zeros(site.out_features, rank, device=site.device))
        routed = config.combine == "router"
        self.R = nn.Parameter(_heads.draw(self.num_heads, site, generator)) if routed else None

    @classmethod
    def shared(cls, config: SplitLoRAConfig, sites: list[Site], seed: int) -> Shared | None:
        return _heads.Tasks(config.num_heads, config.task_head) if config.combine == "task" else None

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y = base.forward(x)
        x = x.to(self.A.dtype)
        inner = dropout(x, self.dropout) if self.training else x
        if self.combine in ("sum", "mean"):
            return add_low_rank(y, inner, self.A, self.B, self.scale)
        u = F.linear(inner, self.A).unflatten(-1, (self.num_heads, -1))
        return add_heads(y, u, self._gates(x), self.B, self.scale)

    def _gates(self, x: Tensor) -> Tensor:
        """Returns `ω` [..., N], or a form of it that broadcasts to that."""
        if self.R is not None:
            return gates(x, self.R)
        return self._tasks.gates(x, self.name)

    @property
    def _tasks(self) -> _heads.Tasks:
        tasks = self._shared[0]
        assert isinstance(tasks, _heads.Tasks)
        return tasks

    # ---- as one LoRA ----

    @classmethod
    def unmergeable(cls, config: SplitLoRAConfig) -> str | None:
        if config.combine == "router":
            return "its gates differ from token to token, so no one weight does the same"
        if config.combine == "task" and config.task_head is None:
            return "each task has its own weight; choose one with method.task_head"
        return None

    @classmethod
    def not_low_rank(cls, config: SplitLoRAConfig) -> str | None:
        return cls.unmergeable(config)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        A, B = self._merging()
        return A, self.scale * B

    def merged(self, weight: Tensor) -> Tensor:
        return merged_low_rank(weight, *self._merging(), self.scale)

    def _merging(self) -> tuple[Tensor, Tensor]:
        """Returns the A and B that are merged: all heads', or those of the one that `task_head` chooses."""
        assert self.combine != "router"
        if self.combine != "task":
            return self.A, self.B
        head = self._tasks.task_head
        assert head is not None
        return self.A.chunk(self.num_heads)[head], self.B.chunk(self.num_heads, dim=1)[head]

    # ---- what the recipe says ----

    @classmethod
    def roles(cls, config: SplitLoRAConfig) -> tuple[str, ...]:
        return ("query", "value")

    @classmethod
    def prepare(cls, config: SplitLoRAConfig, facts: Facts) -> SplitLoRAConfig:
        if config.combine == "task" and facts.num_tasks > config.num_heads:
            raise RecipeError(f"method.num_heads: {config.num_heads} heads are too few for {facts.num_tasks} tasks")
        if config.combine == "task" and facts.num_tasks == 1:
            raise RecipeError(
                "method.combine: task needs a column that names each sample's task, and the data has none",
                hint="call the column task (data.columns renames one), or choose combine: router",
            )
        return config

    @classmethod
    def check(cls, config: SplitLoRAConfig, sites: list[Site]) -> list[str]:
        problems = lora.rank_problems(sites, lambda _: config.r)
        if problems or not config.is_lora:
            return problems
        whole = lora.rank_problems(sites, lambda _: config.num_heads * config.r)
        return [f"num_heads: with combine {config.combine}, the {config.num_heads} heads' {one}" for one in whole]

    # ---- files ----

    def peft_tensors(self) -> dict[str, Tensor]:
        if self.combine in ("sum", "mean"):
            return {"lora_A.weight": self.A, "lora_B.weight": self.B}
        routes = {} if self.R is None else {"lora_route.weight": self.R}
        A, B = (_heads.parts(name, T, self.num_heads, dim) for name, T, dim in (("A", self.A, 0), ("B", self.B, 1)))
        return {**A, **B, **routes}

    @classmethod
    def peft_type_of(cls, config: SplitLoRAConfig) -> str:
        return "LORA" if config.is_lora else cls.peft_type

    @classmethod
    def peft_config(cls, config: SplitLoRAConfig) -> dict[str, Any]:
        if config.is_lora:
            alpha = config.alpha_or_default * (config.num_heads if config.combine == "sum" else 1)
            whole = {"r": config.num_heads * config.r, "alpha": alpha, "dropout": config.dropout}
            return lora.LoRA.peft_config(lora.LoRAConfig.model_validate(whole))
        own = {"num_heads": config.num_heads, "combine": config.combine, "task_head": config.task_head}
        return {**_heads.to_peft(config), **own}

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> SplitLoRAConfig:
        own = {name: fields[name] for name in ("num_heads", "combine", "task_head")}
        return SplitLoRAConfig(**_heads.from_peft(fields), **own)
