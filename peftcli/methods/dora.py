"""DoRA: LoRA for a weight's direction, and a trained length for each of its rows.

Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, eq. 5:

    V = W + s·B A        n = ‖V‖ by row, over the inputs        y = x (diag(m ⊘ n) V)ᵀ + b
    x [..., I]   A [r, I]   B [O, r]   m, n [O]   W, V [O, I]

Modules in `magnitude_only_modules` have no A and B: there V = W, and m alone trains (O numbers).

Init: A and B as LoRA, m = the row norms of W, so that the model starts as its base.
Trainable per site: r (I + O) + O.
Merge: W' = diag(m ⊘ n) V. Not a sum: two DoRA adapters do not merge one after the other into what both learned.

Deviates from the paper: its text norms the columns of a weight written the other way round; like the authors' code
this norms each output's row. Where a row of V is zero, m ⊘ n counts as 1 instead of NaN or ∞. Dropout acts on the
low-rank branch only, which saves a second product with the base; `dropout_mode: paper` does as the authors' code.
The norm is computed without a dense V, in float32, and treated as a constant in the backward pass (section 4.3).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from peftcli.methods import lora
from peftcli.methods._decomposed import DecomposedConfig, Decomposition, answer
from peftcli.methods._place import Base, Site
from peftcli.methods._protocol import Method, Shared


class DoRAConfig(DecomposedConfig, lora.LoRAConfig):
    """The fields of `method:` when `type: dora`."""

    type: Literal["dora"] = "dora"  # type: ignore[assignment]
    magnitude_only_modules: list[str] = Field(
        default_factory=list,
        description="Adapted modules, by their path's end, where the magnitudes alone train, without A and B.",
    )

    def magnitude_only_at(self, name: str) -> bool:
        """Returns whether the module called `name` gets no A and B."""
        return any(_ends_with(name, end) for end in self.magnitude_only_modules)

    @property
    def on_file(self) -> DoRAConfig:
        """This with rank 1 where there are no factors: PEFT knows no rank 0, so there zeros stand for them."""
        ranks = {re.escape(end): 1 for end in self.magnitude_only_modules}
        return self.model_copy(update={"rank_pattern": {**ranks, **self.rank_pattern}})


class DoRA(Method):
    """LoRA's factors and the magnitudes at one site; `lora` is None where the magnitudes alone train."""

    Config = DoRAConfig
    default_learning_rate = 2e-4
    peft_type = "LORA"

    def __init__(self, config: DoRAConfig, site: Site, seed: int, shared: Shared | None = None) -> None:
        super().__init__(config, site, seed, shared)
        has_factors = not config.magnitude_only_at(site.name)
        self.lora = lora.LoRA(config, site, seed) if has_factors else None
        self.decomposition = Decomposition(config, site)
        self._zeros = {} if has_factors else _shapes_on_file(config, site)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return self.decomposition.output(base, x, self.lora)

    def merged(self, weight: Tensor) -> Tensor:
        return self.decomposition.merged(weight, self.lora)

    @classmethod
    def check(cls, config: DoRAConfig, sites: list[Site]) -> list[str]:
        problems = [
            f"magnitude_only_modules: {end} matches none of the adapted modules"
            for end in config.magnitude_only_modules
            if not any(_ends_with(site.name, end) for site in sites)
        ]
        return problems + lora.LoRA.check(config, [site for site in sites if not config.magnitude_only_at(site.name)])

    @classmethod
    def before_step(cls, config: DoRAConfig, adapters: Mapping[str, Any]) -> None:
        lora.LoRA.before_step(config, {name: dora.lora for name, dora in adapters.items() if dora.lora is not None})

    @classmethod
    def after_step(cls, config: DoRAConfig, adapters: Mapping[str, Any], step: int, total_steps: int) -> None:
        answer(dora.decomposition for dora in adapters.values())

    def learning_rate_factors(self) -> Mapping[str, float]:
        factors = self.lora.learning_rate_factors() if self.lora is not None else {}
        return {f"lora.{name}": factor for name, factor in factors.items()}

    def peft_tensors(self) -> dict[str, Tensor]:
        m = self.decomposition.m
        zeros = {name: m.new_zeros(shape) for name, shape in self._zeros.items()}
        return {**(zeros if self.lora is None else self.lora.peft_tensors()), "lora_magnitude_vector": m}

    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if self.lora is not None:
            self.lora.load_peft_tensors(tensors)
        with torch.no_grad():
            self.decomposition.m.copy_(tensors["lora_magnitude_vector"])

    @classmethod
    def peft_config(cls, config: DoRAConfig) -> dict[str, Any]:
        return {**lora.LoRA.peft_config(config.on_file), "use_dora": True}

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> DoRAConfig:
        # Magnitudes alone come back as rank 1 with both factors zero: their gradients are zero too, and so they stay.
        return DoRAConfig(**lora.lora_fields_from_peft(fields))


def _ends_with(name: str, end: str) -> bool:
    return f".{name}".endswith(f".{end}")


def _shapes_on_file(config: DoRAConfig, site: Site) -> dict[str, torch.Size]:
    """Returns the shapes of the factors that PEFT expects at a site without any, by their names on file."""
    skeleton = lora.LoRA(config.on_file, replace(site, device=torch.device("meta")), seed=0)
    return {name: tensor.shape for name, tensor in skeleton.peft_tensors().items()}
