"""Small modules and models with adapters on them. Nothing is square and every layer has a bias that is not zero."""

import torch
from torch import nn
from torch.nn import functional as F

from peftcli import inject, methods

KINDS = ("linear", "conv1d", "embedding")
IN, OUT = 24, 40


class Holder(nn.Module):
    """A model of one module, called `target`."""

    def __init__(self, kind="linear", dtype=torch.float32):
        super().__init__()
        if kind == "linear":
            self.target = nn.Linear(IN, OUT)
        elif kind == "embedding":
            self.target = nn.Embedding(IN, OUT)
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
        weight = self.target.weight.detach()
        return weight if self.kind == "linear" else weight.t()

    @property
    def b(self):
        return 0 if self.kind == "embedding" else self.target.bias.detach()

    def plain(self, x, W):
        """Returns `x Wᵀ + b`, or W's columns that the ids `x` name."""
        return F.embedding(x, W.t()) if self.kind == "embedding" else F.linear(x, W, self.b)


def inputs(kind, dtype=torch.float32, length=7):
    """Returns a batch of three sequences for a `Holder` of that kind."""
    return torch.randint(IN, (3, length)) if kind == "embedding" else torch.randn(3, length, IN, dtype=dtype)


def config_for(name, target_modules="target", **fields):
    """Returns a config of the method called `name`, of a rank that fits tiny modules."""
    config = methods.load(name).Config
    small = {"r": 4} if "r" in config.model_fields else {}
    return config.model_validate({"type": name, "target_modules": target_modules, **small, **fields})


def adapt(model, name, target_modules="target", seed=0, **fields):
    """Grafts the method called `name` onto `model`; returns the config and the sites."""
    config = config_for(name, target_modules, **fields)
    return config, inject.graft(model, methods.load(name), config, seed)


def adapted_holder(name, kind="linear", dtype=torch.float64, *, noisy=True, **fields):
    """Returns a grafted `Holder` whose adapter is of `dtype` too, with random tensors unless `noisy` is false."""
    holder = Holder(kind, dtype)
    adapt(holder, name, **fields)
    holder.target.adapter.to(dtype)
    if noisy:
        randomise(holder)
    return holder


@torch.no_grad()
def randomise(model, scale=0.3):
    """Moves every adapter tensor away from its start."""
    for adapter in inject.adapters(model).values():
        for parameter in adapter.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def token_ids():
    """Returns two rows of ids that every tiny model has, without the padding's."""
    return torch.randint(2, 128, (2, 9))


def base_of(holder):
    """Returns the holder's module as its method sees it."""
    return inject.as_base(holder.target, lambda x: inject.original_class(holder.target).forward(holder.target, x))


def trainable(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def logits(model, ids):
    return model(input_ids=ids, use_cache=False).logits


def assert_close(found, expected, tolerance):
    """Compares relative to the largest expected value: rounding follows it."""
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    largest = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    difference = float((found - expected).abs().max() / largest)
    assert difference <= tolerance, f"{difference:.2e} > {tolerance:.0e}"
