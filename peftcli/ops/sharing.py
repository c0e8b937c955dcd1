"""What modules that read the same tensor compute once: a query's, key's and value's adapters drop the same inputs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class _Result:
    """What was computed from one tensor.

    Attributes:
        source: The tensor, as it was at `version`, in a forward pass with or without gradients.
        key: What was asked for.
        value: What came out.
        readers: Who has had it.
    """

    source: weakref.ref[Tensor]
    version: int
    tracked: bool
    key: Hashable
    value: Tensor
    readers: set[str] = field(default_factory=set)


class SharedInput:
    """The last result that the adapters of one parent module computed from an input, for those that read it too.

    Shared is between modules of one parent alone, which are run, and when activations are recomputed run again,
    together; so no two layers drop the same inputs by chance. Whoever asks a second time begins anew: it is another
    forward pass, be it of the same tensor, and draws its own noise. A result goes with its input or with the next one.
    """

    def __init__(self) -> None:
        self._last: _Result | None = None

    def once(self, reader: str, x: Tensor, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Returns `compute()`, or what another reader of the same `x` had from it.

        Args:
            reader: Who asks: the module's path.
            x: The input, told by identity: the same object, not written into since.
            key: All else that the result depends on. Dtype, training mode and rates belong into it.
            compute: Must depend on nothing but `x` and `key`, and on the random source.
        """
        if torch.compiler.is_compiling() or x.is_inference():
            return compute()
        tracked = torch.is_grad_enabled()
        last = self._last
        if last is None or not (
            last.source() is x
            and last.version == x._version
            and last.tracked == tracked
            and last.key == key
            and reader not in last.readers
        ):
            last = _Result(weakref.ref(x, self._forget), x._version, tracked, key, compute())
            self._last = last
        last.readers.add(reader)
        return last.value

    def _forget(self, source: weakref.ref[Tensor]) -> None:
        if self._last is not None and self._last.source is source:
            self._last = None

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state of a copy or of a file: without a result, which belongs to a forward pass."""
        return {"_last": None}
