"""What an adapter makes of each tensor in the base's files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftcli.checkpoint.adapter import BASE_PREFIX, SHARED_PREFIX, Adapter, is_finite, require_fit
from peftcli.errors import ModelError
from peftcli.merge.sources import Sources
from peftcli.merge.stored import is_tied
from peftcli.methods._place import Site
from peftcli.methods._protocol import Method
from peftcli.targets import output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcli.merge.proof import LayerProof


class Changes:
    """What an adapter makes of each tensor in the base's files.

    Attributes:
        weights: The site whose weight is stored under each key.
        biases: The same of biases, where the method changes them.
        whole: The parameters that the adapter holds in full, by stored key.
        new: Those of them that the base's files lack, such as a task's head, by name.
    """

    def __init__(self, skeleton: PreTrainedModel, adapter: Adapter, sources: Sources, proof: LayerProof | None) -> None:
        sites, trained = require_fit(skeleton, adapter)
        _refuse_both_tied(skeleton, sites)
        self.skeleton, self.adapter, self.sources, self.proof = skeleton, adapter, sources, proof
        stored = self.stored = sources.stored
        self.weights = {stored.require(f"{site.name}.weight"): site for site in sites}
        biased = [site for site in sites if site.has_bias and adapter.method.merged_bias is not Method.merged_bias]
        self.biases = {stored.require(f"{site.name}.bias"): site for site in biased}
        self.trained = {name: adapter.tensors[BASE_PREFIX + name] for name in trained}
        keys = {name: stored.find(name) for name in trained}
        self.whole = {key: self.trained[name] for name, key in keys.items() if key is not None}
        self.new = {name: self.trained[name] for name, key in keys.items() if key is None}
        cpu = [replace(site, device=torch.device("cpu")) for site in sites]
        self.shared = adapter.method.shared(adapter.config, cpu, 0)
        if self.shared is not None:
            own = self.shared.peft_tensors()
            self.shared.load_peft_tensors({name: adapter.tensors[SHARED_PREFIX + name] for name in own})

    @property
    def count(self) -> int:
        """How many weights the merged model has that the base has not."""
        return len(self.weights) + len(self.whole) + len(self.new)

    def __contains__(self, key: str) -> bool:
        """Returns whether the tensor stored under `key` becomes another."""
        return key in self.weights or key in self.biases or key in self.whole

    @torch.no_grad()
    def of(self, key: str) -> Tensor:
        """Returns what the changed tensor stored under `key` becomes, in float32 or wider, laid out as it is.

        Raises:
            ModelError: The result is not finite, or not what the adapted layer computes.
        """
        if key in self.whole:
            return self.whole[key]
        old = widened(self.sources.read(key))
        self.sources.entries[key].require_finite(old)
        site = self.biases.get(key) or self.weights[key]
        if key in self.biases:
            new = self._method(site, old).merged_bias(old)
        else:
            weight = old if site.kind == "linear" else old.t()
            method = self._method(site, weight)
            merged = method.merged(weight)
            new = merged if site.kind == "linear" else merged.t()
        if not is_finite(new):
            raise ModelError(f"{key}: the merged weight holds values that are not finite")
        if self.proof is not None and key in self.weights:
            bias = self._bias(site)
            merged_bias = bias if bias is None else method.merged_bias(bias)
            module = self.skeleton.get_submodule(site.name)
            self.proof.check(site, module, method, (old, bias), (new, merged_bias))
        return new

    def _method(self, site: Site, weight: Tensor) -> Method:
        """Returns the adapter at `site`, on its own, with its tensors."""
        place = replace(site, device=torch.device("cpu"), dense=lambda: weight, run=None)
        adapter = self.adapter
        method = adapter.method(adapter.config, place, 0, self.shared)
        names = method.peft_tensors()
        method.load_peft_tensors({name: adapter.tensors[adapter.method.peft_key(site.name, name)] for name in names})
        return method

    def _bias(self, site: Site) -> Tensor | None:
        """Returns the bias at `site` before an adapter changes it; None where it has none."""
        name = f"{site.name}.bias"
        if not site.has_bias:
            return None
        return widened(self.trained[name] if name in self.trained else self.sources.read(self.stored.require(name)))

    def name_of(self, key: str) -> str:
        """Returns the name to store under: with the inner model's prefix where a head comes to stand beside it."""
        prefix = f"{self.skeleton.base_model_prefix}."
        is_inner = self.stored.names.get(key, "").startswith(prefix) and not key.startswith(prefix)
        return prefix + key if self.new and is_inner else key

    def untied(self) -> dict[str, dict[str, bool]]:
        """Returns, for a stored weight that two modules share and one of them adapts, what to write in its place.

        Training adapted one of the two and left the other; the merged folder therefore holds both, untied:
        stored key → {name to write: whether it is the merged one}.
        """
        if not is_tied(self.skeleton):
            return {}
        names = {id(module): name for name, module in self.skeleton.named_modules()}
        embedding = names[id(self.skeleton.get_input_embeddings())]
        head = names[id(output_head(self.skeleton))]
        key = self.stored.require(f"{embedding}.weight")
        if key not in self.weights:
            return {}
        adapted = self.weights[key].name
        return {key: {key: adapted == embedding, f"{head}.weight": adapted == head}}

    def config(self) -> Mapping[str, Any]:
        """Returns what the merged model's config.json says other than the base's."""
        config = self.skeleton.config
        if not self.new and config.problem_type is None:
            return {}
        names = ("id2label", "label2id", "problem_type", "pad_token_id")
        facts = {name: getattr(config, name) for name in names if hasattr(config, name)}
        return {"architectures": [type(self.skeleton).__name__], **facts}


def widened(tensor: Tensor) -> Tensor:
    """Returns `tensor` in float32 or wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _refuse_both_tied(skeleton: PreTrainedModel, sites: list[Site]) -> None:
    chosen = {site.name for site in sites}
    pair = (skeleton.get_input_embeddings(), output_head(skeleton))
    tied = {name for name, module in skeleton.named_modules() if any(module is one for one in pair)}
    if is_tied(skeleton) and len(tied) == 2 and tied <= chosen:
        raise ModelError(
            f"{' and '.join(sorted(tied))} share one weight and both are adapted: it cannot be merged twice"
        )
