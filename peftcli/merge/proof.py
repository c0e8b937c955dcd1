"""Whether a merged layer is the adapted one: both answer the same random inputs, a layer at a time."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.errors import ModelError
from peftcli.methods._place import Site
from peftcli.methods._protocol import Method
from peftcli.sites import as_base

LAYER_TOLERANCE = 2e-5
"""How far a merged layer's outputs may be from the adapted one's, relative to the largest: both are in float32."""
NUM_PROBES = 16
NUM_PROBED_IDS = 1024


class LayerProof:
    """Compares merged layers with adapted ones as they come, and remembers the worst.

    A difference is looked for before the merged weight is rounded to what it is stored in, so an adapter may change a
    weight by less than that and still be told from none.

    Attributes:
        layers: How many layers were compared.
        max_difference: The largest difference of two outputs, relative to that layer's largest.
    """

    def __init__(self) -> None:
        self.layers = 0
        self.max_difference = 0.0

    @torch.no_grad()
    def check(
        self, site: Site, module: nn.Module, method: Method, old: tuple[Tensor, Tensor | None], new: tuple[Tensor, Any]
    ) -> None:
        """Compares one layer.

        Args:
            site: Where it is.
            module: The frozen module, or the same on the meta device.
            method: Its adapter.
            old: The base's weight and bias, as the module lays them out.
            new: The merged ones.

        Raises:
            ModelError: The merged layer is not the adapted one.
        """
        x = probe(site, old[0].dtype)
        adapted = _holding(module, *old)
        expected = method.eval()(as_base(adapted, adapted.forward), x)
        found = _holding(module, *new)(x)
        largest = float(expected.abs().max())
        difference = float((found - expected).abs().max()) / (largest or 1.0)
        if not difference <= LAYER_TOLERANCE:  # NaN fails too
            raise ModelError(
                f"{site.name}: the merged layer differs from the adapted one by {difference:.2e} of its largest "
                f"output, more than the {LAYER_TOLERANCE:.0e} that rounding explains; nothing was written",
                hint="compare whole models with --verify logits; if these agree, please report it",
            )
        self.layers += 1
        self.max_difference = max(self.max_difference, difference)


def probe(site: Site, dtype: torch.dtype) -> Tensor:
    """Returns inputs for the module at `site` that depend on its name alone: [N, I] normal numbers, or ids [N]."""
    source = site.generator(0)
    if site.kind == "embedding":
        return torch.randint(site.in_features, (NUM_PROBED_IDS,), generator=source)
    return torch.randn(NUM_PROBES, site.in_features, generator=source, dtype=dtype)


def _holding(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Returns a module like `module` that holds these tensors."""
    held: Any = copy.copy(module)
    held._parameters = dict(module._parameters)
    held.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        held.bias = nn.Parameter(bias, requires_grad=False)
    held.eval()
    return held  # type: ignore[no-any-return]
