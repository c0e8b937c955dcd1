"""`peftcli export`: a trained adapter as a LoRA, for servers that know no other method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from peftcli import files, inject, methods
from peftcli.checkpoint.adapter import Origin, attach, save_adapter
from peftcli.data.meaning import write_meaning
from peftcli.errors import ModelError, RecipeError
from peftcli.methods._protocol import Method
from peftcli.quantization import computing_dtypes
from peftcli.reporting import Reporter
from peftcli.run.fingerprint import fingerprint
from peftcli.run.opening import load_weights
from peftcli.run.subject import Subject, check_target, proof_inputs
from peftcli.sites import dense_weight, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcli.merge import Agreement

Factors = dict[str, tuple[Tensor, Tensor]]
"""`A` [r, I] and `B` [O, r] with `W' = W + B A`, by the path of the adapted module."""


@runtime_checkable
class Averaging(Protocol):
    """An adapter whose update differs from token to token, and which can tell its mean."""

    def begin_average(self) -> None:
        """Starts to note the update of every token that passes."""

    def averaged_low_rank(self) -> tuple[Tensor, Tensor]:
        """Returns the mean update's factors."""
        ...


@dataclass(frozen=True)
class Export:
    """What an export wrote.

    Attributes:
        modules: How many modules are adapted.
        largest_rank: The largest rank of any of them.
        exact: Whether the LoRA is the same function, up to rounding.
        update_error: The largest relative error of a module's update, in the Frobenius norm; None where the update is
            no single matrix to compare with.
        agreement: How far the model with the LoRA is from the one with the adapter, on held-out samples.
    """

    modules: int
    largest_rank: int
    exact: bool
    update_error: float | None
    agreement: Agreement


def export_as_lora(
    subject: Subject, target: Path, rank: int | None, reporter: Reporter, *, lossy: bool, overwrite: bool
) -> Export:
    """Writes the subject's adapter to `target` as a LoRA that PEFT and vLLM load.

    Args:
        subject: The adapter and its base.
        target: The folder to write.
        rank: Where the adapter is not exactly a LoRA: the rank of the nearest one.
        reporter: Where progress goes.
        lossy: Where the update differs from token to token: take its mean over held-out samples.
        overwrite: Replace what `target` holds.

    Raises:
        RecipeError: The adapter is not exactly a LoRA, and neither `rank` nor `lossy` asks for a near one.
        ModelError: What was written is not what the adapter computes.
    """
    from peftcli import merge as merging

    exact = _require_a_way(subject, rank, lossy=lossy)
    check_target(subject, target, overwrite=overwrite)
    cpu = torch.device("cpu")
    inputs = proof_inputs(subject)
    reporter.stage("loading the base model")
    model, _ = load_weights(subject.base, cpu, subject.seed, reporter)
    attach(model, subject.adapter)
    reporter.stage("computing what base and adapter answer")
    if lossy:
        for adapter in _averaging(model):
            adapter.begin_average()
    expected = merging.logits_of(model, inputs, cpu)
    reporter.stage("finding the factors")
    factors, error = _factors(model, rank, exact=exact, lossy=lossy)
    origin = _exchange(model, subject, factors)
    reporter.stage("computing what base and LoRA answer")
    agreement = merging.compare(expected, merging.logits_of(model, inputs, cpu))
    if exact:
        merging.require_agreement(agreement, torch.float32, *computing_dtypes(model))
    with files.new_folder(target) as new:
        write_meaning(new, subject.base.meaning)
        save_adapter(new, model, origin)
        with files.explained(new):
            subject.base.processor.save_pretrained(new)
    return Export(len(factors), max(len(A) for A, _ in factors.values()), exact, error, agreement)


def _require_a_way(subject: Subject, rank: int | None, *, lossy: bool) -> bool:
    """Returns whether the adapter is exactly a LoRA; raises where it is not and nothing near was asked for."""
    if rank is not None and lossy:
        raise RecipeError("--rank and --lossy exclude each other", hint="--lossy keeps the adapter's own rank")
    method, config = subject.adapter.method, subject.adapter.config
    reason = method.not_low_rank(config)
    if reason is None:
        if rank is not None or lossy:
            raise RecipeError("--rank and --lossy are for what is not a LoRA: this adapter is, exactly")
        return True
    name = type(config).model_fields["type"].default
    if issubclass(method, Averaging):
        hint, wanted = "--lossy writes the mean of its updates and measures how far off that is", lossy
    elif method.unmergeable(config) is None and method.place == "targets":
        hint, wanted = "--rank N writes the nearest LoRA of rank N and measures how far off it is", rank is not None
    else:
        hint, wanted = "serve it with peftcli or transformers", False
    if not wanted:
        raise RecipeError(f"{name} is not exactly a LoRA: {reason}", hint=hint)
    return False


def _averaging(model: PreTrainedModel) -> list[Averaging]:
    return [adapter for adapter in inject.adapters(model).values() if isinstance(adapter, Averaging)]


@torch.no_grad()
def _factors(model: PreTrainedModel, rank: int | None, *, exact: bool, lossy: bool) -> tuple[Factors, float | None]:
    """Returns each adapter's factors, and the largest relative error of those that are not exact."""
    adapters = inject.adapters(model)
    if exact:
        return {path: _thinned(*adapter.low_rank()) for path, adapter in adapters.items()}, 0.0
    if lossy:
        return {path: adapter.averaged_low_rank() for path, adapter in adapters.items()}, None  # type: ignore[operator]
    assert rank is not None
    found, errors = {}, [0.0]
    for path, adapter in adapters.items():
        update = _update(path, model.get_submodule(path), adapter)
        U, S, Vh = torch.linalg.svd(update, full_matrices=False)
        kept = min(rank, len(S))
        found[path] = Vh[:kept], U[:, :kept] * S[:kept]
        errors.append(float(S[kept:].norm() / S.norm()) if float(S.norm()) else 0.0)
    return found, max(errors)


def _thinned(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Returns factors of the same product whose rank is at most its shorter side: VeRA's shared ones can be wider."""
    (r, num_inputs), num_outputs = A.shape, len(B)
    if r <= min(num_inputs, num_outputs):
        return A, B
    update = B @ A
    if num_inputs <= num_outputs:
        return torch.eye(num_inputs, device=A.device), update
    return update, torch.eye(num_outputs, device=A.device)


def _update(path: str, module: Any, adapter: Method) -> Tensor:
    """Returns `W' − W` [O, I].

    Raises:
        ModelError: The adapter changes the bias too, which a LoRA cannot.
    """
    bias = getattr(module, "bias", None)
    if bias is not None and not torch.equal(adapter.merged_bias(bias), bias):
        raise ModelError(f"{path}: the adapter changes the bias, which a LoRA cannot", hint="merge it instead")
    kind = kind_of(module)
    assert kind is not None
    weight = dense_weight(module, kind)
    return adapter.merged(weight) - weight


def _exchange(model: PreTrainedModel, subject: Subject, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Origin:
    """Puts a LoRA with these factors in the adapter's place, and returns what its files are to say."""
    lora = methods.load("lora")
    ranks = {path: len(A) for path, (A, _) in factors.items()}
    r = max(ranks.values())
    others = {path: one for path, one in ranks.items() if one != r}
    config = lora.Config.model_validate(
        {
            "type": "lora",
            "target_modules": list(factors),
            "r": r,
            "alpha": float(r),
            "rank_pattern": others,
            "alpha_pattern": {path: float(one) for path, one in others.items()},
        }
    )
    inject.ungraft(model)
    inject.graft(model, lora, config, seed=0, trained=subject.adapter.trained)
    for path, adapter in inject.adapters(model).items():
        adapter.load_peft_tensors(dict(zip(adapter.peft_tensors(), factors[path], strict=True)))
    section = subject.base.section
    return Origin(lora, config, section.name, subject.base.revision, section.task, fingerprint(subject.base))
