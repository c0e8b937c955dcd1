"""LoRA: a frozen weight plus a trained product of two thin matrices.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, eq. 3:

    y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ        s = alpha / r, or alpha / √r when rank-stabilised (arXiv 2312.03732)
    x [..., I]   A [r, I]   B [O, r]   W [O, I], frozen

Init: A uniform in ±1/√I and B = 0, so that the model starts as its base; `init` names the others.
Trainable per site: r (I + O).
Merge: W' = W + s·B A.

LoRA-FA (Zhang et al. 2023, arXiv 2308.03303), `lora_fa`, leaves A as it starts: half the optimizer's state, and of a
layer's input only x Aᵀ [..., r] is kept for the backward pass. `projected` takes the step of B whose s·B A comes
nearest to a step of W itself, by B's gradient times (A Aᵀ)⁻¹ / s², as PEFT's `create_lorafa_optimizer` does.

Deviates from the paper: A starts uniform (as the authors' code does) where the text says Gaussian. On an embedding A
is 0 and B Gaussian, as in the authors' code. PiSSA never changes the frozen weight: the start of `s·B A` is subtracted
from the update instead, which is the same function and needs no second copy of the base.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from peftcli.methods._place import Base, Site
from peftcli.methods._protocol import Method, Shared, Targets
from peftcli.ops.decomposition import Rescaling
from peftcli.ops.dropout import dropout
from peftcli.ops.low_rank import as_input, forward_low_rank, merged_low_rank, projected_gradient

Init = Literal["kaiming", "gaussian", "pissa", "orthogonal"]


class LoRAConfig(Targets):
    """The fields of `method:` when `type: lora`."""

    type: Literal["lora"] = "lora"
    r: int = Field(16, ge=1, description="Rank of the update: the length of the thin side of A and B.")
    alpha: float | None = Field(None, gt=0, description="Scale: the update counts alpha / r. Left out: 2 r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapter's inputs zeroed in training.")
    rslora: bool = Field(False, description="Rank-stabilised scale alpha / sqrt(r), for high ranks.")
    init: Init = Field("kaiming", description="How A and B start: kaiming and gaussian with B = 0; pissa from W's SVD.")
    loraplus_lr_ratio: float | None = Field(
        None, gt=0, description="LoRA+: B learns at this multiple of the learning rate (the paper suggests 16)."
    )
    lora_fa: Literal["projected"] | bool = Field(
        False, description="LoRA-FA: A stays as it starts. projected: B steps as near to full training as A allows."
    )
    rank_pattern: dict[str, int] = Field(
        default_factory=dict, description="Ranks of chosen modules: a module path's end or a regular expression → r."
    )
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, description="alpha of chosen modules, as in rank_pattern."
    )

    @model_validator(mode="after")
    def _patterns_are_sound(self) -> LoRAConfig:
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern, value in getattr(self, field).items():
                if value <= 0:
                    raise ValueError(f"{field}: {pattern} must be greater than 0, got {value}")
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{field}: {pattern} is not a regular expression: {error}") from error
        if self.init == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            raise ValueError("init: orthogonal splits r into two halves, so r must be even")
        return self

    @model_validator(mode="after")
    def _lora_fa_is_possible(self) -> LoRAConfig:
        if self.lora_fa and type(self) is not LoRAConfig:
            raise ValueError(f"lora_fa: an option of lora alone; {self.type} trains A too")
        if self.lora_fa and self.loraplus_lr_ratio:
            raise ValueError("lora_fa: A does not train, so loraplus_lr_ratio has no rate of A to multiply")
        if self.lora_fa == "projected" and self.init == "orthogonal":
            raise ValueError("lora_fa: projected needs an A of full rank, and init orthogonal makes one of half")
        return self

    def rank_at(self, name: str) -> int:
        """Returns r at the module called `name`."""
        return int(_by_pattern(self.rank_pattern, name, self.r))

    def alpha_at(self, name: str) -> float:
        """Returns alpha at the module called `name`: its own, else the recipe's, else twice its rank."""
        return _by_pattern(self.alpha_pattern, name, 2 * self.rank_at(name) if self.alpha is None else self.alpha)

    def scale_at(self, name: str) -> float:
        """Returns s at the module called `name`."""
        r = self.rank_at(name)
        return self.alpha_at(name) / (math.sqrt(r) if self.rslora else r)


class LoRA(Method):
    """A and B at one site; with PiSSA also their frozen start, `A0` and `B0`."""

    Config = LoRAConfig
    default_learning_rate = 2e-4
    peft_type = "LORA"

    def __init__(self, config: LoRAConfig, site: Site, seed: int, shared: Shared | None = None) -> None:
        super().__init__(config, site, seed, shared)
        self.name, self.kind, self.shared_input = site.name, site.kind, site.shared_input
        self.scale = config.scale_at(site.name)
        self.dropout = config.dropout
        self.loraplus_lr_ratio = config.loraplus_lr_ratio
        A, B = initial_factors(config.init, config.rank_at(site.name), self.scale, site, seed)
        self.A = nn.Parameter(A.to(site.device), requires_grad=not config.lora_fa)
        self.B = nn.Parameter(B.to(site.device))
        moved = config.init == "pissa"
        self.register_buffer("A0", self.A.detach().clone() if moved else None, persistent=False)
        self.register_buffer("B0", self.B.detach().clone() if moved else None, persistent=False)
        self.A0: Tensor | None
        self.B0: Tensor | None

    def forward(self, base: Base, x: Tensor, rescaling: Rescaling | None = None) -> Tensor:
        A, B, scale = self.factors()
        if self.kind == "embedding":
            y: Tensor = base.forward(x)
            h = y + F.linear(F.embedding(x, A.t()) * scale, B).to(y.dtype)
            return h if rescaling is None else rescaling(h, base.bias)
        return forward_low_rank(base, x, self.input(x), A, B, scale, rescaling)

    def input(self, x: Tensor) -> Tensor:
        """Returns `drop(x)` [..., I] in A's dtype; one for all adapters of a parent that read the same `x`."""
        p = self.dropout if self.training else 0.0
        if not p and x.dtype == self.A.dtype:
            return x
        key = p, self.A.dtype, torch.is_autocast_enabled(x.device.type)
        return self.shared_input.once(self.name, x, key, lambda: as_input(dropout(x, p), self.A))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Returns `A` [R, I], `B` [O, R] and `s` with `ΔW = s·B A`; for PiSSA R is 2 r, to take its start off again."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B, self.scale
        return torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], dim=1), self.scale

    def merged(self, weight: Tensor) -> Tensor:
        return merged_low_rank(weight, *self.factors())

    @classmethod
    def not_low_rank(cls, config: LoRAConfig) -> str | None:
        return None

    def low_rank(self) -> tuple[Tensor, Tensor]:
        A, B, scale = self.factors()
        return A, scale * B

    @classmethod
    def check(cls, config: LoRAConfig, sites: list[Site]) -> list[str]:
        names = [site.name for site in sites]
        problems = []
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, field):
                if not any(_pattern_matches(pattern, name) for name in names):
                    problems.append(f"{field}: {pattern} matches none of the adapted modules")
        if config.lora_fa and config.init in ("kaiming", "gaussian"):
            embeddings = [site.name for site in sites if site.kind == "embedding"]
            problems += [f"lora_fa: {name} is an embedding, whose A starts at 0 and would stay" for name in embeddings]
        return problems + rank_problems(sites, config.rank_at)

    @classmethod
    def before_step(cls, config: LoRAConfig, adapters: Mapping[str, Any]) -> None:
        for adapter in adapters.values() if config.lora_fa == "projected" else ():
            if adapter.B.grad is not None:
                adapter.B.grad = projected_gradient(adapter.B.grad, adapter.A, adapter.scale)

    def learning_rate_factors(self) -> Mapping[str, float]:
        return {"B": self.loraplus_lr_ratio} if self.loraplus_lr_ratio else {}

    def peft_tensors(self) -> dict[str, Tensor]:
        A, B, _ = self.factors()
        if self.kind == "embedding":
            return {"lora_embedding_A": A, "lora_embedding_B": B}
        return {"lora_A.weight": A, "lora_B.weight": B}

    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        A, B = (tensors[name] for name in self.peft_tensors())
        with torch.no_grad():
            if self.A0 is not None and self.B0 is not None:
                r = len(self.A)
                self.A0.copy_(A[r:])
                self.B0.copy_(-B[:, r:])
                A, B = A[:r], B[:, :r]
            self.A.copy_(A)
            self.B.copy_(B)

    @classmethod
    def peft_config(cls, config: LoRAConfig) -> dict[str, Any]:
        stacked = 2 if config.init == "pissa" else 1
        growth = math.sqrt(stacked) if config.rslora else stacked  # keeps s while the rank on file doubles
        alphas = dict(config.alpha_pattern)
        if config.alpha is None:  # PEFT has one default alpha for all ranks
            alphas |= {key: 2.0 * r for key, r in config.rank_pattern.items() if key not in alphas}
        return {
            "r": stacked * config.r,
            "lora_alpha": growth * (2 * config.r if config.alpha is None else config.alpha),
            "lora_dropout": config.dropout,
            "use_rslora": config.rslora,
            "use_dora": False,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "rank_pattern": {key: stacked * r for key, r in config.rank_pattern.items()},
            "alpha_pattern": {key: growth * alpha for key, alpha in alphas.items()},
        }

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> LoRAConfig:
        return LoRAConfig(**lora_fields_from_peft(fields))


def rank_problems(sites: Iterable[Site], rank_at: Callable[[str], int]) -> list[str]:
    """Returns what is wrong with the rank that `rank_at` gives each site, told of one: the others have its cause."""
    for site in sites:
        r, largest = rank_at(site.name), min(site.in_features, site.out_features)
        if r > largest:
            return [f"r: {r} is more than the {largest} that {site.name} ({site.size}) can have"]
    return []


def lora_fields_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `Config` that an adapter_config.json of type LORA describes, without the targets."""
    return {
        "r": fields["r"],
        "alpha": float(fields["lora_alpha"]),
        "dropout": float(fields.get("lora_dropout") or 0),
        "rslora": bool(fields.get("use_rslora", False)),
        "rank_pattern": dict(fields.get("rank_pattern") or {}),
        "alpha_pattern": {key: float(alpha) for key, alpha in (fields.get("alpha_pattern") or {}).items()},
    }


def initial_factors(init: Init, r: int, scale: float, site: Site, seed: int) -> tuple[Tensor, Tensor]:
    """Returns the start of `A` [r, I] and `B` [O, r] in float32 on the CPU."""
    if site.device.type == "meta":
        return torch.empty(r, site.in_features, device="meta"), torch.empty(site.out_features, r, device="meta")
    generator = site.generator(seed)
    if init == "pissa":
        return pissa(site.dense(), r, scale)
    if init == "orthogonal":
        return orthogonal(r, site.in_features, site.out_features, generator)
    if site.kind == "embedding":
        # The rows of A that a batch never names would keep their noise: here B carries the noise and A starts at 0.
        return torch.zeros(r, site.in_features), torch.randn(site.out_features, r, generator=generator)
    start = kaiming if init == "kaiming" else gaussian
    return start(r, site.in_features, generator), torch.zeros(site.out_features, r)


def kaiming(r: int, in_features: int, generator: torch.Generator) -> Tensor:
    """Returns `A` [r, I] uniform in ±1/√I, as the authors' code draws it."""
    return (torch.rand(r, in_features, generator=generator) * 2 - 1) / math.sqrt(in_features)


def gaussian(r: int, in_features: int, generator: torch.Generator) -> Tensor:
    """Returns `A` [r, I] from N(0, 1/r²)."""
    return torch.randn(r, in_features, generator=generator) / r


def pissa(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Returns `A` [r, I] and `B` [O, r] with `s·B A` the best rank-r approximation of `weight` [O, I] (2404.02948)."""
    U, S, Vh = torch.linalg.svd(weight.cpu(), full_matrices=False)
    root = (S[:r] / scale).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def orthogonal(r: int, in_features: int, out_features: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns `A` [r, I] and `B` [O, r], both non-zero, with `B A = 0` up to rounding; `r` is even.

    The even and odd rows of one orthogonal matrix span spaces at right angles: A lives in one, B in the other.
    """
    Q, _ = torch.linalg.qr(torch.randn(r, r, generator=generator))
    A = Q[0::2].T @ torch.randn(r // 2, in_features, generator=generator) / 10
    B = torch.randn(out_features, r // 2, generator=generator) @ Q[1::2] / 10
    return A, B


def _by_pattern(patterns: Mapping[str, float], name: str, default: float) -> float:
    return next((value for pattern, value in patterns.items() if _pattern_matches(pattern, name)), default)


def _pattern_matches(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
