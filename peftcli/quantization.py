"""Holds the base's linear layers in 4 bits, as bitsandbytes packs them, and says what weight a packed layer stands for.

QLoRA: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, sections 2 and 3:

    y = x deq(W_q)ᵀ + b        deq(W_q) [O, I] = code[q] · absmax, q in 4 bits, one absmax for 64 weights in a row

With double quantisation absmax is itself held in 8 bits: 4.127 bits a weight instead of 4.5. Gradients flow through
deq(W_q) to the inputs and never into W_q: what is packed does not change.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
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
    model: nn.Module, section: QuantizationSection, keep: Collection[str] = (), device: torch.device | None = None
) -> int:
    """Packs the weights of the linear layers of `model` into 4 bits, and returns how many layers these are.

    A dense weight is let go as soon as it is packed, so that there is never more than one of them beside the result.

    Args:
        model: The base model with its weights, nothing grafted onto it.
        section: How to pack them.
        keep: Paths of linear layers that stay as they are.
        device: Where the packed weights go; None: where each is.

    Raises:
        ModelError: The model has no linear layer.
    """
    names = packable(model, keep)
    if not names:
        raise ModelError("quantization: this model has no linear layers to hold in 4 bits", hint="remove the section")
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, nn.Linear)
        model.set_submodule(name, _packed(module, section, device or module.weight.device))
    return len(names)


def _packed(linear: nn.Linear, section: QuantizationSection, device: torch.device) -> nn.Linear:
    """Returns a packed layer in place of `linear`, with its bias, on `device`."""
    with torch.device("meta"):  # its own weight would be drawn at random only to be replaced
        layer: Any = _layers().Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=compute_dtype(section, device),
            quant_type=section.type,
        )
    layer.weight = _pack(linear.weight, section, device)
    layer.quant_state = layer.weight.quant_state
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().to(device), requires_grad=linear.bias.requires_grad)
    # On a CPU it would lay the weights out anew in evaluation mode, and compute in bfloat16 whatever is asked for.
    layer.support_avx512bf16_for_cpu = False
    packed: nn.Linear = layer.train(linear.training)
    return packed


def _pack(weight: Tensor, section: QuantizationSection, device: torch.device) -> Any:
    """Returns `weight` [O, I] as bitsandbytes' packed parameter on `device`, where it is packed."""
    dense = _layers().Params4bit(
        weight.detach(), requires_grad=False, quant_type=section.type, compress_statistics=section.double_quant
    )
    return dense.to(device)


def _layers() -> Any:
    """Returns bitsandbytes' layers, imported without its warning of a missing kernel, whose layout is not used here."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes.nn


def compute_dtype(section: QuantizationSection, device: torch.device) -> torch.dtype:
    """Returns the dtype that packed layers compute in on `device`: bfloat16 for `auto` where the hardware has it."""
    if section.compute_dtype != "auto":
        chosen: torch.dtype = getattr(torch, section.compute_dtype)
        return chosen
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_it else torch.float32


@dataclass(frozen=True)
class Packing:
    """Which linear layers of a model are packed, and how.

    Attributes:
        section: How.
        paths: The layers.
        dtype: The dtype that weights are loaded in before they are packed.
    """

    section: QuantizationSection
    paths: tuple[str, ...]
    dtype: torch.dtype

    def of(self, weight: Tensor) -> Tensor:
        """Returns the weight [O, I] that a layer of the stored `weight` computes with, in `dtype`."""
        return _unpacked_weight(_pack(weight.to(self.dtype), self.section, weight.device))


def is_quantised(module: nn.Module) -> bool:
    """Returns whether `module` is one of bitsandbytes' linear layers, whose weight is packed."""
    own_class: Any = getattr(type(module), "grafted_from", type(module))
    return own_class.__module__.startswith("bitsandbytes.") and isinstance(module, nn.Linear)


def unpacked(module: Any) -> Tensor:
    """Returns the weight [O, I] that a packed layer stands for, detached."""
    return _unpacked_weight(module.weight)


def _unpacked_weight(weight: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    if weight.dtype == torch.int8:
        dense: Tensor = int8_vectorwise_dequant(weight.data, weight.SCB)
    else:
        dense = dequantize_4bit(weight.data, weight.quant_state)
    return dense.detach()


def num_weights(parameter: Tensor) -> int:
    """Returns how many numbers `parameter` stands for: a packed one holds two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def require_exact_biases(model: nn.Module) -> None:
    """Raises a ModelError where a bias trains that its packed layer would round to half precision as it computes."""
    for name, module in model.named_modules():
        bias = getattr(module, "bias", None)
        if is_quantised(module) and bias is not None and bias.requires_grad and module.compute_dtype != torch.float32:
            chosen = str(module.compute_dtype).removeprefix("torch.")
            raise ModelError(
                f"quantization.compute_dtype: {name}.bias trains, and {chosen} would round its steps away",
                hint="set quantization.compute_dtype to float32",
            )
