"""Makes packed layers of dense ones."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcli.errors import ModelError

if TYPE_CHECKING:
    from peftcli.recipe import QuantizationSection


def packable(model: nn.Module, keep: Collection[str] = ()) -> list[str]:
    """Returns the paths of the linear layers of `model` that are not in `keep`. Works on the meta device.

    A subclass of `nn.Linear` is none of them: what else it does would be lost with it.
    """
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and name not in keep]


def quantize(
    model: nn.Module,
    section: QuantizationSection,
    keep: Collection[str] = (),
    device: torch.device | None = None,
    hold_on: torch.device | None = None,
) -> int:
    """Packs the weights of the linear layers of `model` as `section` says, and returns how many layers these are.

    A dense weight is let go as soon as it is packed, so that there is never more than one of them beside the result.

    Args:
        model: The base model with its weights, nothing grafted onto it.
        section: How to pack them.
        keep: Paths of linear layers that stay as they are.
        device: Where they are packed and will compute; None: where each is.
        hold_on: Where the packed weights lie until then; None: there.

    Raises:
        ModelError: The model has no linear layer.
    """
    names = packable(model, keep)
    if not names:
        raise ModelError(f"quantization: this model has no linear layers to hold in {section.type}")
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        layer = _packed(module, section, device or module.weight.device)
        model.set_submodule(name, layer if hold_on is None else _held_on(layer, hold_on))
    return len(names)


def _packed(linear: nn.Linear, section: QuantizationSection, device: torch.device) -> nn.Linear:
    """Returns a packed layer in place of `linear`, with its bias, on `device`."""
    layer = (_in_8_bits if section.type == "int8" else _in_4_bits)(linear, section, device)
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=linear.bias.requires_grad)
    return layer.train(linear.training)


def _held_on(layer: Any, device: torch.device) -> nn.Linear:
    """Returns a layer of 4 bits with its bytes, and how they are to be read, on another device."""
    layer.weight = layer.weight.to(device)
    layer.quant_state = layer.weight.quant_state
    moved: nn.Linear = layer
    return moved


def _in_4_bits(linear: nn.Linear, section: QuantizationSection, device: torch.device) -> nn.Linear:
    with torch.device("meta"):  # its own weight would be drawn at random only to be replaced
        layer: Any = bitsandbytes().nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            quant_type=section.type,
            quant_storage=getattr(torch, section.storage_dtype),
        )
    layer.weight = pack_4_bits(linear.weight, section, device)
    settle_4_bits(layer, section, device)
    packed: nn.Linear = layer
    return packed


def settle_4_bits(layer: Any, section: QuantizationSection, device: torch.device) -> None:
    """Makes a packed layer compute on `device` as `section` says, in evaluation as in training."""
    layer.quant_state = layer.weight.quant_state
    layer.compute_dtype, layer.compute_type_is_set = compute_dtype(section, device), True
    # On a CPU it would lay the weights out anew in evaluation mode, and compute in bfloat16 whatever is asked for.
    layer.support_avx512bf16_for_cpu = False


def pack_4_bits(weight: Tensor, section: QuantizationSection, device: torch.device) -> Any:
    """Returns `weight` [O, I] as bitsandbytes' packed parameter on `device`, where it is packed."""
    dense = bitsandbytes().nn.Params4bit(
        weight.detach(),
        requires_grad=False,
        quant_type=section.type,
        compress_statistics=section.double_quant,
        quant_storage=getattr(torch, section.storage_dtype),
    )
    packed = dense.to(device)
    # The forward pass unpacks to what it computes in; the backward pass would go by the dtype that was packed.
    packed.quant_state.dtype = compute_dtype(section, device)
    return packed


def _in_8_bits(linear: nn.Linear, section: QuantizationSection, device: torch.device) -> nn.Linear:
    with torch.device("meta"):
        layer: Any = bitsandbytes().nn.Linear8bitLt(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=section.outlier_threshold,
        )
    layer.weight = pack_8_bits(linear.weight, device)
    layer.init_8bit_state()  # the first forward pass would: scales belong in one place from the start
    packed: nn.Linear = layer
    return packed


def pack_8_bits(weight: Tensor, device: torch.device) -> Any:
    """Returns `weight` [O, I] as bitsandbytes' int8 parameter on `device`; float16 is what it is rounded from."""
    half = weight.detach().to(device, torch.float16).contiguous()
    packed, scales, _ = bitsandbytes().functional.int8_vectorwise_quant(half)
    return bitsandbytes().nn.Int8Params(packed, requires_grad=False, has_fp16_weights=False, CB=packed, SCB=scales)


def bitsandbytes() -> Any:
    """Returns bitsandbytes, imported without what it warns of that is meant to be so.

    That is a missing kernel, whose layout is not used here, and at each product that int8 takes inputs in float16.
    """
    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import bitsandbytes as library

    return library


def compute_dtype(section: QuantizationSection, device: torch.device) -> torch.dtype:
    """Returns the dtype that packed layers compute in on `device`: bfloat16 for `auto` where the hardware has it."""
    if section.compute_dtype != "auto":
        chosen: torch.dtype = getattr(torch, section.compute_dtype)
        return chosen
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_it else torch.float32
