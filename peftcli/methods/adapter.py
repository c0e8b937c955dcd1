"""Bottleneck adapters (Houlsby, Pfeiffer, parallel, series): small networks among the frozen modules.

    f(h) = s·(σ(drop(h) Dᵀ + b_D) Uᵀ + b_U)        h [..., I]   D [M, I]   b_D [M]   U [O, M]   b_U [O]

| variant  | paper                       | adapts                          | to                                    |
| -------- | --------------------------- | ------------------------------- | ------------------------------------- |
| houlsby  | 2019, 1902.00751, fig. 2    | attention's and the FFN's last  | y = z + f(z), z = x Wᵀ + b            |
| pfeiffer | 2020, 2005.00247            | the LayerNorm that ends a layer | y = LN(s + f(h)), h = LN(s)           |
|          |                             | or, in pre-norm models, a layer | y = h + f(h), h = layer(x)            |
| parallel | He 2021, 2110.04366, tab. 1 | the FFN, or another module      | y = FFN(x) + f(x)                     |
|          | Hu 2023, 2304.01933, sec. 2 | linear layers, where named      | y = x Wᵀ + b + f(x)                   |
| series   | Hu 2023, 2304.01933, sec. 2 | the FFN's last                  | y = z + f(z), z = x Wᵀ + b            |
|          |                             | `input_modules`                 | y = (x + f(x)) Wᵀ + b                 |

Init: houlsby D, U normal with deviation 1e-3, cut off at twice that; pfeiffer, series and linear parallel D, U ~
N(0, 0.02²); parallel on a module D uniform in ±1/√I, U = 0. Biases 0. Only U = 0 starts as the base: `init: zero-up`.
Trainable per site: 2 O bottleneck_size + bottleneck_size + O.
That is houlsby's, beside which all LayerNorms train. series and parallel have no biases: (I + O) M, or 2 O M.
Merge: none; no weight does what a nonlinearity does.

Deviates from the paper: houlsby's adapter comes before the base's own dropout instead of after it, which differs only
in training; GELU is exact where the authors' code approximates it. The code of He et al. has biases, their equation has
none. `layers` also limits the LayerNorms that train.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from peftcli.methods._place import Base, Site, ends_in, is_norm, layer_of
from peftcli.methods._protocol import Method, Shared, Targets
from peftcli.methods.lora import kaiming
from peftcli.ops.bottleneck import ACTIVATIONS, bottleneck
from peftcli.ops.dropout import dropout

Sigma = Literal["gelu", "relu", "tanh", "swish"]
Where = Literal["after", "before", "beside", "inside"]
"""Where the bottleneck is: after the module, before it, beside it, or between a LayerNorm and itself (pfeiffer)."""


class Paper(NamedTuple):
    """What a paper and its code leave to defaults; `std` is None where U starts at 0."""

    activation: Sigma
    bias: bool
    scale: float
    std: float | None


HOULSBY = Paper("gelu", True, 1.0, 1e-3)
PFEIFFER = Paper("relu", True, 1.0, 0.02)
HE = Paper("relu", False, 4.0, None)
HU = Paper("tanh", False, 1.0, 0.02)

ROLES = {
    "houlsby": ("attention_output", "feed_forward_output"),
    "pfeiffer": ("layer_output",),
    "parallel": ("feed_forward",),
    "series": ("feed_forward_output",),
}
OTHERWISE_SAVED = {"type", "bias", "target_modules", "exclude_modules", "layers"}
"""Fields that are on file under another name; `bias` means the base's own biases in PEFT's files."""


class AdapterConfig(Targets):
    """The fields of `method:` when `type: adapter`."""

    type: Literal["adapter"] = "adapter"
    variant: Literal["houlsby", "pfeiffer", "parallel", "series"] = Field(
        "houlsby",
        description="houlsby: after attention and after the feed-forward; pfeiffer: after the whole layer; parallel: "
        "beside the feed-forward; series: after the feed-forward.",
    )
    target_modules: str | list[str] = Field(
        "auto", description="Modules to adapt: auto (those of the variant's paper), names, or one regular expression."
    )
    bottleneck_size: int = Field(64, ge=1, description="Length of the thin side of the bottleneck.")
    activation: Sigma | None = Field(None, description="Function between D and U. Left out: the variant's own.")
    bias: bool | None = Field(None, description="Whether D and U have biases. Left out: as the variant's paper.")
    scale: float | None = Field(
        None, gt=0, description="Factor on what the bottleneck adds. Left out: 4 beside a whole feed-forward, else 1."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of the bottleneck's inputs zeroed in training.")
    init: Literal["paper", "zero-up"] = Field(
        "paper",
        description="How D and U start: as in the variant's paper, or U at 0, so that nothing changes at first.",
    )
    init_std: float | None = Field(
        None, gt=0, description="Standard deviation of the random start. Left out: the variant's own."
    )
    layer_norms: Literal["all", "none"] | list[str] | None = Field(
        None,
        description="LayerNorms to train too: all, none, or names that match a path's end. Left out: all for houlsby, "
        "none for the others.",
    )
    input_modules: list[str] = Field(
        default_factory=list,
        description="series only: those of the target modules whose input is adapted instead of their output.",
    )

    @model_validator(mode="after")
    def _inputs_are_of_series(self) -> AdapterConfig:
        if self.input_modules and self.variant != "series":
            raise ValueError(f"input_modules: a {self.variant} adapter never goes before a module; variant series can")
        return self

    def trains_norm(self, name: str) -> bool:
        """Returns whether the LayerNorm called `name` trains."""
        if self.layers is not None and layer_of(name) not in self.layers:
            return False
        default: Literal["all", "none"] = "all" if self.variant == "houlsby" else "none"
        chosen = default if self.layer_norms is None else self.layer_norms
        return chosen == "all" or (chosen != "none" and any(ends_in(name, entry) for entry in chosen))

    def paper_at(self, site: Site) -> Paper:
        """Returns the defaults of the paper that has such adapters in such a place."""
        if self.variant == "parallel":
            return HE if site.kind == "module" else HU
        return {"houlsby": HOULSBY, "pfeiffer": PFEIFFER, "series": HU}[self.variant]

    def where_at(self, site: Site) -> Where:
        """Returns where the bottleneck is at `site`."""
        if self.variant == "parallel":
            return "beside"
        if any(ends_in(site.name, entry) for entry in self.input_modules):
            return "before"
        return "inside" if self.variant == "pfeiffer" and site.normalises else "after"


class Adapter(Method):
    """D [M, I], U [O, M] and, where it has them, their biases at one site."""

    Config = AdapterConfig
    default_learning_rate = 3e-4  # of Houlsby et al.'s code and of LLM-Adapters' alike
    peft_type = "BOTTLENECK"
    kinds = frozenset({"linear", "conv1d", "module"})
    starts_as_base = False

    def __init__(self, config: AdapterConfig, site: Site, seed: int, shared: Shared | None = None) -> None:
        super().__init__(config, site, seed, shared)
        paper, self.where = config.paper_at(site), config.where_at(site)
        self.sigma = ACTIVATIONS[config.activation or paper.activation]
        self.scale = config.scale or paper.scale
        self.dropout = config.dropout
        D, U = initial_weights(config, site, seed)
        self.D, self.U = nn.Parameter(D.to(site.device)), nn.Parameter(U.to(site.device))
        has_bias = paper.bias if config.bias is None else config.bias
        self.b_D = nn.Parameter(torch.zeros(len(D), device=site.device)) if has_bias else None
        self.b_U = nn.Parameter(torch.zeros(len(U), device=site.device)) if has_bias else None

    def forward(self, base: Base, *arguments: Any, **named: Any) -> Any:
        if self.where == "before":
            return base.forward(self._added(arguments[0], arguments[0]))
        if self.where == "inside":
            return base.forward(self._added(arguments[0], base.forward(arguments[0])))
        result = base.forward(*arguments, **named)
        z = result[0] if isinstance(result, tuple) else result  # attentions return their weights beside the states
        h = z if self.where == "after" else arguments[0] if arguments else named["hidden_states"]
        y = self._added(z, h)
        return (y, *result[1:]) if isinstance(result, tuple) else y

    def _added(self, y: Tensor, h: Tensor) -> Tensor:
        """Returns `y + f(h)` [..., O] in `y`'s dtype."""
        h = dropout(h, self.dropout) if self.training else h
        return y + bottleneck(h, self.D, self.b_D, self.U, self.b_U, self.sigma, self.scale).to(y.dtype)

    @classmethod
    def roles(cls, config: AdapterConfig) -> tuple[str, ...]:
        return ROLES[config.variant]

    @classmethod
    def check(cls, config: AdapterConfig, sites: list[Site]) -> list[str]:
        refused = {reason: site.name for site in reversed(sites) if (reason := _refusal(config, site))}
        problems = [f"target_modules: {name} {reason}" for reason, name in refused.items()]  # one example of each
        for entry in config.input_modules:
            if not any(ends_in(site.name, entry) for site in sites):
                problems.append(f'input_modules: "{entry}" is none of the target modules')
        return problems

    @classmethod
    def check_model(cls, config: AdapterConfig, model: nn.Module) -> list[str]:
        norms = [name for name, module in model.named_modules() if is_norm(module)]
        leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in norms)) or "none"
        return [
            f'layer_norms: no LayerNorm is called "{entry}"; the model has {leaves}'
            for entry in (config.layer_norms if isinstance(config.layer_norms, list) else [])
            if not any(ends_in(name, entry) for name in norms)
        ]

    @classmethod
    def trains(cls, config: AdapterConfig, parameter: str, owner: nn.Module) -> bool:
        return is_norm(owner) and config.trains_norm(parameter.rpartition(".")[0])

    @classmethod
    def unmergeable(cls, config: AdapterConfig) -> str:
        return "a bottleneck has a nonlinearity, which no weight can hold"

    def peft_tensors(self) -> dict[str, Tensor]:
        tensors = {"down.weight": self.D, "down.bias": self.b_D, "up.weight": self.U, "up.bias": self.b_U}
        return {f"adapter_{name}": tensor for name, tensor in tensors.items() if tensor is not None}

    @classmethod
    def peft_config(cls, config: AdapterConfig) -> dict[str, Any]:
        fields = config.model_dump(exclude=OTHERWISE_SAVED)
        return {**fields, "adapter_bias": config.bias, "layers_to_transform": config.layers}

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> AdapterConfig:
        own = {name: fields[name] for name in AdapterConfig.model_fields if name not in OTHERWISE_SAVED}
        return AdapterConfig(**own, bias=fields["adapter_bias"])


def initial_weights(config: AdapterConfig, site: Site, seed: int) -> tuple[Tensor, Tensor]:
    """Returns the start of `D` [M, I] and `U` [O, M] in float32 on the CPU; empty ones for a site without storage."""
    where, paper = config.where_at(site), config.paper_at(site)
    in_features = site.out_features if where == "after" else site.in_features
    out_features = site.in_features if where == "before" else site.out_features
    shapes = (config.bottleneck_size, in_features), (out_features, config.bottleneck_size)
    if site.device.type == "meta":
        return torch.empty(shapes[0], device="meta"), torch.empty(shapes[1], device="meta")
    zero_up = config.init == "zero-up" or paper.std is None
    std = config.init_std or (None if zero_up else paper.std)
    generator, D, U = site.generator(seed), torch.zeros(shapes[0]), torch.zeros(shapes[1])
    if std is None:
        return kaiming(*shapes[0], generator), U
    for weight in (D,) if zero_up else (D, U):
        if config.variant == "houlsby":
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        else:
            nn.init.normal_(weight, std=std, generator=generator)
    return D, U


def _refusal(config: AdapterConfig, site: Site) -> str | None:
    """Returns why no adapter of this variant can be at `site`."""
    if site.kind not in Adapter.kinds:
        return f"is an {site.kind}, which has no hidden state to adapt"
    if site.kind == "module" and site.in_features == 0:
        return "has a width that is not known"
    if config.variant == "pfeiffer" and site.kind != "module":
        return "is one linear layer; pfeiffer adapts a layer's last LayerNorm, or the layer: auto finds them"
    if config.variant == "parallel" and site.normalises:
        return "is a LayerNorm; parallel goes beside what is added to the residual, a feed-forward or a linear layer"
    if config.where_at(site) == "before" and site.kind == "module":
        return "is no linear layer; only those can be in input_modules"
    return None
