"""Checkpoints that are packed as they are stored, by bitsandbytes through transformers' `save_pretrained`."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from peftcli.errors import ModelError
from peftcli.quantization.layers import bitsandbytes, compute_dtype, settle_4_bits
from peftcli.quantization.weights import is_int8, is_quantised, unpack_8_bits
from peftcli.recipe import QuantizationSection

_COMPANION = re.compile(
    r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)$|\.(SCB|weight_format)$"
)


def stored_fields(config: Any) -> dict[str, Any]:
    """Returns a model configuration's `quantization_config` as it is on file; {} where it has none."""
    found = getattr(config, "quantization_config", None)
    return dict(found if isinstance(found, Mapping) else found.to_dict()) if found is not None else {}


def stored_section(config: Any, name: str) -> QuantizationSection | None:
    """Returns how the weights of a checkpoint are packed as they come; None where they are dense.

    Args:
        config: The model's configuration.
        name: What the model is called, for messages.

    Raises:
        ModelError: They are packed by something other than bitsandbytes.
    """
    fields = stored_fields(config)
    if not fields:
        return None
    method = fields.get("quant_method", "bitsandbytes")
    try:
        section = _section_of(fields) if method == "bitsandbytes" else None
    except ValidationError:
        section = None
    if section is None:
        raise ModelError(
            f"model.name: {name} comes quantised by {method}, in a form that is not trained on here",
            hint="name the model that it was made from, and hold that in 4 bits with quantization: {type: nf4}",
        )
    return section


def _section_of(fields: Mapping[str, Any]) -> QuantizationSection | None:
    """Returns what the fields of transformers' BitsAndBytesConfig say; None where it is not what layers here can be."""
    in_8_bits, in_4_bits = (bool(fields.get(f"load_in_{bits}bit")) for bits in (8, 4))
    if in_8_bits == in_4_bits or fields.get("llm_int8_has_fp16_weight"):
        return None
    if in_8_bits:
        return QuantizationSection(type="int8", outlier_threshold=float(fields.get("llm_int8_threshold", 6.0)))
    return QuantizationSection(
        type=fields.get("bnb_4bit_quant_type", "fp4"),
        double_quant=bool(fields.get("bnb_4bit_use_double_quant", False)),
        storage_dtype=fields.get("bnb_4bit_quant_storage") or "uint8",
    )


def adopt(
    model: nn.Module, section: QuantizationSection, paths: Collection[str], dtype: torch.dtype, device: torch.device
) -> None:
    """Makes the packed layers of a loaded checkpoint what `quantize` makes, and the rest of the model `dtype`.

    Args:
        model: The model as transformers loaded it.
        section: How it is packed, and is to compute.
        paths: The layers that are.
        dtype: The dtype of all that is not packed: transformers leaves what is called `weight` as it is stored.
        device: Where the model is.

    Raises:
        ModelError: Other layers are packed than the checkpoint's configuration says.
    """
    packed = {name: module for name, module in model.named_modules() if is_quantised(module)}
    odd = {name for name, module in packed.items() if not _is_whole(module)} | (set(paths) ^ set(packed))
    if odd:
        raise ModelError(
            f"model.name: the checkpoint and its configuration disagree on whether {min(odd)} is packed",
            hint="it was not saved by transformers' save_pretrained, or its config.json is another model's",
        )
    for layer in packed.values():
        del layer.source_cls  # transformers' mark of what was replaced
        _adopt_8_bits(layer, section) if is_int8(layer) else _adopt_4_bits(layer, section, device)
    _forget_loading(model)
    weights = {id(layer.weight) for layer in packed.values()}
    wide = getattr(model, "_keep_in_fp32_modules", None) or ()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and id(parameter) not in weights:
            is_kept = any(f".{one}." in f".{name}." for one in wide)
            parameter.data = parameter.data.to(torch.float32 if is_kept else dtype)


def _forget_loading(model: nn.Module) -> None:
    """Removes transformers' marks of how `model` was loaded, by which Accelerate would refuse to train it here."""
    marks = ("hf_device_map", "hf_quantizer", "quantization_method", "is_quantized")
    for mark in (*marks, "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(model).pop(mark, None)


def _is_whole(layer: Any) -> bool:
    """Returns whether a packed layer was given packed weights with their scales."""
    if is_int8(layer):
        return layer.weight.dtype == torch.int8 and layer.weight.SCB is not None
    return getattr(layer.weight, "quant_state", None) is not None


def _adopt_4_bits(layer: Any, section: QuantizationSection, device: torch.device) -> None:
    layer.weight.module = None  # the weight would hold its own layer
    layer.weight.data = layer.weight.data.flatten().view(getattr(torch, section.storage_dtype))[:, None]
    layer.weight.quant_storage = layer.quant_storage = layer.weight.dtype
    layer.weight.quant_state.dtype = compute_dtype(section, device)
    settle_4_bits(layer, section, device)


def _adopt_8_bits(layer: Any, section: QuantizationSection) -> None:
    layer.state.threshold, layer.state.use_pool = section.outlier_threshold, section.outlier_threshold > 0
    layer.init_8bit_state()


def is_companion(key: str) -> bool:
    """Returns whether a key of a checkpoint is what belongs to a packed weight: its scales, their codes, its shape."""
    return _COMPANION.search(key) is not None


def companions_of(key: str, keys: Collection[str]) -> dict[str, str]:
    """Returns the keys, of `keys`, that belong to the weight stored under `key`, by what each is of it."""
    layer = key.removesuffix("weight")
    names = {other: other.removeprefix(f"{key}.") for other in keys if other.startswith(f"{key}.")}
    names |= {f"{layer}{name}": name for name in ("SCB", "weight_format") if f"{layer}{name}" in keys}
    return {name: other for other, name in names.items() if is_companion(other)}


def unpack_stored(weight: Tensor, companions: Mapping[str, Tensor], section: QuantizationSection) -> Tensor:
    """Returns what a stored weight stands for [O, I], in the dtype that its layer computes in on a CPU."""
    if "SCB" in companions:
        return unpack_8_bits(weight, companions["SCB"])
    functional = bitsandbytes().functional
    state = functional.QuantState.from_dict(dict(companions), device=weight.device)
    state.dtype = compute_dtype(section, weight.device)
    dense: Tensor = functional.dequantize_4bit(weight, state)
    return dense
