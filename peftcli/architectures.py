"""Architecture facts: which module of a transformers model plays which role.

A method that acts at a role ("after the feed-forward") asks here for the modules, and so works on every family below.
A model type without facts of its own gets the generic ones: the names that mean the same wherever they stand. A role
is answered only where every layer has it, never for some of them.

The roles, by what a module computes; D is the model's width:

    query, key, value     an attention's projections, of self- and of cross-attention; some models fuse them
    attention_output      an attention's last projection, to [.., D]: what the residual stream gets, or a norm before it
    feed_forward_input    each projection that reads the feed-forward's input (both of a gated one)
    feed_forward_output   the feed-forward's last projection, to [.., D]
    feed_forward          the whole feed-forward as one module, from its [.., D] input to its output before the
                          residual is added; BERT and OPT have no such module
    layer_output          the one module of each layer that returns the layer's output as a tensor: the layer itself,
                          T5's last sublayer or, where a layer ends with a LayerNorm (BERT), that LayerNorm
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal, get_args

from peftcli.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

Role = Literal[
    "query",
    "key",
    "value",
    "attention_output",
    "feed_forward_input",
    "feed_forward_output",
    "feed_forward",
    "layer_output",
]
ROLES: tuple[Role, ...] = get_args(Role)

Cast = tuple[tuple[Role, str], ...]
"""Who plays what, as paths in a layer. A fused module, several projections in one, stands there once for each."""


@dataclass(frozen=True)
class Part:
    """Something a layer may have: it has it if it has every module of `cast` and of `marks`, which play nothing."""

    cast: Cast
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """The facts of a family: how the path of a list of layers ends (empty: any does), and what a layer may have."""

    layers: str
    parts: tuple[Part, ...]


def _attention(path: str, query: str, key: str, value: str, output: str) -> Part:
    """Returns the attention at `path` with the paths, in that, of its projections."""
    prefix = f"{path}."
    projections: Cast = (("query", prefix + query), ("key", prefix + key), ("value", prefix + value))
    return Part((*projections, ("attention_output", prefix + output)))


def _feed_forward(path: str, *projections: str) -> Part:
    """Returns the feed-forward at `path`, empty where it is no module; its output is the last of its projections."""
    *inputs, output = (f"{path}.{name}" if path else name for name in projections)
    readers: Cast = tuple(("feed_forward_input", name) for name in inputs)
    whole: Cast = (("feed_forward", path),) if path else ()
    return Part((*readers, ("feed_forward_output", output), *whole))


def _ends_at(path: str, *marks: str) -> Part:
    """Returns that a layer, if it has all `marks`, ends with the module at `path`, empty for the layer itself."""
    return Part((("layer_output", path),), marks)


_SEPARATE = _attention("self_attn", "q_proj", "k_proj", "v_proj", "o_proj")
_SEPARATE_DENSE = _attention("self_attn", "q_proj", "k_proj", "v_proj", "dense")
_SEPARATE_OUT = _attention("self_attn", "q_proj", "k_proj", "v_proj", "out_proj")
_TOGETHER = _attention("self_attn", "qkv_proj", "qkv_proj", "qkv_proj", "o_proj")
_GATED = _feed_forward("mlp", "gate_proj", "up_proj", "down_proj")
_GATED_TOGETHER = _feed_forward("mlp", "gate_up_proj", "gate_up_proj", "down_proj")
_PLAIN = _feed_forward("mlp", "fc1", "fc2")
_BARE = _feed_forward("", "fc1", "fc2")
_AT_LAYER = _ends_at("")
_BERT_ATTENTIONS = tuple(
    _attention(path, "self.query", "self.key", "self.value", "output.dense") for path in ("attention", "crossattention")
)
_BERT_FEED_FORWARD = _feed_forward("", "intermediate.dense", "output.dense")
_BERT_END = _ends_at("output.LayerNorm")
_VIT_ATTENTION = _attention("attention", "q_proj", "k_proj", "v_proj", "o_proj")

LLAMA = Architecture("layers", (_SEPARATE, _GATED, _AT_LAYER))
PHI = Architecture("layers", (_SEPARATE_DENSE, _PLAIN, _AT_LAYER))
PHI3 = Architecture("layers", (_TOGETHER, _GATED_TOGETHER, _AT_LAYER))
GPT2 = Architecture(
    "h",
    (
        _attention("attn", "c_attn", "c_attn", "c_attn", "c_proj"),
        _attention("crossattention", "q_attn", "c_attn", "c_attn", "c_proj"),
        _feed_forward("mlp", "c_fc", "c_proj"),
        _AT_LAYER,
    ),
)
GPT_NEOX = Architecture(
    "layers",
    (
        _attention("attention", "query_key_value", "query_key_value", "query_key_value", "dense"),
        _feed_forward("mlp", "dense_h_to_4h", "dense_4h_to_h"),
        _AT_LAYER,
    ),
)
OPT = Architecture("layers", (_SEPARATE_OUT, _BARE, _AT_LAYER))
OPT_POST_NORM = Architecture("layers", (_SEPARATE_OUT, _BARE, _ends_at("final_layer_norm")))  # OPT-350m alone
BERT = Architecture("encoder.layer", (*_BERT_ATTENTIONS, _BERT_FEED_FORWARD, _BERT_END))
DEBERTA = Architecture(
    "encoder.layer",
    (
        _attention("attention", "self.in_proj", "self.in_proj", "self.in_proj", "output.dense"),
        _BERT_FEED_FORWARD,
        _BERT_END,
    ),
)
DEBERTA_V2 = Architecture(
    "encoder.layer",
    (
        _attention("attention", "self.query_proj", "self.key_proj", "self.value_proj", "output.dense"),
        _BERT_FEED_FORWARD,
        _BERT_END,
    ),
)
DISTILBERT = Architecture(
    "transformer.layer",
    (
        _attention("attention", "q_lin", "k_lin", "v_lin", "out_lin"),
        _feed_forward("ffn", "lin1", "lin2"),
        _ends_at("output_layer_norm"),
    ),
)
T5 = Architecture(
    "block",  # which holds, as layer.0, layer.1.., self-attention, in the decoder cross-attention, and a feed-forward
    (
        _attention("layer.0.SelfAttention", "q", "k", "v", "o"),
        _attention("layer.1.EncDecAttention", "q", "k", "v", "o"),
        *(_feed_forward(f"layer.{last}.DenseReluDense", "wi", "wo") for last in (1, 2)),
        *(_feed_forward(f"layer.{last}.DenseReluDense", "wi_0", "wi_1", "wo") for last in (1, 2)),
        *(_ends_at(f"layer.{last}", f"layer.{last}.DenseReluDense") for last in (1, 2)),  # a block returns a tuple
    ),
)
VIT = Architecture("layers", (_VIT_ATTENTION, _PLAIN, _AT_LAYER))

ARCHITECTURES = {
    "bert": BERT,
    "camembert": BERT,
    "deberta": DEBERTA,
    "deberta-v2": DEBERTA_V2,
    "distilbert": DISTILBERT,
    "electra": BERT,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mistral": LLAMA,
    "mt5": T5,
    "opt": OPT,
    "phi": PHI,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "roberta": BERT,
    "t5": T5,
    "umt5": T5,
    "vit": VIT,
    "xlm-roberta": BERT,
}
"""The facts by `config.model_type`."""

GENERIC = Architecture(
    "",
    (
        *(_SEPARATE, _SEPARATE_DENSE, _SEPARATE_OUT, _TOGETHER, *_BERT_ATTENTIONS, _VIT_ATTENTION),
        _attention("encoder_attn", "q_proj", "k_proj", "v_proj", "out_proj"),  # BART's cross-attention
        *(_GATED, _GATED_TOGETHER, _PLAIN, _BARE, _BERT_FEED_FORWARD),
        # Where else a layer ends, the names do not tell: BART has OPT's but a norm at the end; Bloom's returns a tuple.
        _ends_at("", "input_layernorm", "self_attn"),
    ),
)
"""The facts for any other model type."""


def architecture_of(model: nn.Module) -> Architecture:
    """Returns the facts of the model's type, or the generic ones."""
    config = getattr(model, "config", None)
    found = ARCHITECTURES.get(getattr(config, "model_type", ""), GENERIC)
    return OPT_POST_NORM if found is OPT and not getattr(config, "do_layer_norm_before", True) else found


def layers_of(model: nn.Module) -> dict[str, Cast]:
    """Returns who plays what in each layer, by the layer's path and in the model's order; all paths are the model's.

    Every layer of a list is there if something is known of any: what has no known part stands there with nothing.
    """
    architecture = architecture_of(model)
    names = {name: None for name, _ in model.named_modules()}
    casts: dict[str, Cast] = {}
    for name in names:
        parent, _, index = name.rpartition(".")
        if index.isdigit() and (not architecture.layers or f".{parent}".endswith(f".{architecture.layers}")):
            casts[name] = tuple(chain(*(_players(part, name, names) for part in architecture.parts)))
    known = {layer.rpartition(".")[0] for layer, cast in casts.items() if cast}
    return {layer: cast for layer, cast in casts.items() if layer.rpartition(".")[0] in known}


def _players(part: Part, layer: str, names: Container[str]) -> Cast:
    """Returns the part's cast with the model's paths, or nothing where `layer` has not all of the part."""
    cast: Cast = tuple((role, f"{layer}.{path}" if path else layer) for role, path in part.cast)
    needed = [path for _, path in cast] + [f"{layer}.{mark}" for mark in part.marks]
    return cast if all(path in names for path in needed) else ()


def roles_of(model: nn.Module) -> dict[str, tuple[Role, ...]]:
    """Returns the roles of each module that plays any, by its path and in the model's order."""
    roles: dict[str, dict[Role, None]] = {}
    for role, path in chain(*layers_of(model).values()):
        roles.setdefault(path, {})[role] = None
    return {name: tuple(roles[name]) for name, _ in model.named_modules() if name in roles}


def modules_of(model: nn.Module, role: Role) -> list[str]:
    """Returns the path of each module that plays `role`, in the model's order. Works on the meta device.

    Raises:
        RecipeError: No layer, or not every layer, has such a module.
    """
    played = [{one for one, _ in cast} for cast in layers_of(model).values()]
    having = sum(role in layer for layer in played)
    if played and having == len(played):
        return [path for path, roles in roles_of(model).items() if role in roles]
    kind = getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__
    known = [one for one in ROLES if played and all(one in layer for layer in played)]
    lacking = f"only {having} of the {len(played)} layers" if having else "no layers"
    raise RecipeError(
        f'method.target_modules: {lacking} of this {kind} model have a known "{role}" module',
        hint="name the modules in method.target_modules" + (f"; known here: {', '.join(known)}" if known else ""),
    )


def fused_of(model: nn.Module) -> set[str]:
    """Returns the paths of the modules that are several projections in one: query, key and value, or gate and up."""
    counts = Counter(path for _, path in chain(*layers_of(model).values()))
    return {path for path, count in counts.items() if count > 1}
