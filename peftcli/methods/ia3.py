"""(IA)³: scales what keys, values and the feed-forward pass on, with one vector each.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
arXiv 2205.05638, section 3.3:

    y = l ⊙ (x Wᵀ + b)      at keys and values       l [O]
    y = (l ⊙ x) Wᵀ + b      at the feed-forward's last projection, which reads what the paper scales       l [I]
    x [..., I]   y [..., O]   W [O, I] and b [O], frozen

Init: l = 1, so that the model starts as its base.
Trainable per site: O.
At the feed-forward's last projection, and where `feedforward_modules` says so, it is I instead.
Merge: W' = diag(l) W and b' = l ⊙ b; at the feed-forward W' = W diag(l), with b as it is.

Deviates from the paper: nothing. PEFT's own choice of modules does, for many models: it scales queries in place of
keys, or takes BERT's attention output for a feed-forward. `target_modules: auto` goes by what a module is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from peftcli.methods._place import Base, Site
from peftcli.methods._protocol import Method, Shared, Targets

ATTENTION = {"query", "key", "value"}
FEED_FORWARD = "feed_forward_output"


class IA3Config(Targets):
    """The fields of `method:` when `type: ia3`."""

    type: Literal["ia3"] = "ia3"
    target_modules: str | list[str] = Field(
        "auto",
        description="Modules to scale: auto (keys, values and the feed-forward's last projection, as in the paper), "
        "all-linear, names such as [k_proj, v_proj, down_proj], or one regular expression for the whole path.",
    )
    feedforward_modules: str | list[str] | None = Field(
        None,
        description="Those of the modules whose inputs are scaled instead of outputs: names that match a module path's "
        "end, or one regular expression for the whole path. Left out: every feed-forward's last projection.",
    )

    @field_validator("feedforward_modules")
    @classmethod
    def _is_a_pattern(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"it is not a regular expression: {error}") from error
        return value

    def scales_inputs(self, site: Site) -> bool:
        """Returns whether the module at `site` is treated as a feed-forward's last projection."""
        if self.feedforward_modules is None:
            return FEED_FORWARD in site.roles
        return any(_matches(site.name, entry) for entry in self.feedforward_entries())

    def feedforward_entries(self) -> list[str | re.Pattern[str]]:
        """Returns what `feedforward_modules` names: paths' ends, or a pattern for a whole path."""
        named = self.feedforward_modules
        return [re.compile(named)] if isinstance(named, str) else list(named or [])


class IA3(Method):
    """The vector `l` of one site: [I] where inputs are scaled, else [O]."""

    Config = IA3Config
    default_learning_rate = 3e-3  # the authors'; a scale near 1 moves far less per step than a weight near 0
    peft_type = "IA3"
    kinds = frozenset({"linear", "conv1d"})

    def __init__(self, config: IA3Config, site: Site, seed: int, shared: Shared | None = None) -> None:
        super().__init__(config, site, seed, shared)
        self.scales_inputs = config.scales_inputs(site)
        size = site.in_features if self.scales_inputs else site.out_features
        self.l = nn.Parameter(torch.ones(size, device=site.device))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if self.scales_inputs:
            return base.forward(self._scaled(x))  # type: ignore[no-any-return]
        return self._scaled(base.forward(x))

    def _scaled(self, x: Tensor) -> Tensor:
        """Returns `l ⊙ x` in `x`'s dtype, rounded once."""
        return (x * self.l).to(x.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        scale = self.l.to(torch.promote_types(weight.dtype, torch.float32))
        return (weight * (scale if self.scales_inputs else scale[:, None])).to(weight.dtype)

    def merged_bias(self, bias: Tensor) -> Tensor:
        return bias if self.scales_inputs else self._scaled(bias)

    @classmethod
    def not_low_rank(cls, config: IA3Config) -> str | None:
        return "it multiplies the weight instead of adding to it"

    @classmethod
    def roles(cls, config: IA3Config) -> tuple[str, ...]:
        return ("key", "value", FEED_FORWARD)

    @classmethod
    def check(cls, config: IA3Config, sites: list[Site]) -> list[str]:
        problems = []
        fused = [site for site in sites if len(ATTENTION & site.roles) > 1]
        if config.target_modules == "auto" and fused:
            parts = ", ".join(sorted(ATTENTION & fused[0].roles))
            problems.append(
                f"target_modules: auto scales keys and values alone, but {fused[0].name} ({fused[0].size}) is {parts} "
                "in one; name it among the modules to scale all of it, or name only others"
            )
        for entry in config.feedforward_entries():
            if not any(_matches(site.name, entry) for site in sites):
                name = entry if isinstance(entry, str) else entry.pattern
                problems.append(f"feedforward_modules: {name} matches none of the adapted modules")
        return problems

    def peft_tensors(self) -> dict[str, Tensor]:
        return {"ia3_l": self.l[None, :] if self.scales_inputs else self.l[:, None]}

    @classmethod
    def peft_config(cls, config: IA3Config) -> dict[str, Any]:
        return {
            "feedforward_modules": config.feedforward_modules or [],  # by role: see `peft_fields`
            "fan_in_fan_out": False,
            "init_ia3_weights": True,
        }

    @classmethod
    def peft_fields(cls, adapters: Mapping[str, Any]) -> dict[str, Any]:
        """Returns PEFT's `feedforward_modules` for these adapters: it knows no roles.

        As one regular expression: PEFT wants the entries of a list to be among those of `target_modules`.
        """
        paths = [path for path, adapter in adapters.items() if adapter.scales_inputs]
        leaves = sorted({path.rpartition(".")[2] for path in paths})
        by_leaf = [path for path in adapters if any(_matches(path, leaf) for leaf in leaves)]
        prefix, names = (r"(.*\.)?", leaves) if by_leaf == paths else ("", paths)
        return {"feedforward_modules": f"{prefix}({'|'.join(map(re.escape, names))})" if names else []}

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> IA3Config:
        named = fields["feedforward_modules"]
        if named is None:
            raise ValueError("feedforward_modules: null leaves open which modules' inputs are scaled")
        if named and not isinstance(named, str):  # PEFT's names match any end, also within a word
            named = f".*({'|'.join(map(re.escape, named))})"
        return IA3Config.model_validate({"feedforward_modules": named})


def _matches(path: str, entry: str | re.Pattern[str]) -> bool:
    """Returns whether `entry`, a path's end or a pattern for all of it, is that of `path`."""
    return f".{path}".endswith(f".{entry}") if isinstance(entry, str) else entry.fullmatch(path) is not None
