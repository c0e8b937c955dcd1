"""Our module and PEFT's on the same inputs: a whole model would not do, as many norms compute in float32 whatever
the model's dtype, and so turn the last digit of one gradient into the eighth of the next."""

import torch

from tests.methods.building import assert_close
from tests.tolerances import EXACT


def assert_same_outputs_and_input_gradients(ours, theirs, in_features):
    """Runs both forward and backward in float64; afterwards their parameters hold comparable gradients."""
    x = torch.randn(3, 5, in_features, dtype=torch.float64)
    results, g = [], None
    for module in (ours, theirs):
        own = x.clone().requires_grad_()
        y = module(own)
        g = torch.randn_like(y) if g is None else g
        y.backward(g)
        results.append((y, own.grad))
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, EXACT[torch.float64])
