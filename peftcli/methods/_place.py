"""Where a method works: a `Site` when its adapter is made, a `Base` when it runs.

That is all that it may know: never packed weights, a process rank, a dtype policy or a file.

All maths is done on the torch weight `W` [O, I] with `y = x Wᵀ + b`, whatever the module stores:

| kind      | what it is                    | `W` [O, I]                                             |
| --------- | ----------------------------- | ------------------------------------------------------ |
| linear    | `weight` [O, I]               | `weight`                                               |
| conv1d    | `weight` [I, O]               | `weightᵀ` (GPT-2's own linear layer)                   |
| embedding | `weight` [V, D]               | `weightᵀ`: a linear map of one-hot rows, I = V, O = D  |
| module    | any module, features in = out | none: adapted by what goes in and comes out            |
| model     | the whole model               | none                                                   |
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from peftcli.ops.sharing import SharedInput

Kind = Literal["linear", "conv1d", "embedding", "module", "model"]


@dataclass(frozen=True)
class Attention:
    """The shape of a model's attention caches.

    Attributes:
        num_layers: Layers with a cache.
        num_key_value_heads: Heads of keys and values, which with grouped queries are fewer than the queries'.
        head_size: Length of one head's keys and values.
        hidden_size: D, the model's width.
    """

    num_layers: int
    num_key_value_heads: int
    head_size: int
    hidden_size: int


@dataclass(frozen=True)
class Site:
    """One module that a method adapts, as the method may know it.

    Attributes:
        name: The module's path in the model, such as `model.layers.0.self_attn.q_proj`; empty for the model itself.
        kind: What the module is; see the table above.
        in_features: I, the length of what goes in (the vocabulary's size for an embedding or a model of texts).
        out_features: O, the length of what comes out.
        has_bias: Whether the module adds a bias.
        device: Where the adapter's tensors are to live. On `meta` only shapes are wanted: nothing may be computed.
        dense: Returns `W` [O, I] in float32, from whatever storage the base uses. Costs memory: call it in
            `__init__` only, and keep nothing of its size.
        roles: What the module does in its layer, such as `key`; empty where the architecture is not known.
        result_is_kept: Whether what comes next keeps the module's result for its own backward pass, and never writes
            into it: then an adapter may keep it too, and it costs nothing.
        run: The module's own frozen forward, for what an adapter's start is computed from.
        attention: The model's attention shape, for a site that is the model; None where layers differ in it.
        make_cache: Returns an empty cache of keys and values such as the model makes for itself, for such a site.
        shared_input: What the adapters of this module's parent compute once from an input that several of them read.
    """

    name: str
    kind: Kind
    in_features: int
    out_features: int
    has_bias: bool
    device: torch.device
    dense: Callable[[], Tensor]
    roles: frozenset[str] = frozenset()
    result_is_kept: bool = False
    run: Callable[..., Any] | None = None
    attention: Attention | None = None
    make_cache: Callable[[], Any] | None = None
    shared_input: SharedInput = dataclasses.field(default_factory=SharedInput, compare=False, repr=False)

    @property
    def size(self) -> str:
        """The module's shape for a message: `I × O`."""
        return f"{self.in_features} × {self.out_features}"

    @property
    def normalises(self) -> bool:
        """Whether the module is a norm, such as a LayerNorm."""
        module = getattr(self.run, "__self__", None)
        return module is not None and is_norm(module)

    def generator(self, seed: int) -> torch.Generator:
        """Returns the random source of this site, a pure function of (`seed`, `name`)."""
        return generator(seed, self.name)


def is_norm(module: nn.Module) -> bool:
    """Returns whether `module` normalises, told from its class's name: LayerNorm, LlamaRMSNorm, T5LayerNorm."""
    return "norm" in type(module).__name__.lower()


def layer_of(name: str) -> int | None:
    """Returns the index of the layer that a module or parameter is in: the first number in its path."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def ends_in(path: str, name: str) -> bool:
    """Returns whether `name` is the module path `path` or its end: `mlp.c_proj` ends `h.0.mlp.c_proj`."""
    return f".{path}".endswith(f".{name}")


def generator(seed: int, name: str) -> torch.Generator:
    """Returns the random source of what is called `name`, a pure function of both arguments.

    So an adapter's start does not depend on the order of modules or on which others are adapted. It lives on the CPU,
    so that every device starts from the same numbers.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Base(NamedTuple):
    """The frozen module, as its method sees it while running.

    Attributes:
        kind: What the module is.
        forward: The frozen module's own forward: `x` [..., I] (ids [...] for an embedding) → [..., O]; for a `module`
            or `model`, with that module's own arguments and result.
        bias: The module's bias [O], or None.
        project: `A` [R, I] → `W Aᵀ` [O, R], computed through the frozen module, so that a packed weight is never
            unpacked for it.
        dense: As the site's: `W` [O, I] in float32. Costs memory; for what cannot be had otherwise.
        dtype: What a whole model computes in; None for a module of one.
        weight: `W` [O, I] as it is held, of a module that is `x Wᵀ + b` and nothing else; None of all others.
    """

    kind: Kind
    forward: Callable[..., Any]
    bias: Tensor | None
    project: Callable[[Tensor], Tensor]
    dense: Callable[[], Tensor]
    dtype: torch.dtype | None = None
    weight: Tensor | None = None
