"""HydraLoRA: one A, and several B between which a router mixes anew for every token.

Tian et al. 2024, "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning", arXiv 2404.19245, eqs. 2–4:

    y = x Wᵀ + b + s · Σ_i ω_i ⊙ (drop(x) Aᵀ B_iᵀ)        ω = softmax(x Rᵀ)        s = alpha / r
    x [..., I]   A [r, I]   B_i [O, r]   R [N, I]   ω [..., N], N = num_heads   W [O, I], frozen

Init: A and R uniform in ±1/√I, all B_i = 0, so that the model starts as its base. R must not start at 0: equal gates
would give all B_i the same gradient for ever, and R none.
Trainable per site: r I + num_heads r O + num_heads I.
Merge: none, since ω differs from token to token. Exact for one head; otherwise a LoRA of the mean gates, which is
another model, on request: `begin_average`, `averaged_low_rank`.

Deviates from the paper: s, which only its code has. One dropout mask for all heads where the code draws one for each
(`independent_dropout`). Router and softmax are computed in float32 from the input before dropout, as in the code. The
paper's parameter counts leave out the router. `num_heads: auto` does what the paper describes and the code lacks:
k-means over the data's samples, where the error has its elbow.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from peftcli.errors import RecipeError
from peftcli.methods import _heads
from peftcli.methods._place import Base, Site
from peftcli.methods._protocol import Facts, Method, Shared
from peftcli.methods.lora import rank_problems
from peftcli.ops.clustering import num_clusters
from peftcli.ops.dropout import dropout
from peftcli.ops.heads import add_heads, gates
from peftcli.ops.low_rank import merged_low_rank, read

MOST_HEADS = 10
"""The most heads that `auto` finds: as many as the paper used at most."""
UNRESOLVED = "method.num_heads: auto is found in the training data, which has not been read; give a number"


class HydraLoRAConfig(_heads.HeadsConfig):
    """The fields of `method:` when `type: hydralora`."""

    type: Literal["hydralora"] = "hydralora"
    num_heads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        3, description="Number of heads B. auto: as many as the training samples fall into clusters, 2 to 10."
    )
    independent_dropout: bool = Field(
        False,
        description="Each head drops other inputs, as in the authors' code, at the cost of a product with A each.",
    )


class HydraLoRA(Method):
    """A, the heads side by side in B = [B_1 … B_N] [O, N·r], and the router R at one site."""

    Config = HydraLoRAConfig
    default_learning_rate = 2e-4
    peft_type = "HYDRALORA"
    kinds = frozenset({"linear", "conv1d"})  # a router has nothing to read from a token's number
    router_parameters = frozenset({"R"})

    def __init__(self, config: HydraLoRAConfig, site: Site, seed: int, shared: Shared | None = None) -> None:
        super().__init__(config, site, seed, shared)
        if config.num_heads == "auto":
            raise RecipeError(UNRESOLVED)
        self.num_heads = config.num_heads
        self.name, self.shared_input = site.name, site.shared_input
        self.scale = config.scale
        self.dropout = config.dropout
        self.independent_dropout = config.independent_dropout
        generator = site.generator(seed)
        self.A = nn.Parameter(_heads.draw(config.r, site, generator))
        self.R = nn.Parameter(_heads.draw(self.num_heads, site, generator))
        self.B = nn.Parameter(torch.zeros(site.out_features, self.num_heads * config.r, device=site.device))
        self.gate_sum: Tensor | None = None
        self.num_gated = 0

    def forward(self, base: Base, x: Tensor) -> Tensor:
        x, u, omega = self._read(x)
        self._record(omega)
        return add_heads(base.forward(x), u, omega, self.B, self.scale)

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns `x` for the frozen layer, `u` [..., 1 or N, r] and the gates [..., N]."""
        exact = x.dtype == self.A.dtype == torch.promote_types(x.dtype, torch.float32)
        if (self.training and self.dropout) or not exact or torch.is_autocast_enabled(x.device.type):
            wide = x.to(self.A.dtype)
            return x, self._thin(wide), gates(wide, self.R)
        x, joint = read(x, torch.cat([self.A, self.R]))
        u, logits = joint.split([len(self.A), self.num_heads], dim=-1)
        return x, u.unsqueeze(-2), logits.softmax(dim=-1)

    def _thin(self, x: Tensor) -> Tensor:
        """Returns `u = drop(x) Aᵀ` [..., 1, r], or [..., N, r] where each head has a mask of its own."""
        if self.training and self.dropout and self.independent_dropout:
            return torch.stack([F.linear(dropout(x, self.dropout), self.A) for _ in range(self.num_heads)], dim=-2)
        p = self.dropout if self.training else 0.0
        dropped = self.shared_input.once(self.name, x, p, lambda: dropout(x, p)) if p else x
        return F.linear(dropped, self.A).unsqueeze(-2)

    # ---- as one LoRA ----

    def begin_average(self) -> None:
        """Sums up, from now on, the gates of every token that passes in eval mode; padding counts as any other."""
        self.gate_sum = torch.zeros(self.num_heads, dtype=torch.float64, device=self.R.device)
        self.num_gated = 0

    def _record(self, omega: Tensor) -> None:
        if self.gate_sum is not None and not self.training:
            self.gate_sum = self.gate_sum + omega.detach().flatten(0, -2).sum(dim=0)
            self.num_gated += omega.numel() // self.num_heads

    def mean_gates(self) -> Tensor:
        """Returns `ω̄` [N] in float64, the mean of the gates since `begin_average`.

        Raises:
            ValueError: No token has passed since then.
        """
        if self.gate_sum is None or not self.num_gated:
            raise ValueError("no token has passed since begin_average")
        return self.gate_sum / self.num_gated

    def averaged_low_rank(self) -> tuple[Tensor, Tensor]:
        """Returns `A` [r, I] and `B = s·Σ_i ω̄_i B_i` [O, r]: the LoRA that this is where every token has mean gates."""
        omega = self.mean_gates().to(self.B)
        return self.A, self.scale * torch.einsum("onr,n->or", self.B.unflatten(1, (self.num_heads, -1)), omega)

    @classmethod
    def unmergeable(cls, config: HydraLoRAConfig) -> str | None:
        return None if config.num_heads == 1 else "its gates differ from token to token, so no one weight does the same"

    @classmethod
    def not_low_rank(cls, config: HydraLoRAConfig) -> str | None:
        return cls.unmergeable(config)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        assert self.num_heads == 1
        return self.A, self.scale * self.B

    def merged(self, weight: Tensor) -> Tensor:
        assert self.num_heads == 1
        return merged_low_rank(weight, self.A, self.B, self.scale)

    # ---- what the recipe says ----

    @classmethod
    def roles(cls, config: HydraLoRAConfig) -> tuple[str, ...]:
        return ("query", "value")

    @classmethod
    def prepare(cls, config: HydraLoRAConfig, facts: Facts) -> HydraLoRAConfig:
        if config.num_heads != "auto":
            return config
        return config.model_copy(update={"num_heads": num_clusters(facts.samples, MOST_HEADS)})

    @classmethod
    def check(cls, config: HydraLoRAConfig, sites: list[Site]) -> list[str]:
        return rank_problems(sites, lambda _: config.r)

    # ---- files ----

    def peft_tensors(self) -> dict[str, Tensor]:
        heads = _heads.parts("B", self.B, self.num_heads, dim=1)
        return {"lora_A.weight": self.A, **heads, "lora_route.weight": self.R}

    @classmethod
    def peft_config(cls, config: HydraLoRAConfig) -> dict[str, Any]:
        own = {"lora_nums": config.num_heads, "independent_dropout": config.independent_dropout}
        return {**_heads.to_peft(config), **own}

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> HydraLoRAConfig:
        own = {"num_heads": fields["lora_nums"], "independent_dropout": fields["independent_dropout"]}
        return HydraLoRAConfig(**_heads.from_peft(fields), **own)
