"""In which precision an operation computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_NOTHING = nullcontext()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `x` in `dtype`: itself where it is, which `to` takes several times as long to find out."""
    return x if x.dtype == dtype else x.to(dtype)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Switches autocast off while entered, where it is on: to do so costs as much as a few small operations."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else _NOTHING
