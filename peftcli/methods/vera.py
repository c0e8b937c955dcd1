"""VeRA: one frozen random pair of matrices for all modules, and two trained vectors for each.

Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454, eq. 2:

    y = x Wᵀ + bias + b ⊙ ((d ⊙ (drop(x) Aᵀ)) Bᵀ)        ΔW = diag(b) B diag(d) A
    x [..., I]   A [r, I]   B [O, r]   b [O]   d [r]   W [O, I], frozen

A and B are slices of a pair [r, largest I] and [largest O, r] that all adapted modules share, frozen.

Init: b = 0, so that the model starts as its base; d = `d_initial`; A and B uniform in ±√(6 / fan-in), a function of
`projection_prng_key` and the largest I and O alone, drawn as PEFT draws them.
Trainable per site: O + r.
Merge: W' = W + ΔW.

Deviates from the paper: its modules all have one shape. As in PEFT, smaller ones take slices, so one more target may
change the draw for all. Not every update of rank r can be learned: there are O + r degrees of freedom, not r (I + O).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftcli.methods._place import Base, Kind, Site
from peftcli.methods._protocol import Method, Shared, Targets
from peftcli.ops.decomposition import Rescaling
from peftcli.ops.dropout import dropout
from peftcli.ops.low_rank import merged_low_rank, thin
from peftcli.ops.vectors import add_scaled, scaled


class VeRAConfig(Targets):
    """The fields of `method:` when `type: vera`."""

    type: Literal["vera"] = "vera"
    r: int = Field(
        256, ge=1, description="Rank of the shared matrices; higher than LoRA's, as only r + O numbers train."
    )
    d_initial: float = Field(0.1, description="What every entry of d starts as; not 0.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the adapter's inputs zeroed in training.")
    projection_prng_key: int = Field(
        0, ge=0, lt=2**63, description="Seed of the shared matrices; one number, whatever training.seed is."
    )
    save_projection: bool = Field(
        True,
        description="Save the shared matrices with the adapter. Without, they are drawn anew when it is loaded, which "
        "another version of torch may do differently.",
    )

    @model_validator(mode="after")
    def _vectors_can_learn(self) -> VeRAConfig:
        if self.d_initial == 0:
            raise ValueError("d_initial: b starts at 0, so with d at 0 too neither would ever have a gradient")
        return self


class Projections(Shared):
    """The shared `A` [r, largest I] and `B` [largest O, r]: never trained, float32."""

    def __init__(self, A: Tensor, B: Tensor, *, saved: bool) -> None:
        super().__init__()
        self.saved = saved
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        self.A: Tensor
        self.B: Tensor

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"vera_A": self.A, "vera_B": self.B} if self.saved else {}


class VeRA(Method):
    """The vectors `b` [O] and `d` [r] at one site."""

    Config = VeRAConfig
    default_learning_rate = 4e-3  # the paper's for instruction tuning; vectors take more than matrices
    peft_type = "VERA"
    kinds = frozenset[Kind]({"linear", "conv1d"})

    def __init__(self, config: VeRAConfig, site: Site, seed: int, shared: Shared | None = None) -> None:
        super().__init__(config, site, seed, shared)
        self.dropout = config.dropout
        self.name, self.shared_input = site.name, site.shared_input
        self.in_features, self.out_features = site.in_features, site.out_features
        self.b = nn.Parameter(torch.zeros(site.out_features, device=site.device))
        self.d = nn.Parameter(torch.full((config.r,), config.d_initial, device=site.device))

    @classmethod
    def roles(cls, config: VeRAConfig) -> tuple[str, ...]:
        return ("query", "value")

    @classmethod
    def shared(cls, config: VeRAConfig, sites: list[Site], seed: int) -> Projections:
        longest_in = max(site.in_features for site in sites)
        longest_out = max(site.out_features for site in sites)
        return Projections(
            *draw_projections(config, longest_in, longest_out, sites[0].device), saved=config.save_projection
        )

    def forward(self, base: Base, x: Tensor, rescaling: Rescaling | None = None) -> Tensor:
        A, B = self._pair()
        p = self.dropout if self.training else 0.0
        key = p, torch.is_autocast_enabled(x.device.type)
        u = self.shared_input.once(self.name, x, key, lambda: thin(dropout(x, p), A))  # A is the same for all
        h = add_scaled(base.forward(x), u, self.b, B, self.d)
        return h if rescaling is None else rescaling(h, base.bias)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """Returns `A` [r, I], `diag(b) B diag(d)` [O, r] and 1: a LoRA's factors and scale.

        Both vectors scale B, none A: a frozen A needs no inputs for a gradient, so training keeps `x Aᵀ` [..., r] and
        neither `x` nor anything of the output's size.
        """
        A, B = self._pair()
        return A, scaled(self.b, B, self.d), 1.0

    def _pair(self) -> tuple[Tensor, Tensor]:
        """Returns this site's slices of the shared pair: `A` [r, I] and `B` [O, r]."""
        shared = self._shared[0]
        assert isinstance(shared, Projections)
        return shared.A[:, : self.in_features], shared.B[: self.out_features]

    def merged(self, weight: Tensor) -> Tensor:
        return merged_low_rank(weight, *self.factors())

    @classmethod
    def not_low_rank(cls, config: VeRAConfig) -> str | None:
        return None

    def low_rank(self) -> tuple[Tensor, Tensor]:
        A, B, _ = self.factors()
        return A, B

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"vera_lambda_b": self.b, "vera_lambda_d": self.d}

    @classmethod
    def peft_config(cls, config: VeRAConfig) -> dict[str, Any]:
        return {
            "r": config.r,
            "d_initial": config.d_initial,
            "vera_dropout": config.dropout,
            "projection_prng_key": config.projection_prng_key,
            "save_projection": config.save_projection,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_weights": True,
        }

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> VeRAConfig:
        return VeRAConfig(**vera_fields_from_peft(fields))


def vera_fields_from_peft(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `Config` that an adapter_config.json of type VERA describes, without the targets."""
    return {
        "r": fields["r"],
        "d_initial": float(fields.get("d_initial", 0.1)),
        "dropout": float(fields.get("vera_dropout") or 0),
        "projection_prng_key": fields.get("projection_prng_key") or 0,
        "save_projection": bool(fields.get("save_projection", True)),
    }


def draw_projections(
    config: VeRAConfig, in_features: int, out_features: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns `A` [r, I] and `B` [O, r], equal bit for bit to those that PEFT draws from the same key."""
    shapes = (config.r, in_features), (out_features, config.r)
    if device.type == "meta":
        return torch.empty(shapes[0], device=device), torch.empty(shapes[1], device=device)
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    A, B = (kaiming_uniform(shape, generator) for shape in shapes)  # in this order: they share the generator
    return A.to(device), B.to(device)


def kaiming_uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Returns a matrix [out, in] uniform in ±√(6 / in), in float32 on the CPU."""
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))  # in PEFT's order, which decides the last bit
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
