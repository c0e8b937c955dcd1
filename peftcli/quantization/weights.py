"""What packed layers stand for, and what may be done with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcli.errors import ModelError
from peftcli.quantization.layers import bitsandbytes, pack_4_bits, pack_8_bits

if TYPE_CHECKING:
    from peftcli.recipe import QuantizationSection


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
        """Returns the weight [O, I] that a layer of the stored `weight` computes with."""
        loaded, device = weight.to(self.dtype), weight.device
        if self.section.type == "int8":
            packed = pack_8_bits(loaded, device)
            return unpack_8_bits(packed.data, packed.SCB)
        return _unpack_4_bits(pack_4_bits(loaded, self.section, device))


def is_quantised(module: nn.Module) -> bool:
    """Returns whether `module` is one of bitsandbytes' linear layers, whose weight is packed."""
    own_class: Any = getattr(type(module), "grafted_from", type(module))
    return own_class.__module__.startswith("bitsandbytes.") and isinstance(module, nn.Linear)


def is_int8(module: nn.Module) -> bool:
    """Returns whether `module` is a packed layer that rounds its inputs to 8 bits too."""
    return is_quantised(module) and hasattr(module, "state")


def unpacked(module: Any) -> Tensor:
    """Returns the weight [O, I] that a packed layer stands for, detached."""
    return unpack_8_bits(module.weight.data, module.state.SCB) if is_int8(module) else _unpack_4_bits(module.weight)


def unpack_8_bits(packed: Tensor, scales: Tensor) -> Tensor:
    """Returns `W_q · s_W / 127` [O, I] in float32."""
    dense: Tensor = bitsandbytes().functional.int8_vectorwise_dequant(packed, scales)
    return dense


def _unpack_4_bits(weight: Any) -> Tensor:
    dense: Tensor = bitsandbytes().functional.dequantize_4bit(weight.data, weight.quant_state)
    return dense.detach()


def num_weights(parameter: Tensor) -> int:
    """Returns how many numbers `parameter` stands for: one packed in 4 bits holds two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def packed_share(model: nn.Module) -> float:
    """Returns the share of the numbers in the model's parameters that are packed."""
    packed = {id(module.weight) for module in model.modules() if is_quantised(module)}
    sizes = {id(parameter): num_weights(parameter) for parameter in model.parameters()}
    return sum(sizes[key] for key in packed) / sum(sizes.values())


def computing_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Returns the dtypes that `model` computes in: those of its dense weights, and the packed layers' own."""
    layers = [module for module in model.modules() if is_quantised(module)]
    packed = {id(layer.weight) for layer in layers}
    dense = {one.dtype for one in model.parameters() if one.is_floating_point() and id(one) not in packed}
    own: set[Any] = {getattr(layer, "compute_dtype", None) for layer in layers}
    return dense | (own - {None})


@contextmanager
def unrounded_inputs(model: nn.Module) -> Iterator[None]:
    """Lets int8 layers on a CPU compute `x deq(W_q)ᵀ + b` while entered, in evaluation mode too.

    What is left is a function of the weights alone. With rounded inputs, two models that differ in the last bits differ
    in the second digit.
    """
    # For bitsandbytes this is what a layer's training mode means; nothing else in a linear layer depends on it.
    switched = [module for module in model.modules() if is_int8(module) and not module.training]
    for module in switched:
        module.training = True
    try:
        yield
    finally:
        for module in switched:
            module.training = False


def require_exact_biases(model: nn.Module, precision: str = "no") -> None:
    """Raises a ModelError where a bias trains that its packed layer would round to half precision as it computes.

    Args:
        model: The base with its adapters.
        precision: The mixed precision of the run, `no`, `bf16` or `fp16`.
    """
    packed = {id(module.weight) for module in model.modules() if is_quantised(module)}
    dense = [one for one in model.parameters() if one.is_floating_point() and id(one) not in packed]
    wide = precision == "no" and all(one.dtype == torch.float32 for one in dense)
    for name, module in model.named_modules():
        bias = getattr(module, "bias", None)
        if not is_quantised(module) or bias is None or not bias.requires_grad:
            continue
        if is_int8(module) and not wide:  # it holds its bias in the dtype of its inputs
            raise ModelError(
                f"quantization.type: {name}.bias trains, and int8 would round its steps to half precision",
                hint="set model.dtype to float32 and training.mixed_precision to no, or quantization.type to nf4",
            )
        if not is_int8(module) and module.compute_dtype != torch.float32:
            chosen = str(module.compute_dtype).removeprefix("torch.")
            raise ModelError(
                f"quantization.compute_dtype: {name}.bias trains, and {chosen} would round its steps away",
                hint="set quantization.compute_dtype to float32",
            )
