"""`training.torch_compile`: a model's layers as compiled code, each by itself.

    embedding → layer → layer → … → head          every layer runs the code that was compiled for the first like it

All layers of a kind share one compilation, so that its seconds do not grow with the model's depth, and lengths are
symbols in it, so that they do not grow with the batches that differ. What lies around the layers, and evaluations, run
as they are. A layer keeps its class and keys: nothing that reads, saves or merges a model notices.
"""

from __future__ import annotations

import sysconfig
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcli import sharding
from peftcli.errors import HostError, ModelError

VARIANTS = 32
"""How often a kind of code may be compiled anew: with and without a mask, one sample or several, a gradient at its
input or none, which multiply. What exceeds it runs as it is, and `Watch` says so."""
_HINT = "install it, or set training.torch_compile to false"


def require_compiler(device: torch.device) -> None:
    """Raises a HostError where layers cannot be compiled for `device`: torch would say so in the first step."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if device.type != "cpu" and not has_triton():
        raise HostError(
            f"training.torch_compile: for {device.type}, torch compiles with Triton, which is not there or does not "
            "know this device",
            hint=_HINT,
        )
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise HostError(
            "training.torch_compile: there is no C++ compiler, with which torch compiles",
            hint="install g++, name another one in the environment variable CXX, or set training.torch_compile to "
            "false",
        ) from None
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise HostError(f"training.torch_compile: Python's headers are not there ({header})", hint=_HINT)


def compile_layers(model: nn.Module, device: torch.device, *, alike: bool = True, backend: str = "inductor") -> int:
    """Lets each layer of `model` be compiled when it is first called; returns how many there are.

    To be called before the base is spread, which changes the layers' classes.

    Args:
        model: The model, grafted.
        device: Where it will run.
        alike: Whether layers may share code. Those that write into a cache may not: each knows its own place in it.
        backend: What torch compiles with.

    Raises:
        ModelError: No layers can be found in the model.
    """
    layers = list(sharding.layers(model))
    if not layers:
        raise ModelError(
            "training.torch_compile: cannot find this model's layers, which are compiled one by one",
            hint="set training.torch_compile to false",
        )
    # On a CPU the compiler's own random numbers cost more than all that it saves.
    options: dict[str, Any] = {"fallback_random": True} if backend == "inductor" and device.type == "cpu" else {}
    for layer in layers:
        layer.compile(
            backend=backend,
            dynamic=True,
            options=options or None,
            recompile_limit=VARIANTS,
            isolate_recompiles=not alike,
        )
    return len(layers)


class Watch:
    """What the compiler has done since this was made: torch itself would go on uncompiled with a line in its log."""

    def __init__(self) -> None:
        self._start, self._seconds = _counted(), _seconds()
        self._said = False

    def failure(self, step: int) -> str | None:
        """Returns, once, a sentence on code that has not been compiled by `step`; None while all has."""
        asked, done = (now - then for now, then in zip(_counted()[1:], self._start[1:], strict=True))
        if asked == done or self._said:
            return None
        self._said = True
        return (
            f"step {step}: a part of the model's layers could not be compiled, or for no more kinds of batches than "
            f"{VARIANTS}; it runs as it is, slower and to the same result; TORCH_LOGS=recompiles says why"
        )

    def summary(self) -> str:
        """Returns a sentence on what was compiled."""
        graphs = _counted()[0] - self._start[0]
        return f"compiled {graphs} variants of the model's layers, in {_seconds() - self._seconds:.0f} s of this run"


def _counted() -> tuple[int, int, int]:
    """Returns how many graphs torch has made in this process, how many pieces of code it was to compile, and has."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], counters["frames"]["total"], counters["frames"]["ok"]


def _seconds() -> float:
    """Returns the seconds that torch has spent compiling in this process."""
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent().get("total_wall_time", 0.0)


def set_aside(compiled: object) -> AbstractContextManager[Any]:
    """While entered, what is `compiled`, if anything, runs as it is: an evaluation is not worth more variants."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
