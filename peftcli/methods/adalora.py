"""AdaLoRA: an update in singular-value form, whose ranks move to the modules that need them.

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", arXiv 2303.10512, eq. 3:

    y = x Wᵀ + b + s · drop(x) (diag(E) A)ᵀ Bᵀ        s = alpha / (r + 10⁻⁵), also once ranks are gone
    x [..., I]   A [r, I]   E [r]   B [O, r]   W [O, I], frozen; the paper calls A, E and B: Q, Λ and P

To the loss is added `orthogonality` times the mean, over all A and B, of ‖A Aᵀ − 1‖ and ‖Bᵀ B − 1‖ (eq. 4). After each
step every triplet of every module (a row of A, a value of E, a column of B) is scored by |weight · gradient|, averaged
over steps (eq. 7 to 11). Every `interval` steps E is set to 0 for the worst of them all, so that the budget is kept: r
per module for the first `warmup_steps`, on average `target_r` for the last `final_steps`, a cubic between (eq. 12). A
value that was set to 0 goes on learning and may come back, up to the last allocation.

Init: A and B from N(0, 0.02²) and E = 0, so that the model starts as its base.
Trainable per site: r (I + O + 1).
Merge: W' = W + s·B diag(E) A.

Deviates from the paper: the penalty is the mean norm, as in the authors' code, where the text says the sum of squared
norms. Adapters are written whole, with zeros in E for the ranks that are gone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftcli.errors import RecipeError
from peftcli.methods._place import Base, Site
from peftcli.methods._protocol import Method, Shared, Targets
from peftcli.ops import allocation
from peftcli.ops.dropout import dropout
from peftcli.ops.low_rank import forward_low_rank, merged_low_rank

RANK_OFFSET = 1e-5
"""What the authors' code adds to r in the scale; left out, a file would load with other values."""


class AdaLoRAConfig(Targets):
    """The fields of `method:` when `type: adalora`."""

    type: Literal["adalora"] = "adalora"
    r: int = Field(12, ge=1, description="Rank of each update at the start, half again the target in the paper.")
    target_r: int = Field(8, ge=1, description="Mean rank that is left at the end; at most r.")
    alpha: float | None = Field(None, gt=0, description="Scale: the update counts alpha / r. Left out: 2 r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapter's inputs zeroed in training.")
    warmup_steps: int | None = Field(
        None, ge=0, description="Steps before ranks go. Left out: a tenth of the steps that final_steps leaves."
    )
    final_steps: int | None = Field(
        None, ge=0, description="Steps at the end with fixed ranks. Left out: half of the steps after the warm-up."
    )
    interval: int | None = Field(
        None, ge=1, description="Steps from one allocation of ranks to the next. Left out: a hundredth of all steps."
    )
    beta1: float = Field(0.85, gt=0, lt=1, description="Share of a weight's average importance that a step keeps.")
    beta2: float = Field(0.85, gt=0, lt=1, description="The same of that importance's average deviation.")
    orthogonality: float = Field(0.5, ge=0, description="Weight of the penalty that keeps A and B orthogonal.")

    @model_validator(mode="after")
    def _target_is_a_share_of_r(self) -> AdaLoRAConfig:
        if self.target_r > self.r:
            raise ValueError(f"target_r: {self.target_r} is more than r, the {self.r} to start from")
        return self

    @property
    def scale(self) -> float:
        """The update's factor s; it stays what it is when ranks go."""
        return (2 * self.r if self.alpha is None else self.alpha) / (self.r + RANK_OFFSET)

    def schedule(self, total_steps: int) -> tuple[int, int, int]:
        """Returns the last step before ranks go, the step after which they stay, and the interval between.

        Raises:
            RecipeError: No step is left in which ranks could go.
        """
        warmup, final = self.warmup_steps, self.final_steps
        warmup = (total_steps - (final or 0)) // 10 if warmup is None else warmup
        final = (total_steps - warmup) // 2 if final is None else final
        if warmup >= total_steps - final:
            raise RecipeError(
                f"method.warmup_steps: {warmup}, and {final} final_steps, leave none of the {total_steps} steps to "
                "allocate ranks in"
            )
        return warmup, total_steps - final, self.interval or max(1, total_steps // 100)


class AdaLoRA(Method):
    """A, E and B at one site; and for training their importance and, in the end, which ranks were kept."""

    Config = AdaLoRAConfig
    default_learning_rate = 1e-3  # factors that start at 0.02 need more than LoRA's; the authors' are about this
    peft_type = "ADALORA"
    kinds = frozenset({"linear", "conv1d"})

    def __init__(self, config: AdaLoRAConfig, site: Site, seed: int, shared: Shared | None = None) -> None:
        super().__init__(config, site, seed, shared)
        self.scale, self.dropout = config.scale, config.dropout
        A, B = initial_factors(config.r, site, seed)
        self.A, self.B = nn.Parameter(A.to(site.device)), nn.Parameter(B.to(site.device))
        self.E = nn.Parameter(torch.zeros(config.r, device=site.device))
        for name, tensor in self.named_parameters():
            self.register_buffer(f"{name}_importance", torch.zeros_like(tensor))
            self.register_buffer(f"{name}_deviation", torch.zeros_like(tensor))
        self.register_buffer("kept", torch.ones(config.r, dtype=torch.bool, device=site.device))
        self.kept: Tensor

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return forward_low_rank(base, x, dropout(x, self.dropout) if self.training else x, *self.factors())

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Returns `diag(E) A` [r, I], `B` [O, r] and `s`."""
        return self.E[:, None] * self.A, self.B, self.scale

    # ---- training ----

    @classmethod
    def penalty(cls, config: AdaLoRAConfig, adapters: Collection[AdaLoRA]) -> Tensor | None:
        if not config.orthogonality:
            return None
        rows = [rows for adapter in adapters for rows in (adapter.A, adapter.B.T)]
        return config.orthogonality * torch.stack([allocation.distance_from_orthogonal(one) for one in rows]).mean()

    @classmethod
    @torch.no_grad()
    def after_step(cls, config: AdaLoRAConfig, adapters: Mapping[str, AdaLoRA], step: int, total_steps: int) -> None:
        warmup, end, interval = config.schedule(total_steps)
        initial, target = config.r * len(adapters), config.target_r * len(adapters)
        if step < end:
            for adapter in adapters.values():
                adapter.measure(config.beta1, config.beta2)
            if step > warmup and step % interval == 0:
                allocate(adapters.values(), allocation.cubic_budget(step, warmup, end, initial, target))
        elif step == end or int(torch.stack([adapter.kept.sum() for adapter in adapters.values()]).sum()) > target:
            # Later than at `end` only where that step was skipped, as a gradient scaler does after an overflow.
            allocate(adapters.values(), target)
        else:
            for adapter in adapters.values():
                adapter.keep(adapter.kept)

    def measure(self, beta1: float, beta2: float) -> None:
        """Takes this step's gradients into the averages of |weight · gradient|."""
        for name, tensor in self.named_parameters():
            if tensor.grad is not None:
                mean, deviation = self.get_buffer(f"{name}_importance"), self.get_buffer(f"{name}_deviation")
                allocation.smooth_(mean, deviation, (tensor * tensor.grad).abs_(), beta1, beta2)

    def scores(self) -> Tensor:
        """Returns the importance of each triplet [r]: averages times deviations, so that what is uncertain stays."""
        buffers = ((self.get_buffer(f"{name}_importance"), self.get_buffer(f"{name}_deviation")) for name in "AEB")
        return allocation.triplet_scores(*(mean * deviation for mean, deviation in buffers))

    def keep(self, kept: Tensor) -> None:
        """Sets E to 0 but for the ranks that are `kept` [r]."""
        self.kept.copy_(kept)
        self.E.masked_fill_(~kept, 0)

    # ---- after training ----

    def merged(self, weight: Tensor) -> Tensor:
        return merged_low_rank(weight, *self.factors())

    @classmethod
    def not_low_rank(cls, config: AdaLoRAConfig) -> str | None:
        return None

    def low_rank(self) -> tuple[Tensor, Tensor]:
        A, B, scale = self.factors()
        return A, scale * B

    @classmethod
    def check(cls, config: AdaLoRAConfig, sites: list[Site]) -> list[str]:
        for site in sites:
            largest = min(site.in_features, site.out_features)
            if config.r > largest:  # one example says it; the others have the same cause
                return [f"r: {config.r} is more than the {largest} that {site.name} ({site.size}) can have"]
        return []

    @classmethod
    def check_steps(cls, config: AdaLoRAConfig, total_steps: int) -> list[str]:
        try:
            config.schedule(total_steps)
        except RecipeError as error:
            return [problem.message.removeprefix("method.") for problem in error.problems]
        return []

    # ---- PEFT's files ----

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"lora_A": self.A, "lora_B": self.B, "lora_E": self.E[:, None]}

    @classmethod
    def peft_config(cls, config: AdaLoRAConfig) -> dict[str, Any]:
        warmup, final = config.warmup_steps or 0, config.final_steps or 0
        return {
            "init_r": config.r,
            "r": 8,  # PEFT reads init_r, and warns of any other number here
            "target_r": config.target_r,
            "lora_alpha": 2 * config.r if config.alpha is None else config.alpha,
            "lora_dropout": config.dropout,
            "tinit": warmup,
            "tfinal": final,
            "deltaT": config.interval or 1,
            "total_step": warmup + final + 1,  # training is over, but PEFT loads no file without such a number
            "beta1": config.beta1,
            "beta2": config.beta2,
            "orth_reg_weight": config.orthogonality,
            "rank_pattern": None,
            "alpha_pattern": {},
            "use_rslora": False,
            "use_dora": False,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
        }

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> AdaLoRAConfig:
        r, alpha = fields["init_r"], float(fields["lora_alpha"])
        for name, kept in (fields.get("rank_pattern") or {}).items():
            if not isinstance(kept, list) or len(kept) != r or not all(isinstance(one, bool) for one in kept):
                raise ValueError(f"rank_pattern: {name} must be a list of {r} truth values")
        names = {
            "warmup_steps": "tinit",
            "final_steps": "tfinal",
            "interval": "deltaT",
            "beta1": "beta1",
            "beta2": "beta2",
        }
        return AdaLoRAConfig.model_validate(
            {
                "r": r,
                "target_r": min(fields["target_r"], r),  # PEFT lets it be more, and then nothing goes
                "alpha": alpha if alpha > 0 else float(r),
                "dropout": float(fields.get("lora_dropout") or 0),
                "orthogonality": float(fields["orth_reg_weight"]),
                **{own: fields[theirs] for own, theirs in names.items()},
            }
        )

    @classmethod
    def tensors_from_peft(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns `tensors` with zeros where PEFT has left out the ranks that its `rank_pattern` says are gone."""
        whole = dict(tensors)
        for name, kept in (fields.get("rank_pattern") or {}).items():
            path = name.removesuffix(".default").removesuffix(".lora_E")
            for part, dim in (("lora_A", 0), ("lora_B", 1), ("lora_E", 0)):
                key = cls.peft_key(path, part)
                if key in whole and whole[key].shape[dim] == sum(kept):  # else its shape is refused as it is
                    whole[key] = allocation.with_gaps(whole[key], torch.tensor(kept), dim)
        return whole


def initial_factors(r: int, site: Site, seed: int) -> tuple[Tensor, Tensor]:
    """Returns the start of `A` [r, I] and `B` [O, r], from N(0, 0.02²), in float32 on the CPU."""
    if site.device.type == "meta":
        return torch.empty(r, site.in_features, device="meta"), torch.empty(site.out_features, r, device="meta")
    generator = site.generator(seed)
    A, B = (torch.randn(shape, generator=generator) for shape in ((r, site.in_features), (site.out_features, r)))
    return 0.02 * A, 0.02 * B


def allocate(adapters: Collection[AdaLoRA], budget: int) -> None:
    """Keeps the `budget` best triplets of all `adapters` and sets the others' E to 0."""
    scores = [adapter.scores() for adapter in adapters]
    threshold = allocation.score_to_beat(scores, budget)
    if threshold is not None:
        for adapter, own in zip(adapters, scores, strict=True):
            adapter.keep(own > threshold)
