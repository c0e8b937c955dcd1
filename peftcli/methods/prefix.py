"""Prefix tuning: trained keys and values in front of every layer's own.

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190, eq. 3, as attention
sees it:

    K' = [PK ; K]        V' = [PV ; V]        in each layer; queries and the mask between real tokens as before
    PK, PV [p, H, S], trained   K, V [L, H, S]   p = num_virtual_tokens, H = num_key_value_heads, S = head_size

They are put into the model's own cache of keys and values, as if p tokens had been read already: real tokens stand at
positions p, p + 1, … and all of them attend to the prefix. Its keys are used as they are, never rotated.

Init: the keys and values of sampled frequent tokens; `init` names the others. The model does not start as its base,
not even from zeros: a key of zeros takes its share of every softmax.
Trainable per site: 2 num_virtual_tokens num_layers num_key_value_heads head_size.
With `reparametrize`, E [p, D], W1 [h, D], b1 [h], W2 [layers·2·H·S, h] and b2 train instead (section 4.3), and the
prefix is tanh(E W1ᵀ + b1) W2ᵀ + b2, of which only the result is saved; h = prefix_hidden_size.
Merge: none, a prefix is not a weight.

Deviates from the paper: `reparametrize` is off by default: it trains many times as many parameters. With T5 there is a
prefix in the decoder's self-attention alone, none in the encoder or the cross-attention. A layer with a sliding window
loses sight of the prefix as of any token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from peftcli.errors import ModelError
from peftcli.methods import _virtual_tokens as virtual_tokens
from peftcli.methods._place import Attention, Base, Site
from peftcli.methods._protocol import Facts, Method, Shared

KEY = "prompt_embeddings"
NETWORK = ("E", "W1", "b1", "W2", "b2")
NETWORK_RATE = 0.1
"""On SmolLM2-135M the network learns at 1e-3 and diverges at 1e-2, where a plain prefix learns best."""


class PrefixTuningConfig(virtual_tokens.VirtualTokens):
    """The fields of `method:` when `type: prefix`."""

    type: Literal["prefix"] = "prefix"
    num_virtual_tokens: int = Field(30, ge=1, description="How many keys and values go before every layer's own.")
    init: Literal["sampled-vocab", "text", "random", "zeros"] = Field(
        "sampled-vocab",
        description="Where the prefix starts: at the keys and values of frequent tokens or of init_text, at random as "
        "N(0, 1), or at 0.",
    )
    reparametrize: bool = Field(
        False,
        description="Train a small network that makes the prefix, at a tenth of the learning rate; the prefix alone is "
        "saved.",
    )
    prefix_hidden_size: int | None = Field(
        None, ge=1, description="With reparametrize: that network's hidden size. Left out: 512."
    )

    @model_validator(mode="after")
    def _network_fits_init(self) -> PrefixTuningConfig:
        if self.prefix_hidden_size is not None and not self.reparametrize:
            raise ValueError("prefix_hidden_size: it does nothing without reparametrize: true")
        if self.reparametrize and self.init in virtual_tokens.FROM_TOKENS:
            raise ValueError("init: the network of reparametrize starts at random or zeros, not at tokens")
        if any(len(one) > 1 for one in self.init_tokens or ()):
            raise ValueError("init_tokens: keys and values start from one token each")
        return self


class PrefixTuning(Method):
    """The prefix `P` [p, layers·2·H·S] around the whole model, or the network that makes it."""

    Config = PrefixTuningConfig
    default_learning_rate = 1e-2  # the best of 1e-3 to 3e-1 on SmolLM2-135M
    peft_type = "PREFIX_TUNING"
    place = "model"
    starts_as_base = False
    tasks = frozenset({"causal-lm", "seq2seq-lm", "sequence-classification", "token-classification"})

    def __init__(self, config: PrefixTuningConfig, site: Site, seed: int, shared: Shared | None = None) -> None:
        super().__init__(config, site, seed, shared)
        assert site.attention is not None
        assert site.make_cache is not None
        self.attention, self.make_cache = site.attention, site.make_cache
        self.num_tokens = config.num_virtual_tokens
        start = (
            initial_network(config, site, seed) if config.reparametrize else {"P": initial_prefix(config, site, seed)}
        )
        for name in ("P", *NETWORK):
            self.register_parameter(name, nn.Parameter(start[name].to(site.device)) if name in start else None)
        self.P: Tensor | None
        self.E: Tensor
        self.W1: Tensor
        self.b1: Tensor
        self.W2: Tensor
        self.b2: Tensor

    def prefix(self) -> Tensor:
        """Returns the prefix [p, layers·2·H·S]."""
        if self.P is not None:
            return self.P
        return F.linear(torch.tanh(F.linear(self.E, self.W1, self.b1)), self.W2, self.b2)

    def forward(self, base: Base, input_ids: Tensor | None = None, **named: Any) -> Any:
        if input_ids is not None:
            named["input_ids"] = input_ids
        is_ours = named.get("past_key_values") is None and named.get("use_cache") is False
        if named.get("past_key_values") is None:
            named["past_key_values"] = self.make_cache()
        cache = named["past_key_values"]
        own = getattr(cache, "self_attention_cache", cache)
        side = "" if own is cache else "decoder_"
        num_samples, length = _size_of_input(named, side)
        if not own.get_seq_length():
            self.fill(own, num_samples, base.dtype)
        seen = own.get_seq_length()
        self._make_room(named, side)
        output = base.forward(**named)
        if own.get_seq_length() != seen + length:
            raise ModelError(
                "method.type: the prefix has no effect, as this model's attention does not use a cache",
                hint="choose another method; prefix tuning works with models that generate, and with BERT's kind",
            )
        # Who asked for no cache must not be given ours: `generate` would go on from it.
        unasked = is_ours and is_dataclass(output) and getattr(output, "past_key_values", None) is not None
        return replace(output, past_key_values=None) if unasked else output

    def fill(self, cache: Any, num_samples: int, dtype: torch.dtype | None) -> None:
        """Puts the prefix into an empty cache, as [B, H, p, S] for each layer."""
        shape = self.attention
        prefix = self.prefix().to(dtype)
        split = prefix.view(-1, shape.num_layers, 2, shape.num_key_value_heads, shape.head_size)
        for layer, (keys, values) in enumerate(split.permute(1, 2, 3, 0, 4)):
            cache.update(keys.expand(num_samples, -1, -1, -1), values.expand(num_samples, -1, -1, -1), layer)

    def _make_room(self, named: dict[str, Any], side: str) -> None:
        """Lets the mask and the positions in `named` count the prefix; those who gave them know nothing of it."""
        mask, positions = named.get(f"{side}attention_mask"), named.get(f"{side}position_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ModelError("method.type: prefix tuning takes attention masks of shape [samples, tokens] only")
        if mask is not None:
            named[f"{side}attention_mask"] = torch.cat([mask.new_ones(len(mask), self.num_tokens), mask], dim=1)
        if positions is not None:
            named[f"{side}position_ids"] = positions + self.num_tokens

    def learning_rate_factors(self) -> Mapping[str, float]:
        return dict.fromkeys(NETWORK, NETWORK_RATE) if self.P is None else {}

    @classmethod
    def prepare(cls, config: PrefixTuningConfig, facts: Facts) -> PrefixTuningConfig:
        return virtual_tokens.prepare(config, facts)

    @classmethod
    def check(cls, config: PrefixTuningConfig, sites: list[Site]) -> list[str]:
        if any(site.attention is None for site in sites):
            return ["type: prefix needs a model whose layers all attend alike, with keys and values of one size"]
        return [problem for site in sites for problem in virtual_tokens.check(config, site.in_features)]

    @classmethod
    def num_positions(cls, config: PrefixTuningConfig) -> int:
        return config.num_virtual_tokens

    @classmethod
    def obstacle(cls, config: PrefixTuningConfig, feature: str) -> str | None:
        if feature == "checkpointing":
            return "the prefix is in the cache of keys and values, which models go without to recompute activations"
        if feature == "flat":
            return "all samples of a row would have to share one prefix at one place"
        return None

    @classmethod
    def unmergeable(cls, config: PrefixTuningConfig) -> str | None:
        return "a prefix is a part of what a model attends to, not of a weight"

    @classmethod
    def not_low_rank(cls, config: PrefixTuningConfig) -> str | None:
        return cls.unmergeable(config)

    @classmethod
    def peft_key(cls, path: str, name: str) -> str:
        return name

    def peft_tensors(self) -> dict[str, Tensor]:
        return {KEY: self.prefix()}

    def load_peft_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if self.P is not None:  # a network cannot be had from what it makes: checkpoints hold its own tensors too
            super().load_peft_tensors(tensors)

    @classmethod
    def peft_config(cls, config: PrefixTuningConfig, sites: Sequence[Site] = ()) -> dict[str, Any]:
        shape = sites[0].attention if sites else None  # PEFT asks the model for what is None
        return {
            "num_virtual_tokens": config.num_virtual_tokens,
            "token_dim": shape and shape.num_key_value_heads * shape.head_size,
            "num_transformer_submodules": 1,
            "num_attention_heads": shape and shape.num_key_value_heads,
            "num_layers": shape and shape.num_layers,
            "prefix_projection": False,  # the file holds the prefix itself, whatever made it
            "encoder_hidden_size": None,
            "init_weights": None,
        }

    @classmethod
    def config_from_peft(cls, fields: Mapping[str, Any]) -> PrefixTuningConfig:
        submodules = fields.get("num_transformer_submodules") or 1
        if submodules > 1 and fields.get("task_type") != "SEQ_2_SEQ_LM":
            raise ValueError(f"num_transformer_submodules is {submodules} for a model of one")
        return PrefixTuningConfig.model_validate({"num_virtual_tokens": fields["num_virtual_tokens"], "init": "zeros"})

    @classmethod
    def tensors_from_peft(cls, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Tensor]:
        if (fields.get("num_transformer_submodules") or 1) == 1:
            return dict(tensors)
        return {name: _used_by_peft(tensor, fields) if name == KEY else tensor for name, tensor in tensors.items()}


def _size_of_input(named: Mapping[str, Any], side: str) -> tuple[int, int]:
    """Returns how many samples and tokens the model is given; of a decoder, if need be, told from the labels."""
    names = (f"{side}input_ids", f"{side}inputs_embeds", "labels")
    found = next(named[name] for name in names if named.get(name) is not None)
    return found.shape[0], found.shape[1]


def _used_by_peft(prefix: Tensor, fields: Mapping[str, Any]) -> Tensor:
    """Returns, in our order, the keys and values that PEFT takes from a file for an encoder and a decoder.

    It repeats the layers' pairs once, hands out two at a time, to self- and to cross-attention, and drops the second.
    """
    pairs = prefix.view(len(prefix), 2 * fields["num_layers"], -1)
    order = [(4 * layer + part) % pairs.shape[1] for layer in range(fields["num_layers"]) for part in (0, 1)]
    return pairs[:, order].reshape(prefix.shape)


def initial_prefix(config: PrefixTuningConfig, site: Site, seed: int) -> Tensor:
    """Returns the start of `P` [p, layers·2·H·S] in float32."""
    assert site.attention is not None
    shape = (config.num_virtual_tokens, _width(site.attention))
    if site.device.type == "meta":
        return torch.empty(shape, device="meta")
    if config.init == "zeros":
        return torch.zeros(shape)
    if config.init == "random":
        return torch.randn(shape, generator=site.generator(seed))
    chosen = virtual_tokens.choose(config, site.in_features, site.generator(seed))
    return keys_and_values(site, [ids[0] for ids in chosen])


def _width(shape: Attention) -> int:
    return shape.num_layers * 2 * shape.num_key_value_heads * shape.head_size


@torch.no_grad()
def keys_and_values(site: Site, tokens: list[int]) -> Tensor:
    """Returns the keys and values [p, layers·2·H·S] that the frozen model computes for `tokens`, in float32."""
    assert site.run is not None
    assert site.make_cache is not None
    ids, cache = torch.tensor([tokens], device=site.device), site.make_cache()
    own = getattr(cache, "self_attention_cache", cache)
    site.run(input_ids=ids, past_key_values=cache, **({} if own is cache else {"decoder_input_ids": ids}))
    layers = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in own.layers])
    return layers.float().permute(3, 0, 1, 2, 4).reshape(len(tokens), -1)


def initial_network(config: PrefixTuningConfig, site: Site, seed: int) -> dict[str, Tensor]:
    """Returns the start of `E`, `W1`, `b1`, `W2`, `b2` in float32: as torch starts such layers, or W2 and b2 at 0."""
    assert site.attention is not None
    D, h, out = site.attention.hidden_size, config.prefix_hidden_size or 512, _width(site.attention)
    shapes = {"E": (config.num_virtual_tokens, D), "W1": (h, D), "b1": (h,), "W2": (out, h), "b2": (out,)}
    if site.device.type == "meta":
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    generator = site.generator(seed)
    start = {"E": torch.randn(shapes["E"], generator=generator)}
    for layer, fan_in in (("1", D), ("2", h)):
        for name in (f"W{layer}", f"b{layer}"):
            start[name] = (torch.rand(shapes[name], generator=generator) * 2 - 1) / math.sqrt(fan_in)
    if config.init == "zeros":
        start |= {name: torch.zeros(shapes[name]) for name in ("W2", "b2")}
    return start
