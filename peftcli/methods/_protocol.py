"""What a method is, and all that it may know of the place where it works.

An adapter is middleware around one module's forward; merging is one function of the weight. A method sees a `Site`
when it is made and a `Base` when it runs: never packed weights, a process rank, a dtype policy or a file.

All maths is done on the torch weight `W` [O, I] with `y = x Wᵀ + b`, whatever the module stores:

| kind      | stores              | `W` [O, I]                                             |
| --------- | ------------------- | ------------------------------------------------------ |
| linear    | `weight` [O, I]     | `weight`                                               |
| conv1d    | `weight` [I, O]     | `weightᵀ` (GPT-2's own linear layer)                   |
| embedding | `weight` [V, D]     | `weightᵀ`: a linear map of one-hot rows, I = V, O = D  |
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

Kind = Literal["linear", "conv1d", "embedding"]


@dataclass(frozen=True)
class Site:
    """One module that a method adapts, as the method may know it.

    Attributes:
        name: The module's path in the model, such as `model.layers.0.self_attn.q_proj`.
        kind: How the module stores its weight; see the table above.
        in_features: I, the length of what goes in (the vocabulary's size for an embedding).
        out_features: O, the length of what comes out.
        has_bias: Whether the module adds a bias.
        device: Where the adapter's tensors are to live.
        dense: Returns `W` [O, I] in float32, from whatever storage the base uses. Costs memory: call it in
            `__init__` only, and keep nothing of its size.
    """

    name: str
    kind: Kind
    in_features: int
    out_features: int
    has_bias: bool
    device: torch.device
    dense: Callable[[], Tensor]

    def generator(self, seed: int) -> torch.Generator:
        """Returns the random source of this site, a pure function of (`seed`, `name`).

        So an adapter's start does not depend on the order of modules or on which others are adapted. It lives on the
        CPU, so that every device starts from the same numbers.
        """
        digest = hashlib.sha256(f"{seed}:{self.name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Base(NamedTuple):
    """The frozen module, as its method sees it while running.

    Attributes:
        kind: How the module stores its weight.
        forward: The frozen module's own forward: `x` [..., I] (ids [...] for an embedding) → [..., O].
        bias: The module's bias [O], or None.
        project: `A` [R, I] → `W Aᵀ` [O, R], computed through the frozen module, so that a packed weight is never
            unpacked for it.
        dense: As the site's: `W` [O, I] in float32. Costs memory; for what cannot be had otherwise.
    """

    kind: Kind
    forward: Callable[[Tensor], Tensor]
    bias: Tensor | None
    project: Callable[[Tensor], Tensor]
    dense: Callable[[], Tensor]


class Targets(BaseModel):
    """Which modules a method adapts; the fields that every weight-space method shares."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    target_modules: str | list[str] = Field(
        "all-linear",
        description="Modules to adapt: all-linear (every linear layer but the output head), names such as "
        "[q_proj, v_proj] that match a module path's end, or one regular expression for the whole path.",
    )
    exclude_modules: str | list[str] | None = Field(
        None, description="Modules to leave out of target_modules, in the same forms."
    )
    layers: list[int] | None = Field(None, description="Indices of the layers to adapt; all layers when left out.")


class Method(nn.Module):
    """One adapter at one site. Subclasses live in `methods/<type>.py` and are made once for every site."""

    Config: ClassVar[type[Targets]]
    default_learning_rate: ClassVar[float]
    peft_type: ClassVar[str]
    """`peft_type` of adapter_config.json; PEFT's own name wherever PEFT has the method."""

    def __init__(self, config: Any, site: Site, seed: int) -> None:
        super().__init__()

    def forward(self, base: Base, x: Tensor) -> Tensor:
        """Returns the adapted output [..., O] for the module's input `x`."""
        raise NotImplementedError

    def merged(self, weight: Tensor) -> Tensor:
        """Returns `W'` [O, I] in `weight`'s dtype: a plain module that holds it equals the adapted one in eval mode."""
        raise NotImplementedError

    @classmethod
    def check(cls, config: Any, sites: list[Site]) -> list[str]:
        """Returns what is wrong with `config` at `sites`, one message each; needs no weights."""
        return []

    def learning_rate_factors(self) -> Mapping[str, float]:
        """Returns factors on the learning rate by parameter name; a parameter not named has 1."""
        return {}

    def peft_tensors(self) -> dict[str, Tensor]:
        """Returns the adapter's tensors under the names that follow the module's path in PEFT's file."""
        raise NotImplementedError

    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies in what `peft_tensors` returned. Keys and shapes have been checked before."""
        own = self.peft_tensors()
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    @classmethod
    def peft_config(cls, config: Any) -> dict[str, Any]:
        """Returns the method's own fields of PEFT's adapter_config.json."""
        raise NotImplementedError

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> Any:
        """Returns the `Config` that `fields` of an adapter_config.json describe, without the targets.

        Raises:
            ValueError: The file asks for something that this method does not do.
        """
        raise NotImplementedError
