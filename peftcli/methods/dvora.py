"""DVoRA: VeRA for a weight's direction, and a trained length for each of its rows.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, section 5.4 (with DoRA's eq. 5), over
Kopiczko et al. 2023, arXiv 2310.11454:

    V = W + diag(b) B diag(d) A        n = ‖V‖ by row, over the inputs        y = x (diag(m ⊘ n) V)ᵀ + bias
    x [..., I]   A [r, I]   B [O, r]   b, m, n [O]   d [r]   W, V [O, I]

Init: as VeRA, and m = the row norms of W, so that the model starts as its base.
Trainable per site: 2 O + r.
Merge: W' = diag(m ⊘ n) V.

Deviates from the paper: in what VeRA and DoRA here do. PEFT has no DVoRA, so its files are for peftcli alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from peftcli.methods import vera
from peftcli.methods._decomposed import DecomposedConfig, Decomposition, answer
from peftcli.methods._place import Base, Site
from peftcli.methods._protocol import Method, Shared


class DVoRAConfig(DecomposedConfig, vera.VeRAConfig):
    """The fields of `method:` when `type: dvora`."""

    type: Literal["dvora"] = "dvora"  # type: ignore[assignment]


class DVoRA(Method):
    """VeRA's vectors and the magnitudes at one site."""

    Config = DVoRAConfig
    default_learning_rate = 4e-3  # VeRA's: all that trains are vectors
    peft_type = "DVORA"
    kinds = vera.VeRA.kinds

    def __init__(self, config: DVoRAConfig, site: Site, seed: int, shared: Shared | None = None) -> None:
        super().__init__(config, site, seed, shared)
        self.vera = vera.VeRA(config, site, seed, shared)
        self.decomposition = Decomposition(config, site)

    @classmethod
    def shared(cls, config: DVoRAConfig, sites: list[Site], seed: int) -> Shared:
        return vera.VeRA.shared(config, sites, seed)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return self.decomposition.output(base, x, self.vera)

    def merged(self, weight: Tensor) -> Tensor:
        return self.decomposition.merged(weight, self.vera)

    @classmethod
    def after_step(cls, config: DVoRAConfig, adapters: Mapping[str, Any], step: int, total_steps: int) -> None:
        answer(dvora.decomposition for dvora in adapters.values())

    def peft_tensors(self) -> dict[str, Tensor]:
        return {**self.vera.peft_tensors(), "dvora_magnitude_vector": self.decomposition.m}

    @classmethod
    def peft_config(cls, config: DVoRAConfig) -> dict[str, Any]:
        return vera.VeRA.peft_config(config)

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> DVoRAConfig:
        return DVoRAConfig(**vera.vera_fields_from_peft(fields))
