"""What a method is, and all that it may know of the place where it works.

An adapter is middleware around one module's forward; merging is one function of the weight. A method sees a `Site`
when it is made and a `Base` when it runs: never packed weights, a process rank, a dtype policy or a file.

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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from peftcli.ops.sharing import SharedInput

Kind = Literal["linear", "conv1d", "embedding", "module", "model"]
Place = Literal["targets", "input-embedding", "model", "nowhere"]
"""Where a method's adapters go: to the modules that `target_modules` choose, to the input embedding, around the whole
model, or nowhere, because the method trains parameters that are there already."""


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


class MethodConfig(BaseModel):
    """The fields of `method:`; every method's own class derives from this one or from `Targets`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Targets(MethodConfig):
    """Which modules a method adapts; the fields that every method of this kind shares."""

    target_modules: str | list[str] = Field(
        "all-linear",
        description="Modules to adapt: all-linear (every linear layer but the output head), auto (those of the "
        "method's paper), names such as [q_proj, v_proj] that match a module path's end, or one regular expression "
        "for the whole path.",
    )
    exclude_modules: str | list[str] | None = Field(
        None, description="Modules to leave out of target_modules, in the same forms."
    )
    layers: list[int] | None = Field(None, description="Indices of the layers to adapt; all layers when left out.")


class Facts(Protocol):
    """What a method may ask about tokenizer and data before its adapters are made; see `Method.prepare`."""

    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of `text`, without special tokens."""
        ...

    @property
    def frequent_ids(self) -> Sequence[int]:
        """The ordinary tokens' ids, those that the training data uses most first; no special or added token."""
        ...

    @property
    def labels(self) -> Sequence[str]:
        """The names of the classes; empty where the task has none."""
        ...

    @property
    def num_tasks(self) -> int:
        """How many tasks the training data tells apart by its column `task`; 1 where it has none."""
        ...

    @property
    def samples(self) -> Sequence[Sequence[int]]:
        """Token ids of training samples, at most a few thousand of them."""
        ...


class Part(nn.Module):
    """A module of adapter tensors that knows their names in PEFT's files."""

    router_parameters: ClassVar[frozenset[str]] = frozenset()
    """Parameters of an adapter that only choose between its parts; papers leave them out of their counts."""

    def peft_tensors(self) -> dict[str, Tensor]:
        """Returns the tensors to save under their names in PEFT's file, less the module's path in front."""
        raise NotImplementedError

    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies in what `peft_tensors` returned. Keys and shapes have been checked before."""
        own = self.peft_tensors()
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name].reshape(tensor.shape))

    def learning_rate_factors(self) -> Mapping[str, float]:
        """Returns factors on the learning rate by parameter name; a parameter not named has 1."""
        return {}


class Shared(Part):
    """What all of a method's adapters share. One object, registered once, at the root of the model."""

    def see(self, task_ids: Tensor | None) -> None:
        """Takes note of what the next forward pass is about; called before each one.

        Args:
            task_ids: Number of each sample's task [B], or of each token's where samples lie end to end [1, T]; None
                where nothing tells the task.
        """


class Method(Part):
    """One adapter at one site. Subclasses live in `methods/<type>.py` and are made once for every site.

    `forward(base, x)` returns the adapted output [..., O] for the module's input `x`; at a `module` or `model`,
    `forward(base, *arguments, **named)` returns what that module returns.

    Persistent buffers are what training needs beside the parameters and what is saved (AdaLoRA's averages): they go
    into checkpoints and nowhere else. Buffers that follow from others are registered with `persistent=False`.
    """

    Config: ClassVar[type[MethodConfig]]
    default_learning_rate: ClassVar[float]
    peft_type: ClassVar[str]
    """`peft_type` of adapter_config.json; PEFT's own name wherever PEFT has the method."""
    own_peft_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields of `peft_config` that PEFT does not have, and that are written only where they are not the default."""
    place: ClassVar[Place] = "targets"
    kinds: ClassVar[frozenset[Kind]] = frozenset({"linear", "conv1d", "embedding"})
    """The kinds of modules that can be adapted, where `place` is `targets`."""
    tasks: ClassVar[frozenset[str] | None] = None
    """The values of `model.task` that the method can do; None for all."""
    starts_as_base: ClassVar[bool] = True
    """Whether a new adapter changes nothing: in float32 the model starts as its base, bit for bit."""
    default_head_learning_rate: ClassVar[float | None] = 5e-3
    """The learning rate of a new task head, which starts at random where adapters start at nothing; None: the same."""

    def __init__(self, config: Any, site: Site, seed: int, shared: Shared | None = None) -> None:
        super().__init__()
        self._shared = (shared,)  # in a tuple: as an attribute of its own, every adapter would own it

    # ---- what there is to train ----

    @classmethod
    def roles(cls, config: Any) -> tuple[str, ...]:
        """Returns the roles of the modules that `target_modules: auto` means; () where there is no such default."""
        return ()

    @classmethod
    def check(cls, config: Any, sites: list[Site]) -> list[str]:
        """Returns what is wrong with `config` at `sites`, one message each, `field: what`; needs no weights."""
        return []

    @classmethod
    def check_model(cls, config: Any, model: nn.Module) -> list[str]:
        """Returns what is wrong with `config` for the whole `model`, as `check` does; needs no weights."""
        return []

    @classmethod
    def check_steps(cls, config: Any, total_steps: int) -> list[str]:
        """Returns what is wrong with `config` for a training of `total_steps`, as `check` does."""
        return []

    @classmethod
    def prepare(cls, config: Any, facts: Facts) -> Any:
        """Returns `config` with what was left to be found in the data: a number of heads, the tokens of a text."""
        return config

    @classmethod
    def shared(cls, config: Any, sites: list[Site], seed: int) -> Shared | None:
        """Returns the tensors that the adapters at `sites` share, on the sites' device; None where they share none."""
        return None

    @classmethod
    def trains(cls, config: Any, parameter: str, owner: nn.Module) -> bool:
        """Returns whether the base parameter of that full name trains; `owner` is the module that holds it."""
        return False

    @classmethod
    def num_virtual_tokens(cls, config: Any) -> int:
        """Returns how many virtual tokens go in front of every sample: ids from the vocabulary's size upward."""
        return 0

    @classmethod
    def virtual_ids(cls, config: Any, vocabulary: int) -> list[tuple[int, ...]]:
        """Returns the ids of each prompt's virtual tokens, for a model of `vocabulary` ids.

        One prompt as a rule. With several, every sample is seen once with each of them: all samples with the first,
        then all with the second, so that what comes out is [prompts, samples, ..] by a reshape.
        """
        count = cls.num_virtual_tokens(config)
        return [tuple(range(vocabulary, vocabulary + count))] if count else []

    @classmethod
    def num_positions(cls, config: Any) -> int:
        """Returns how many of the model's positions every sample loses to the method."""
        return cls.num_virtual_tokens(config)

    # ---- training ----

    @classmethod
    def penalty(cls, config: Any, adapters: Collection[Any]) -> Tensor | None:
        """Returns what is added to the mean loss of every optimizer step, a scalar; None for nothing."""
        return None

    @classmethod
    def before_step(cls, config: Any, adapters: Mapping[str, Any]) -> None:
        """Changes the adapters' gradients once those of a whole step are there, before they are clipped."""

    @classmethod
    def after_step(cls, config: Any, adapters: Mapping[str, Any], step: int, total_steps: int) -> None:
        """Changes the adapters after optimizer step `step` (from 1), while their gradients are still there."""

    @classmethod
    def obstacle(cls, config: Any, feature: str) -> str | None:
        """Returns why the method cannot do `feature`; None where it can.

        Features: `checkpointing` (recomputing activations), `flat` (samples laid end to end in one row).
        """
        return None

    # ---- after training ----

    @classmethod
    def unmergeable(cls, config: Any) -> str | None:
        """Returns why no plain weight equals the adapted module; None where `merged` gives one."""
        return None

    def merged(self, weight: Tensor) -> Tensor:
        """Returns `W'` [O, I] in `weight`'s dtype: a plain module that holds it equals the adapted one in eval mode."""
        raise NotImplementedError

    def merged_bias(self, bias: Tensor) -> Tensor:
        """Returns `b'` [O] to go with `merged`."""
        return bias

    @classmethod
    def not_low_rank(cls, config: Any) -> str | None:
        """Returns why the adapter is not exactly a LoRA; None where `low_rank` gives its factors."""
        return "it is not a sum of the weight and a product of two thin matrices"

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """Returns `A` [r, I] and `B` [O, r] in float32 or wider with `W' = W + B A`."""
        raise NotImplementedError

    # ---- PEFT's files ----

    @classmethod
    def peft_key(cls, path: str, name: str) -> str:
        """Returns the key on file of the tensor that `peft_tensors` calls `name`, at the module `path`."""
        return f"base_model.model.{path}.{name}"

    @classmethod
    def peft_type_of(cls, config: Any) -> str:
        """Returns the `peft_type` to write; another than the class's where the adapter is then exactly that."""
        return cls.peft_type

    @classmethod
    def peft_config(cls, config: Any) -> dict[str, Any]:
        """Returns the method's own fields of PEFT's adapter_config.json."""
        raise NotImplementedError

    @classmethod
    def peft_fields(cls, adapters: Mapping[str, Any]) -> dict[str, Any]:
        """Returns those fields of `peft_config` that follow from where the `adapters`, by module path, sit."""
        return {}

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> Any:
        """Returns the `Config` that `fields` of an adapter_config.json describe, without the targets.

        Raises:
            ValueError: The file asks for something that this method does not do.
        """
        raise NotImplementedError

    @classmethod
    def tensors_to_peft(cls, tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
        """Returns a finished adapter's `tensors`, by their keys on file, in the form that `config` wants saved.

        Not asked for checkpoints, which training goes on from. `tensors_from_peft` turns it back.
        """
        return dict(tensors)

    @classmethod
    def tensors_from_peft(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns a file's `tensors` in the form that this method writes, where PEFT has several."""
        return dict(tensors)
