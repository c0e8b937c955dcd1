"""What a method is: its configuration, its adapters, and what it tells the run.

An adapter is middleware around one module's forward; merging is one function of the weight. Where it works it knows as
a `Site` and a `Base`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from peftcli.methods._place import Kind, Site

Place = Literal["targets", "input-embedding", "model", "nowhere"]
"""Where a method's adapters go: to the modules that `target_modules` choose, to the input embedding, around the whole
model, or nowhere, because the method trains parameters that are there already."""


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
