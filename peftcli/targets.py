"""Finds the modules that a method's configuration chooses in a model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peftcli import architectures
from peftcli.errors import PeftcliError, Problem, RecipeError, did_you_mean
from peftcli.methods._place import Kind, Site
from peftcli.methods._protocol import Method, MethodConfig, Part, Targets
from peftcli.sites import embedding_site, kind_of, make_site, model_site


def find_sites(model: nn.Module, method: type[Method], config: MethodConfig) -> list[Site]:
    """Returns the sites that `config` chooses in `model`, in the model's order. Works on the meta device.

    Raises:
        RecipeError: A name, pattern or layer matches nothing, or matches what cannot be adapted; all are listed.
    """
    if method.place == "input-embedding":
        return [_input_embedding(model)]
    if method.place == "model":
        return [model_site(model)]
    if method.place == "nowhere":
        return []
    assert isinstance(config, Targets)
    choice = _Choice(model, method, config)
    chosen = choice.chosen()
    if choice.problems:
        raise RecipeError.of(choice.problems)
    roles, width = architectures.roles_of(model), _width(model)
    made = []
    for name, module in choice.modules.items():
        if name in chosen:
            own = frozenset(roles.get(name, ()))
            made.append(make_site(name, module, own, width, result_is_kept=_is_kept(model, name, own)))
    return made


def _is_kept(model: nn.Module, name: str, roles: Collection[str]) -> bool:
    """Returns `result_is_kept` of the module called `name`.

    What reads a feed-forward's input goes into an activation or a product, which keep it. Where a sum or a rotation
    comes next, nothing keeps the result, and some models write into it. So do kernels that were put in their place.
    """
    caller = model.get_submodule(name.rpartition(".")[0])
    return "feed_forward_input" in roles and caller.forward.__module__.startswith("transformers.")


def _input_embedding(model: Any) -> Site:
    # An encoder reads with an embedding of its own: the one at the model's root may be no more than its weight.
    reader = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model
    embedding = reader.get_input_embeddings()
    if getattr(embedding, "weight", None) is None:
        raise RecipeError("method.type: this model reads no tokens, so it can have no virtual ones")
    name = next(name for name, module in model.named_modules() if module is embedding)
    return embedding_site(name, embedding)


def _width(model: Any) -> int:
    config = getattr(model, "config", None)
    return int(getattr(config.get_text_config(), "hidden_size", 0)) if config is not None else 0


def output_head(model: nn.Module) -> nn.Module | None:
    """Returns the module that maps hidden states to the vocabulary, or None where the model has none."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def task_heads(model: nn.Module) -> list[str]:
    """Returns the paths of what a task model has beside its base: a classifier, say; none for language models."""
    prefix = getattr(model, "base_model_prefix", "")
    if output_head(model) is not None or not prefix or not hasattr(model, prefix):
        return []
    return [
        name
        for name, child in model.named_children()
        if name != prefix and not isinstance(child, Part) and any(True for _ in child.parameters())
    ]


def always_dense(model: nn.Module, trained: Iterable[str] = ()) -> set[str]:
    """Returns the paths of modules that no quantisation may pack: heads, what `trained` names, and what its code needs.

    Some models cast to the dtype of a weight, as T5 does in its feed-forward; transformers lists those. A router is
    small, and another choice of experts is no rounding.
    """
    head, listed = output_head(model), getattr(model, "_keep_in_fp32_modules", None) or ()
    ends = [*task_heads(model), *listed, *trained]
    return routers(model) | {
        name for name, module in model.named_modules() if module is head or any(is_under(name, end) for end in ends)
    }


def routers(model: nn.Module) -> set[str]:
    """Returns the paths of the linear layers that send tokens to experts.

    They are in a module called `router`, or are gates beside the experts.
    """
    blocks = {name.removesuffix("experts") for name, _ in model.named_modules() if f".{name}".endswith(".experts")}
    return {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and (
            "router" in name.split(".")
            or any(re.fullmatch(rf"{re.escape(block)}(\w+_)?gate(\..+)?", name) for block in blocks)
        )
    }


def is_path_pattern(text: str) -> bool:
    """Returns whether one string is a pattern for whole paths, as it has a character that no module path has."""
    return re.search(r"[^\w.]", text) is not None


def path_test(entry: str, *, is_pattern: bool) -> re.Pattern[str]:
    """Returns what the whole path of a module matches that `entry`, a pattern or the end of a path, means.

    Raises:
        re.error: The pattern is none.
    """
    return re.compile(entry if is_pattern else rf"(.*\.)?{re.escape(entry)}")


def is_under(name: str, path: str) -> bool:
    """Returns whether the parameter or module `name` is, or is inside, the module that `path` or its end names."""
    return f".{path}." in f".{name}."


@dataclass
class _Choice:
    """The modules that a `Targets` chooses in a model, and what is wrong with it."""

    model: nn.Module
    method: type[Method]
    config: Targets
    problems: list[Problem] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.modules = dict(self.model.named_modules())
        head = output_head(self.model)
        self.heads = [name for name, module in self.modules.items() if module is head] + task_heads(self.model)
        kinds: set[Kind | None] = set(self.method.kinds)
        if "module" in kinds:
            kinds.add(None)  # what `kind_of` makes of a module without a weight to adapt
        self.adaptable = {name: module for name, module in self.modules.items() if kind_of(module) in kinds}

    def chosen(self) -> set[str]:
        """Returns the paths of the modules; notes every problem."""
        chosen = self._wanted()
        if self.config.exclude_modules is not None:
            chosen -= self._matching(self.config.exclude_modules, "exclude_modules")
        if self.config.layers is not None and chosen:
            chosen = self._in_layers(chosen, self.config.layers)
        for name in sorted(chosen):
            if any(is_under(name, head) for head in task_heads(self.model)):
                self._note(f"target_modules: {name} is part of the task's head, which trains in full as it is")
        if not chosen and not self.problems:
            self._note("target_modules: nothing is left to adapt", self._candidates())
        return chosen

    def _note(self, message: str, hint: str | None = None) -> None:
        self.problems.append(Problem(f"method.{message}", hint=hint))

    def _wanted(self) -> set[str]:
        wanted = self.config.target_modules
        if wanted == "all-linear":
            return {
                name
                for name, module in self.adaptable.items()
                if kind_of(module) not in ("embedding", None) and not any(is_under(name, head) for head in self.heads)
            }
        if wanted == "auto":
            return self._by_role()
        return self._matching(wanted, "target_modules")

    def _by_role(self) -> set[str]:
        """Returns the modules that the method's paper adapts, told from the architecture."""
        roles = self.method.roles(self.config)
        if not roles:
            self._note("target_modules: this method has no auto", "name the modules, or all-linear")
        chosen: set[str] = set()
        for role in roles:
            try:
                chosen |= set(architectures.modules_of(self.model, role))  # type: ignore[arg-type]
            except PeftcliError as error:
                self.problems += error.problems
        return chosen

    def _matching(self, wanted: str | list[str], field_name: str) -> set[str]:
        """Returns the adaptable modules that each entry of `wanted` matches; notes every entry that matches none."""
        chosen: set[str] = set()
        for entry in [wanted] if isinstance(wanted, str) else wanted:
            is_pattern = isinstance(wanted, str) and is_path_pattern(entry)
            try:
                test = path_test(entry, is_pattern=is_pattern)
            except re.error as error:
                self._note(f'{field_name}: "{entry}" is not a regular expression: {error}')
                continue
            matched = {name for name in self.modules if name and test.fullmatch(name)}
            # A module without a weight is only ever meant by its own name, never by a pattern over all of them.
            fits = {name for name in matched if name in self.adaptable and (self._has_weight(name) or not is_pattern)}
            self._note_mismatch(entry, field_name, matched, fits)
            chosen |= fits
        return chosen

    def _has_weight(self, name: str) -> bool:
        return kind_of(self.modules[name]) is not None

    def _note_mismatch(self, entry: str, field_name: str, matched: set[str], fits: set[str]) -> None:
        if not matched:
            leaves = sorted({name.rpartition(".")[2] for name in self.adaptable})
            hint, listing = did_you_mean(entry, leaves), self._candidates()
            self._note(f'{field_name}: no module matches "{entry}"', f"{hint} {listing}" if hint else listing)
        elif not fits:
            classes = ", ".join(sorted({type(self.modules[name]).__name__ for name in matched}))
            self._note(
                f'{field_name}: "{entry}" matches only {classes}, which cannot be adapted',
                "name linear layers or plain embeddings; " + self._candidates(),
            )

    def _candidates(self) -> str:
        """Returns the leaf names that could be named, with how many modules each has."""
        return _counted(name for name in self.adaptable if self._has_weight(name))

    def _in_layers(self, chosen: set[str], layers: list[int]) -> set[str]:
        """Returns the chosen modules whose path's first number is in `layers`; notes each layer that there is not."""
        numbered = {name: int(found[1]) for name in chosen if (found := re.search(r"(?:^|\.)(\d+)(?:\.|$)", name))}
        present = set(numbered.values())
        for layer in layers:
            if layer not in present:
                span = f"the adapted modules are in layers {min(present)} to {max(present)}" if present else None
                self._note(f"layers: there is no layer {layer}", span)
        return {name for name, layer in numbered.items() if layer in layers}


def _counted(names: Iterable[str]) -> str:
    counts = Counter(name.rpartition(".")[2] for name in names)
    return "the model has " + ", ".join(f"{leaf} ({count})" for leaf, count in counts.items())
