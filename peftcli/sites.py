"""How a module of the model looks to a method: as a `Site` when its adapter is made, as a `Base` when it runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.methods._place import Attention, Base, Kind, Site
from peftcli.quantization import is_int8, is_quantised, unpacked


def original_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that `module` has when it is not grafted."""
    own_class: type[nn.Module] = getattr(type(module), "grafted_from", type(module))
    return own_class


def kind_of(module: nn.Module) -> Kind | None:
    """Returns how `module` stores its weight, or None where it is nothing that a weight-space method can adapt.

    A subclass that computes something else in its forward (a scaled embedding, say) is none of the three: merging
    into its weight would not be what the adapter did.
    """
    own_class: Any = original_class(module)
    if own_class.forward is nn.Linear.forward or is_quantised(module):
        return "linear"
    if own_class.forward is nn.Embedding.forward and getattr(module, "max_norm", None) is None:
        return "embedding"
    if own_class.__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's; not imported, to keep this file torch-only
        return "conv1d"
    return None


def as_base(module: Any, forward: Callable[..., Any]) -> Base:
    """Returns `module` as its method sees it; `forward` is the frozen one."""
    kind = kind_of(module)
    if kind is None:
        return Base("module", forward, None, _has_no_weight, _has_no_weight, getattr(module, "dtype", None))
    if is_int8(module):
        forward = partial(_without_a_past, forward)
    bias: Tensor | None = getattr(module, "bias", None)
    project = partial(_project_ids if kind == "embedding" else _project, module, forward)
    own = kind == "linear" and type(module.weight) is nn.Parameter and not is_quantised(module)
    weight = module.weight if own else None
    return Base(kind, forward, bias, project, partial(dense_weight, module, kind), weight=weight)


def _without_a_past(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Returns what an int8 layer answers, so that an update may be written into it.

    bitsandbytes' function returns a view that it made unseen by autograd, which then forbids to write into it. Where
    no gradient leads back through the layer there is nothing to override.
    """
    y = forward(x)
    return y if y.requires_grad else y.detach()


def _has_no_weight(*_: object) -> Tensor:
    raise AssertionError("a module without a weight of its own was asked for it")


def _project(module: Any, forward: Callable[[Tensor], Tensor], A: Tensor) -> Tensor:
    """Returns `W Aᵀ` [O, R] by feeding A's rows [R, I] through the frozen layer, in its own precision.

    No autocast may be on. An int8 layer would round A, which is no activation: there it is a product with the weight
    that it stands for.
    """
    if is_int8(module):
        return dense_weight(module, "linear").to(A.dtype) @ A.t()
    # A packed weight may be stored in the guise of floating-point numbers: its layer converts inputs by itself.
    y = forward(A if is_quantised(module) else A.to(module.weight.dtype))
    projected: Tensor = y if module.bias is None else y - module.bias
    return projected.t()


def _project_ids(module: Any, forward: Callable[[Tensor], Tensor], A: Tensor) -> Tensor:
    """Returns `W Aᵀ` [O, R] for an embedding, whose `W` is `weightᵀ`: rows of A [R, V] are no ids to look up."""
    projected: Tensor = A.to(module.weight.dtype) @ module.weight
    return projected.t()


def dense_weight(module: Any, kind: Kind) -> Tensor:
    """Returns `W` [O, I] of a module in float32 (float64 stays), detached."""
    weight: Tensor = unpacked(module) if is_quantised(module) else module.weight.detach()
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return weight if kind == "linear" else weight.t()


def make_site(
    name: str,
    module: nn.Module,
    roles: frozenset[str] = frozenset(),
    width: int = 0,
    *,
    result_is_kept: bool = False,
) -> Site:
    """Returns `module` as a method may know it; `width` is the length of a `module`'s inputs and outputs."""
    kind = kind_of(module)
    if kind is None:
        scale = getattr(module, "weight", None)
        features = len(scale) if isinstance(scale, Tensor) and scale.ndim == 1 else width
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        return Site(name, "module", features, features, False, device, _has_no_weight, roles, run=module.forward)
    weight: Any = module.weight
    if kind == "linear":
        out_features, in_features = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    else:
        in_features, out_features = weight.shape
    has_bias = getattr(module, "bias", None) is not None
    dense = partial(dense_weight, module, kind)
    device, run = weight.device, module.forward
    return Site(name, kind, in_features, out_features, has_bias, device, dense, roles, result_is_kept, run)


def embedding_site(name: str, module: Any) -> Site:
    """Returns the input embedding, of whatever class, as a method may know it."""
    size, width = module.weight.shape
    device, dense = module.weight.device, partial(dense_weight, module, "embedding")
    return Site(name, "embedding", size, width, False, device, dense, run=module.forward)


def model_site(model: Any) -> Site:
    """Returns the whole model as a method may know it."""
    config = model.config.get_text_config(decoder=True)
    width, device = int(config.hidden_size), next(model.parameters()).device
    return Site(
        name="",
        kind="model",
        in_features=int(getattr(config, "vocab_size", width)),
        out_features=width,
        has_bias=False,
        device=device,
        dense=_has_no_weight,
        run=partial(_run_frozen, model),
        attention=_attention(config),
        make_cache=partial(_new_cache, model.config),
    )


@torch.no_grad()
def _run_frozen(model: nn.Module, *arguments: Any, **named: Any) -> Any:
    """Returns what `model` answers in evaluation mode, and leaves its modules in the modes they were in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return model(*arguments, **named)
    finally:
        for module in training:
            module.training = True


def _attention(config: Any) -> Attention | None:
    """Returns the shape of the caches of a model with `config`; None where layers differ in it or have none."""
    layers = list(getattr(config, "per_layer_config", ()))
    shapes = {(getattr(one, "num_key_value_heads", None), getattr(one, "head_dim", None)) for one in layers}
    kinds = set(getattr(config, "layer_types", None) or ())
    if len(shapes) > 1 or not kinds <= {"full_attention", "sliding_attention", "chunked_attention"}:
        return None
    if getattr(config, "kv_sharing_modes", None) or getattr(config, "num_kv_shared_layers", None):
        return None
    num_heads, width = int(config.num_attention_heads), int(config.hidden_size)
    return Attention(
        int(getattr(config, "num_decoder_layers", None) or config.num_hidden_layers),
        int(getattr(config, "num_key_value_heads", None) or num_heads),
        int(getattr(config, "head_dim", None) or width // num_heads),
        width,
    )


def _new_cache(config: Any) -> Any:
    """Returns an empty cache such as a model with `config` makes for itself."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    if config.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    return DynamicCache(config=config)
