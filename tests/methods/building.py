"""Small modules and models with adapters on them. Nothing is square and every layer has a bias that is not zero."""

import torch
from torch import nn
from torch.nn import functional as F

from peftcli import inject, methods, sites
from peftcli.checkpoint.adapter import Origin

KINDS = ("linear", "conv1d", "embedding")
PACKED_KINDS = ("nf4", "int8")
IN, OUT = 24, 40


class Holder(nn.Module):
    """A model of one module, called `target`."""

    def __init__(self, kind="linear", dtype=torch.float32):
        super().__init__()
        if kind == "linear":
            self.target = nn.Linear(IN, OUT)
        elif kind == "embedding":
            self.target = nn.Embedding(IN, OUT)
        elif kind in PACKED_KINDS:
            self.target = packed(nn.Linear(IN, OUT), kind)
        else:
            from transformers.pytorch_utils import Conv1D

            self.target = Conv1D(OUT, IN)
            nn.init.normal_(self.target.weight, std=0.2)  # the library's own would be small
            nn.init.normal_(self.target.bias)  # and zero
        self.kind = kind
        self.to(dtype)

    def forward(self, x):
        return self.target(x)

    @property
    def W(self):  # [O, I]
        if self.kind in PACKED_KINDS:
            return sites.dense_weight(self.target, "linear")
        weight = self.target.weight.detach()
        return weight if self.kind == "linear" else weight.t()

    @property
    def b(self):
        return 0 if self.kind == "embedding" else self.target.bias.detach()

    def plain(self, x, W, b=None):
        """Returns `x Wᵀ + b`, or W's columns that the ids `x` name; `b` is the module's own unless given."""
        return F.embedding(x, W.t()) if self.kind == "embedding" else F.linear(x, W, self.b if b is None else b)


def packed(linear, kind="nf4"):
    """Returns a linear layer whose weight is that of `linear` in NF4, with double quantisation, or in int8."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    if kind == "int8":
        layer = Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, threshold=6.0)
        layer.weight = Int8Params(linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
        layer.bias = nn.Parameter(linear.bias.detach().clone())
        layer = layer.to("cpu")  # packs
        layer.init_8bit_state()
        return layer
    layer = Linear4bit(linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = Params4bit(
        linear.weight.detach().clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
    )
    layer.bias = nn.Parameter(linear.bias.detach().clone())
    layer.support_avx512bf16_for_cpu = False  # it would repack the weight in eval mode and compute in bfloat16
    return layer.to("cpu")  # packs


def rounded_rows(x):
    """Returns each row's integers in -127..127 and its scale, as LLM.int8() rounds in float16."""
    x = x.half()
    scales = x.abs().amax(-1, keepdim=True).float()
    return torch.round(x.float() * (127 / scales)).clamp(-127, 127), scales


def int8_product(x, W, b, threshold=6.0):
    """Returns the paper's equation: the product of rounded rows, and of the columns with an outlier as they are."""
    packed, row_scales = rounded_rows(W)
    outliers = (x.half().abs() >= threshold).any(0) if threshold else torch.zeros(x.shape[1], dtype=torch.bool)
    kept = torch.where(x.half().abs() >= threshold, 0, x) if threshold else x
    inputs, scales = rounded_rows(kept)
    inputs[:, outliers] = 0
    exact = x[:, outliers] @ (packed * row_scales / 127)[:, outliers].T
    return inputs @ packed.T * scales * row_scales.T / 127**2 + exact + b


def inputs(kind, dtype=torch.float32, length=7):
    """Returns a batch of three sequences for a `Holder` of that kind."""
    return torch.randint(IN, (3, length)) if kind == "embedding" else torch.randn(3, length, IN, dtype=dtype)


SMALL = {
    "r": 4,
    "target_r": 2,
    "num_heads": 2,
    "vector_length": 8,
    "num_vectors": 12,
    "n_frequency": 20,
    "bottleneck_size": 4,
    "num_virtual_tokens": 3,
}
"""Values of methods' fields that fit tiny modules."""


def config_for(name, target_modules="target", **fields):
    """Returns a config of the method called `name`, of a size that fits tiny modules."""
    config = methods.load(name).Config
    small = {field: value for field, value in SMALL.items() if field in config.model_fields}
    chosen = {"target_modules": target_modules} if "target_modules" in config.model_fields else {}
    return config.model_validate({"type": name, **chosen, **small, **fields})


def adapt(model, name, target_modules="target", seed=0, **fields):
    """Grafts the method called `name` onto `model`; returns the config and the sites."""
    config = config_for(name, target_modules, **fields)
    return config, inject.graft(model, methods.load(name), config, seed)


def origin_of(name, config, **changes):
    """Returns what the files of an adapter of the method called `name` say beside its tensors."""
    facts = {"base_model": "base", "revision": "main", "task": "causal-lm", **changes}
    return Origin(methods.load(name), config, **facts)


def adapted_holder(name, kind="linear", dtype=torch.float64, *, noisy=True, **fields):
    """Returns a grafted `Holder` whose adapter is of `dtype` too, with random tensors unless `noisy` is false."""
    holder = Holder(kind, dtype)
    adapt(holder, name, **fields)
    for part in inject.parts(holder).values():
        part.to(dtype)
    if noisy:
        randomise(holder)
    return holder


@torch.no_grad()
def randomise(model, scale=0.3):
    """Moves every tensor that trains away from its start."""
    for parameter in trainable(model).values():
        parameter.add_(scale * torch.randn_like(parameter))


def token_ids():
    """Returns two rows of ids that every tiny model has, without the padding's."""
    return torch.randint(2, 128, (2, 9))


def base_of(holder):
    """Returns the holder's module as its method sees it."""
    return sites.as_base(holder.target, lambda x: sites.original_class(holder.target).forward(holder.target, x))


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_virtual_tokens(model, ids):
    """Returns `ids` with the adapter's virtual tokens before each row, and how many these are."""
    count = sum(len(adapter.P) for adapter in inject.adapters(model).values() if adapter.place == "input-embedding")
    virtual = torch.arange(count).expand(len(ids), -1) + model.config.vocab_size
    return torch.cat([virtual, ids], dim=1), count


def logits(model, ids):
    """Returns the logits of the ordinary tokens `ids`."""
    given, count = with_virtual_tokens(model, ids)
    return model(input_ids=given, use_cache=False).logits[:, count:]


def loss_of(model, ids):
    """Returns the loss of the ordinary tokens `ids`, having computed its gradients anew."""
    model.zero_grad(set_to_none=True)
    given, count = with_virtual_tokens(model, ids)
    labels = given.clone()
    labels[:, :count] = -100
    loss = model(input_ids=given, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach()


def assert_close(found, expected, tolerance):
    """Compares relative to the largest expected value: rounding follows it."""
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    largest = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    difference = float((found - expected).abs().max() / largest)
    assert difference <= tolerance, f"{difference:.2e} > {tolerance:.0e}"
