"""`training.use_liger_kernel`: a model's norms, rotations and activations as Liger's Triton kernels.

Hsu et al. 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training", arXiv 2410.10989. transformers puts them
into a model; the head and the loss stay ours, which take a head with an adapter or in 4 bits too. The kernels write
over what they are given, unseen by autograd: an activation's backward pass leaves its gradient where its input was. So
an adapter must not need again what it has handed on; see `Site.result_is_kept`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from peftcli.errors import HostError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PACKAGE = "liger-kernel"
OURS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""What Liger would do and we do."""
_OFF = "set training.use_liger_kernel to false"


def require(device: torch.device) -> None:
    """Raises a HostError where the kernels cannot run: Triton would say so in the first step."""
    if device.type != "cuda":
        raise HostError(
            f"training.use_liger_kernel: its kernels are for GPUs, and this run is on the {device.type.upper()}",
            hint=_OFF,
        )
    try:
        version(PACKAGE)
    except PackageNotFoundError:
        raise HostError(
            f"training.use_liger_kernel: the package {PACKAGE} is not installed",
            hint=f"pip install {PACKAGE}, or {_OFF}",
        ) from None


def put_in(model: PreTrainedModel) -> str:
    """Has kernels compute what they can of `model`, and returns a sentence on how much that is.

    To be called before the model is grafted: an adapter must go around what is put in, not be replaced by it.

    Raises:
        HostError: Liger, or the Triton that it needs, is too old or does not work here.
        ModelError: Liger has none for such a model, of which it would not say a word.
    """
    from transformers.integrations.liger import apply_liger_kernel

    try:
        apply_liger_kernel(model, OURS)
    except ImportError as error:
        message = f"training.use_liger_kernel: Liger {version(PACKAGE)} cannot be used: {error}"
        raise HostError(message, hint=f"pip install --upgrade {PACKAGE}, or {_OFF}") from error
    count = sum("forward" in vars(module) for module in model.modules())
    if not count:
        raise ModelError(
            f"training.use_liger_kernel: Liger {version(PACKAGE)} has no kernels for {model.config.model_type} models",
            hint=_OFF,
        )
    return f"Liger {version(PACKAGE)} computes {count} of the model's modules"
