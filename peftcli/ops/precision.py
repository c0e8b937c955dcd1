"""In which precision an operation computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_NOTHING = nullcontext()


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Switches autocast off while entered, where it is on: to do so costs as much as a few small operations."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else _NOTHING
