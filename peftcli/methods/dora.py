"""DoRA: LoRA for a weight's direction, and a trained length for each of its rows.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, eq. 5:

    V = W + s·B A        n = ‖V‖ by row, over the inputs        y = x (diag(m ⊘ n) V)ᵀ + b
    x [..., I]   A [r, I]   B [O, r]   m, n [O]   W, V [O, I]

Init: A and B as LoRA, m = the row norms of W, so that the model starts as its base.
Trainable per site: r (I + O) + O.
Merge: W' = diag(m ⊘ n) V. Not a sum: two DoRA adapters do not merge one after the other into what both learned.

Deviates from the paper: its text norms the columns of a weight written the other way round; like the authors' code
this norms each output's row. Where a row of V is zero, m ⊘ n counts as 1 instead of NaN or ∞. Dropout acts on the
low-rank branch only, which saves a second product with the base; `dropout_mode: paper` does as the authors' code.
The norm is computed without a dense V, in float32, and treated as a constant in the backward pass (section 4.3).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from peftcli.methods import lora
from peftcli.methods._protocol import Base, Method, Site
from peftcli.ops import decomposition
from peftcli.ops.dropout import dropout
from peftcli.ops.low_rank import low_rank


class DoRAConfig(lora.LoRAConfig):
    """The fields of `method:` when `type: dora`."""

    type: Literal["dora"] = "dora"  # type: ignore[assignment]
    detach_norm: bool = Field(True, description="Treat the norm as a constant in the backward pass, as the paper does.")
    dropout_mode: Literal["branch", "paper"] = Field(
        "branch", description="paper also drops the inputs of the rescaled base, at the cost of a second base product."
    )


class DoRA(Method):
    """LoRA's factors and the magnitudes `m` [O] at one site."""

    Config = DoRAConfig
    default_learning_rate = 2e-4
    peft_type = "LORA"

    def __init__(self, config: DoRAConfig, site: Site, seed: int) -> None:
        super().__init__(config, site, seed)
        self.lora = lora.LoRA(config, site, seed)
        self.detach_norm = config.detach_norm
        self.dropout_mode = config.dropout_mode
        c = decomposition.squared_row_norms(site.dense())
        self.m = nn.Parameter(c.sqrt().to(site.device))
        self.register_buffer("c", c.to(site.device), persistent=False)
        self.c: Tensor

    def forward(self, base: Base, x: Tensor) -> Tensor:
        g = decomposition.magnitude_ratio(self.m, self.norms(base))
        if self.training and self.lora.dropout and self.dropout_mode == "paper" and base.kind != "embedding":
            return self._forward_as_in_paper(base, x, g)
        return decomposition.rescale_rows(self.lora.update(base.forward(x), x), base.bias, g)

    def norms(self, base: Base) -> Tensor:
        """Returns `n` [O], the row norms of `V`, in float32 or wider."""
        A, B, scale = self.lora.factors()
        tracked = torch.is_grad_enabled() and not self.detach_norm
        with torch.set_grad_enabled(tracked), torch.autocast(A.device.type, enabled=False):
            n, lost = decomposition.factored_row_norms(self.c, base.project(A), A, B, scale)
            # Compiled code cannot branch on data; there the factored value, clamped at zero, stands.
            if not torch.compiler.is_compiling() and bool(lost.any()):
                direct = decomposition.direct_row_norms(base.dense(), A, B, scale)
                n = torch.where(lost, direct.to(n.dtype), n)
        return n

    def _forward_as_in_paper(self, base: Base, x: Tensor, g: Tensor) -> Tensor:
        """Returns `x Wᵀ + b + (g−1) ⊙ (x̃ Wᵀ) + g ⊙ s x̃ Aᵀ Bᵀ` [..., O] with `x̃ = drop(x)`."""
        dropped = dropout(x, self.lora.dropout)
        y, y_dropped = base.forward(x), base.forward(dropped)
        y_dropped = y_dropped if base.bias is None else y_dropped - base.bias
        return (y + (g - 1) * y_dropped + g * low_rank(dropped, *self.lora.factors())).to(y.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        A, B, scale = self.lora.factors()
        return decomposition.merged_decomposition(weight, scale * (B @ A), self.m)

    @classmethod
    def check(cls, config: DoRAConfig, sites: list[Site]) -> list[str]:
        return lora.LoRA.check(config, sites)

    def learning_rate_factors(self) -> Mapping[str, float]:
        return {f"lora.{name}": factor for name, factor in self.lora.learning_rate_factors().items()}

    def peft_tensors(self) -> dict[str, Tensor]:
        return {**self.lora.peft_tensors(), "lora_magnitude_vector": self.m}

    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self.lora.load_peft_tensors(tensors)
        with torch.no_grad():
            self.m.copy_(tensors["lora_magnitude_vector"])

    @classmethod
    def peft_config(cls, config: DoRAConfig) -> dict[str, Any]:
        return {**lora.LoRA.peft_config(config), "use_dora": True}

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> DoRAConfig:
        return DoRAConfig(**lora.lora_fields_from_peft(fields))
