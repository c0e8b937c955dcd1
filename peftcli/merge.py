"""Merges an adapter into its base model's files: shard by shard, then proven against the adapted model.

A weight at a time is read from the base's safetensors, changed by the method's own `merged`, and written under the
same name in the same shard, so the result is the folder that transformers would have saved. No model is built for it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peftcli import files, inject
from peftcli.checkpoint.adapter import KEY_PREFIX, Adapter, require_fit
from peftcli.errors import ModelError
from peftcli.methods._protocol import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    base: Path, skeleton: PreTrainedModel, adapter: Adapter, target: Path, dtype: torch.dtype | None
) -> int:
    """Writes the merged model into the existing, empty folder `target` and returns how many weights changed.

    Args:
        base: The base model's folder, with safetensors.
        skeleton: The base model on the meta device.
        adapter: What to merge.
        target: Where to write.
        dtype: The dtype of the merged weights; None keeps each as it is stored.

    Raises:
        ModelError: The adapter does not fit, or an adapted weight is in none of the base's files.
    """
    weights = _shards(base)
    sites = require_fit(skeleton, adapter)
    _refuse_both_tied(skeleton, sites)
    keys = {_stored_key(site.name, skeleton, weights): site for site in sites}
    untied = _tied_copies(skeleton, keys, weights)
    written: dict[str, str] = {}
    total_size = 0
    for shard in sorted(set(weights.values())):
        tensors: dict[str, Tensor] = {}
        for key, tensor in _read(base / shard):
            merged = _merged(tensor, keys[key], adapter) if key in keys else tensor
            for name, is_merged in untied.get(key, {key: True}).items():
                tensors[name] = _stored(merged if is_merged else tensor, dtype or tensor.dtype, name)
        files.write_safetensors(target / shard, tensors, {"format": "pt"})
        written |= dict.fromkeys(tensors, shard)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    _copy_rest(base, target, dtype, untie=bool(untied))
    if set(written.values()) != {SINGLE_FILE}:
        files.write_json(target / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": written})
    return len(keys)


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


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    with _opened(path) as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            yield key, file.get_tensor(key)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is missing or damaged: {error}", hint="get the base model's files again") from error


def _stored_key(module: str, skeleton: PreTrainedModel, weights: Mapping[str, str]) -> str:
    """Returns the key under which a module's weight is stored.

    Some checkpoints leave out the name of the inner model (`h.0…` for `transformer.h.0…`), and a tied head is stored
    as the embedding that it shares its weight with.
    """
    name = f"{module}.weight"
    prefix = f"{skeleton.base_model_prefix}."
    candidates = [name, name.removeprefix(prefix), prefix + name]
    head, embedding = inject.output_head(skeleton), skeleton.get_input_embeddings()
    if _is_tied(skeleton) and skeleton.get_submodule(module) is head:
        path = next(path for path, found in skeleton.named_modules() if found is embedding)
        candidates += [f"{path}.weight", f"{path}.weight".removeprefix(prefix)]
    for candidate in candidates:
        if candidate in weights:
            return candidate
    raise ModelError(
        f"{name} is in none of the base model's files", hint="this checkpoint's names differ from its model's"
    )


def _is_tied(skeleton: PreTrainedModel) -> bool:
    return bool(getattr(skeleton.config.get_text_config(), "tie_word_embeddings", False))


def _refuse_both_tied(skeleton: PreTrainedModel, sites: list[Site]) -> None:
    chosen = {site.name for site in sites}
    pair = (skeleton.get_input_embeddings(), inject.output_head(skeleton))
    tied = {name for name, module in skeleton.named_modules() if any(module is one for one in pair)}
    if _is_tied(skeleton) and len(tied) == 2 and tied <= chosen:
        raise ModelError(
            f"{' and '.join(sorted(tied))} share one weight and both are adapted: it cannot be merged twice"
        )


def _tied_copies(
    skeleton: PreTrainedModel, keys: Mapping[str, Site], weights: Mapping[str, str]
) -> dict[str, dict[str, bool]]:
    """Returns, for a stored weight that two modules share and one of them adapts, what to write in its place.

    Training adapted one of the two and left the other; the merged folder therefore holds both, untied:
    stored key → {name to write: whether it is the merged one}.
    """
    if not _is_tied(skeleton):
        return {}
    names = {id(module): name for name, module in skeleton.named_modules()}
    embedding, head = names[id(skeleton.get_input_embeddings())], names[id(inject.output_head(skeleton))]
    key = _stored_key(embedding, skeleton, weights)
    if key not in keys:
        return {}
    adapted = keys[key].name
    return {key: {key: adapted == embedding, f"{head}.weight": adapted == head}}


def _merged(tensor: Tensor, site: Site, adapter: Adapter) -> Tensor:
    """Returns the merged weight in float32 or wider, laid out as `tensor` is."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    weight = wide if site.kind == "linear" else wide.t()
    place = replace(site, device=torch.device("cpu"), dense=lambda: weight)
    method = adapter.method(adapter.config, place, 0)
    prefix = f"{KEY_PREFIX}{site.name}."
    method.load_peft_tensors({name: adapter.tensors[prefix + name] for name in method.peft_tensors()})
    with torch.no_grad():
        merged = method.merged(weight)
    if not bool(torch.isfinite(merged).all()):
        raise ModelError(f"{site.name}: the merged weight holds values that are not finite")
    return merged if site.kind == "linear" else merged.t()


def _stored(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Returns `tensor` as it is written: floating-point numbers in `dtype`, rounded this once."""
    if not tensor.is_floating_point():
        return tensor
    stored = tensor.to(dtype).contiguous()
    if bool((torch.isfinite(tensor) & ~torch.isfinite(stored)).any()):
        raise ModelError(f"{name} holds values that are too large for {str(dtype).removeprefix('torch.')}")
    return stored


def _copy_rest(base: Path, target: Path, dtype: torch.dtype | None, *, untie: bool) -> None:
    """Copies what belongs to the model beside its weights, and states in config.json what has changed."""
    for path in sorted(base.iterdir()):
        skipped = path.suffix in NOT_COPIED or path.name == INDEX_FILE or path.name.startswith(".")
        if path.is_file() and not skipped:
            shutil.copyfile(path, target / path.name)
    config: dict[str, Any] = json.loads((target / "config.json").read_text(encoding="utf-8"))
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    if untie:
        config["tie_word_embeddings"] = False
    files.write_json(target / "config.json", config)


def stored_dtype(folder: Path) -> torch.dtype:
    """Returns the dtype of the first floating-point weight in a model's folder."""
    for shard in sorted(set(_shards(folder).values())):
        for _, tensor in _read(folder / shard):
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


@torch.no_grad()
def logits_of(model: nn.Module, prompts: list[list[int]], device: torch.device) -> list[Tensor]:
    """Returns the logits [L, V] of each prompt, in float32 on the CPU."""
    model.eval()
    return [
        model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu() for ids in prompts
    ]


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


def require_agreement(agreement: Agreement, dtype: torch.dtype) -> None:
    """Raises a ModelError where the merged model is further from the adapted one than `dtype`'s rounding explains."""
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
    if not agreement.max_difference <= tolerance:  # NaN fails too
        raise ModelError(
            f"the merged model differs from base and adapter by {agreement.max_difference:.2e} of the largest logit, "
            f"more than the {tolerance:.0e} that {str(dtype).removeprefix('torch.')} allows; nothing was written",
            hint="merge with --dtype float32, or check that the adapter belongs to this base",
        )
