"""Merges an adapter into its base model's files: shard by shard, then proven against the adapted model.

A weight at a time is read from the base's safetensors, changed by the method's own `merged`, and written under the
same name in the same shard, so the result is the folder that transformers would have saved. No model is built for it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peftcli import files, models
from peftcli.checkpoint.adapter import BASE_PREFIX, SHARED_PREFIX, Adapter, require_fit
from peftcli.errors import ModelError
from peftcli.methods._protocol import Method, Shared, Site
from peftcli.quantization import companions_of, is_companion, unpack_stored, unrounded_inputs
from peftcli.targets import output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcli.quantization import Packing
    from peftcli.recipe import QuantizationSection

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md"}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far merged logits may be from the adapted model's, relative to the largest: the rounding of the stored dtype."""


@dataclass(frozen=True)
class Agreement:
    """How far two models' logits are from each other on the same prompts.

    Attributes:
        max_difference: The largest difference of two logits, relative to the largest logit.
        mean_divergence: The mean KL divergence of the next-token distributions, in nats.
        same_choice: The share of positions where both choose the same token.
        positions: How many positions were compared.
    """

    max_difference: float
    mean_divergence: float
    same_choice: float
    positions: int


def merge_files(
    base: Path,
    skeleton: PreTrainedModel,
    adapter: Adapter,
    target: Path,
    dtype: torch.dtype | None,
    packing: Packing | None = None,
    stored: QuantizationSection | None = None,
) -> int:
    """Writes the merged model into the existing, empty folder `target` and returns how many weights changed.

    Args:
        base: The base model's folder, with safetensors.
        skeleton: The base model on the meta device.
        adapter: What to merge.
        target: Where to write.
        dtype: The dtype of the merged weights; None keeps each as it is stored.
        packing: How the base was packed; its layers are written as what these stood for, adapted or not.
        stored: How the base's files themselves are packed; they are written as what they stand for.

    Raises:
        ModelError: The adapter does not fit, or an adapted weight is in none of the base's files.
    """
    files_of = _shards(base)
    weights = {key: shard for key, shard in files_of.items() if stored is None or not is_companion(key)}
    places = _Stored(skeleton, weights)
    changes = _Changes(skeleton, adapter, places, packing)
    untied = _tied_copies(skeleton, changes.weights, places)
    written: dict[str, str] = {}
    total_size = 0
    shards = sorted(set(weights.values()))
    for shard in shards:
        tensors: dict[str, Tensor] = {}
        for key, found in _read(base / shard):
            if key not in weights:
                continue
            tensor = found if stored is None else _unpacked(base, files_of, key, found, stored)
            merged = changes.of(key, tensor)
            for name, is_merged in untied.get(key, {changes.name_of(key): True}).items():
                tensors[name] = _stored(merged if is_merged else tensor, dtype or tensor.dtype, name)
        if shard == shards[-1]:
            kept = dtype or next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
            tensors |= {name: _stored(tensor, kept, name) for name, tensor in changes.new.items()}
        files.write_safetensors(target / shard, tensors, {"format": "pt"})
        written |= dict.fromkeys(tensors, shard)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    _copy_rest(base, target, dtype, {**changes.config(), **({"tie_word_embeddings": False} if untied else {})})
    if set(written.values()) != {SINGLE_FILE}:
        files.write_json(target / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": written})
    return changes.count


class _Changes:
    """What an adapter makes of each tensor in the base's files.

    Attributes:
        weights: The site whose weight is stored under each key.
        biases: The same of biases.
        whole: The parameters that the adapter holds in full, by stored key.
        new: Those of them that the base's files lack, such as a task's head, by name.
    """

    def __init__(
        self, skeleton: PreTrainedModel, adapter: Adapter, stored: _Stored, packing: Packing | None = None
    ) -> None:
        sites, trained = require_fit(skeleton, adapter)
        _refuse_both_tied(skeleton, sites)
        self.skeleton, self.adapter, self.stored = skeleton, adapter, stored
        self.weights = {stored.require(f"{site.name}.weight"): site for site in sites}
        biased = [site for site in sites if site.has_bias and adapter.method.merged_bias is not Method.merged_bias]
        self.biases = {stored.require(f"{site.name}.bias"): site for site in biased}
        self.packing = packing
        self.packed = {stored.require(f"{path}.weight") for path in packing.paths} if packing is not None else set()
        tensors = {name: adapter.tensors[BASE_PREFIX + name] for name in trained}
        keys = {name: stored.find(name) for name in trained}
        self.whole = {key: tensors[name] for name, key in keys.items() if key is not None}
        self.new = {name: tensors[name] for name, key in keys.items() if key is None}
        cpu = [replace(site, device=torch.device("cpu")) for site in sites]
        self.shared = adapter.method.shared(adapter.config, cpu, 0)
        if self.shared is not None:
            own = self.shared.peft_tensors()
            self.shared.load_peft_tensors({name: adapter.tensors[SHARED_PREFIX + name] for name in own})

    @property
    def count(self) -> int:
        """How many weights the merged model has that the base has not."""
        return len(self.weights) + len(self.whole) + len(self.new)

    def of(self, key: str, tensor: Tensor) -> Tensor:
        """Returns what the tensor stored under `key` becomes, in float32 or wider if it changes, laid out as it is."""
        if key in self.whole:
            return self.whole[key]
        if self.packing is not None and key in self.packed:
            tensor = self.packing.of(tensor)
        if key not in self.weights and key not in self.biases:
            return tensor
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        with torch.no_grad():
            if key in self.biases:
                merged = self._method(self.biases[key], wide).merged_bias(wide)
            else:
                site = self.weights[key]
                weight = wide if site.kind == "linear" else wide.t()
                merged = self._method(site, weight).merged(weight)
                merged = merged if site.kind == "linear" else merged.t()
        if not bool(torch.isfinite(merged).all()):
            raise ModelError(f"{key}: the merged weight holds values that are not finite")
        return merged

    def _method(self, site: Site, weight: Tensor) -> Method:
        """Returns the adapter at `site` with its tensors."""
        place = replace(site, device=torch.device("cpu"), dense=lambda: weight, run=None)
        return load_method(self.adapter, place, self.shared)

    def name_of(self, key: str) -> str:
        """Returns the name to store under: with the inner model's prefix where a head comes to stand beside it."""
        prefix = f"{self.skeleton.base_model_prefix}."
        is_inner = self.stored.names.get(key, "").startswith(prefix) and not key.startswith(prefix)
        return prefix + key if self.new and is_inner else key

    def config(self) -> dict[str, Any]:
        """Returns what the merged model's config.json says other than the base's."""
        config = self.skeleton.config
        if not self.new and config.problem_type is None:
            return {}
        names = ("id2label", "label2id", "problem_type", "pad_token_id")
        facts = {name: getattr(config, name) for name in names if hasattr(config, name)}
        return {"architectures": [type(self.skeleton).__name__], **facts}


def load_method(adapter: Adapter, site: Site, shared: Shared | None) -> Method:
    """Returns the adapter that `adapter` has at `site`, on its own, with its tensors."""
    method = adapter.method(adapter.config, site, 0, shared)
    names = method.peft_tensors()
    method.load_peft_tensors({name: adapter.tensors[adapter.method.peft_key(site.name, name)] for name in names})
    return method


def _shards(base: Path) -> dict[str, str]:
    """Returns which file of the folder holds each tensor; like transformers, one file goes before many."""
    if (base / SINGLE_FILE).is_file():
        with _opened(base / SINGLE_FILE) as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)
    if not (base / INDEX_FILE).is_file():
        raise ModelError(f"{base} has no {SINGLE_FILE} to merge into", hint="only safetensors are read")
    try:
        return dict(json.loads((base / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{base / INDEX_FILE} cannot be read: {error}") from error


def _unpacked(base: Path, shards: Mapping[str, str], key: str, tensor: Tensor, section: QuantizationSection) -> Tensor:
    """Returns what a tensor of a packed checkpoint stands for: itself, where nothing is stored beside it."""
    names = companions_of(key, shards)
    found: dict[str, Tensor] = {}
    for name, other in names.items():  # they may be in another shard
        with _opened(base / shards[other]) as file:
            found[name] = file.get_tensor(other)
    return unpack_stored(tensor, found, section) if found else tensor


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    with _opened(path) as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            yield key, file.get_tensor(key)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is missing or damaged: {error}", hint="get the base model's files again") from error


class _Stored:
    """Where the base's files keep the parameters of a model."""

    def __init__(self, skeleton: PreTrainedModel, shards: Mapping[str, str]) -> None:
        self.skeleton = skeleton
        self.names = models.names_in_model(skeleton, shards)
        self._keys = {name: key for key, name in self.names.items()}

    def find(self, name: str) -> str | None:
        """Returns the key under which the parameter `name` is stored; None where it is not.

        A tied head is stored as the embedding that it shares its weight with.
        """
        module, _, leaf = name.rpartition(".")
        if name not in self._keys and _is_tied(self.skeleton) and leaf == "weight":
            embedding = self.skeleton.get_input_embeddings()
            if self.skeleton.get_submodule(module) is output_head(self.skeleton):
                path = next(path for path, found in self.skeleton.named_modules() if found is embedding)
                return self._keys.get(f"{path}.weight")
        return self._keys.get(name)

    def require(self, name: str) -> str:
        """Returns the key under which the parameter `name` is stored, or raises a ModelError."""
        key = self.find(name)
        if key is None:
            raise ModelError(
                f"{name} is in none of the base model's files as it is",
                hint="this checkpoint's weights are laid out otherwise than its model's",
            )
        return key


def _is_tied(skeleton: PreTrainedModel) -> bool:
    tied = getattr(skeleton.config.get_text_config(), "tie_word_embeddings", False)
    return bool(tied) and output_head(skeleton) is not None


def _refuse_both_tied(skeleton: PreTrainedModel, sites: list[Site]) -> None:
    chosen = {site.name for site in sites}
    pair = (skeleton.get_input_embeddings(), output_head(skeleton))
    tied = {name for name, module in skeleton.named_modules() if any(module is one for one in pair)}
    if _is_tied(skeleton) and len(tied) == 2 and tied <= chosen:
        raise ModelError(
            f"{' and '.join(sorted(tied))} share one weight and both are adapted: it cannot be merged twice"
        )


def _tied_copies(skeleton: PreTrainedModel, keys: Mapping[str, Site], stored: _Stored) -> dict[str, dict[str, bool]]:
    """Returns, for a stored weight that two modules share and one of them adapts, what to write in its place.

    Training adapted one of the two and left the other; the merged folder therefore holds both, untied:
    stored key → {name to write: whether it is the merged one}.
    """
    if not _is_tied(skeleton):
        return {}
    names = {id(module): name for name, module in skeleton.named_modules()}
    embedding, head = names[id(skeleton.get_input_embeddings())], names[id(output_head(skeleton))]
    key = stored.require(f"{embedding}.weight")
    if key not in keys:
        return {}
    adapted = keys[key].name
    return {key: {key: adapted == embedding, f"{head}.weight": adapted == head}}


def _stored(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Returns `tensor` as it is written: floating-point numbers in `dtype`, rounded this once."""
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype).contiguous()
    if bool((torch.isfinite(tensor) & ~torch.isfinite(stored)).any()):
        raise ModelError(f"{name} holds values that are too large for {str(dtype).removeprefix('torch.')}")
    return stored


def _copy_rest(base: Path, target: Path, dtype: torch.dtype | None, changes: Mapping[str, Any]) -> None:
    """Copies what belongs to the model beside its weights, and states in config.json what has changed."""
    for path in sorted(base.iterdir()):
        skipped = path.suffix in NOT_COPIED or path.name == INDEX_FILE or path.name.startswith(".")
        if path.is_file() and not skipped:
            shutil.copyfile(path, target / path.name)
    config: dict[str, Any] = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)  # nothing is packed in it
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    files.write_json(target / "config.json", {**config, **changes})


def stored_dtype(folder: Path) -> torch.dtype:
    """Returns the dtype of the first floating-point weight in a model's folder."""
    for shard in sorted(set(_shards(folder).values())):
        for _, tensor in _read(folder / shard):
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


@torch.no_grad()
def logits_of(
    model: nn.Module, inputs: list[dict[str, Tensor]], device: torch.device, *, rounded: bool = False
) -> list[Tensor]:
    """Returns the logits of each of `inputs`, the forward's arguments for one sample, in float32 on the CPU.

    They are [L, V] of a text's tokens, and [1, K] of a whole sample's labels. Layers in int8 do not round their inputs
    for it unless `rounded` asks for the model as it runs: it is weights that are compared.
    """
    model.eval()
    with contextlib.nullcontext() if rounded else unrounded_inputs(model):
        outputs = (model(**{name: one.to(device) for name, one in given.items()}).logits[0] for given in inputs)
        return [logits.reshape(-1, logits.shape[-1]).float().cpu() for logits in outputs]


def compare(expected: list[Tensor], found: list[Tensor]) -> Agreement:
    """Returns how far `found` is from `expected`, prompt by prompt [L, V]."""
    positions = sum(len(logits) for logits in expected)
    largest = max(float(logits.abs().max()) for logits in expected)
    pairs = list(zip(expected, found, strict=True))
    kl = sum(
        float(nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum"))
        for a, b in pairs
    )
    return Agreement(
        max(float((a - b).abs().max()) for a, b in pairs) / largest,
        max(0.0, kl / positions),  # rounding can leave it a hair below
        sum(float((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in pairs) / positions,
        positions,
    )


def require_agreement(agreement: Agreement, *dtypes: torch.dtype) -> None:
    """Raises a ModelError where the merged model is further from the adapted one than rounding explains.

    Args:
        agreement: How far they are apart.
        dtypes: What the merged weights are rounded to, and what the adapted model computes in.
    """
    dtype = max(dtypes, key=lambda one: TOLERANCE.get(one, 0))
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
    if not agreement.max_difference <= tolerance:  # NaN fails too
        raise ModelError(
            f"the merged model differs from base and adapter by {agreement.max_difference:.2e} of the largest logit, "
            f"more than the {tolerance:.0e} that {str(dtype).removeprefix('torch.')} allows; nothing was written",
            hint="merge with --dtype float32, or check that the adapter belongs to this base",
        )
