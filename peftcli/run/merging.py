"""`peftcli merge`: a trained adapter and its base as one plain model, proven or measured before it appears."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftcli import files, models
from peftcli import merge as merging
from peftcli.checkpoint import adapter as adapter_files
from peftcli.errors import RecipeError
from peftcli.merge import Agreement, LayerProof
from peftcli.quantization import computing_dtypes, is_int8
from peftcli.reporting import Reporter
from peftcli.run.opening import load_weights, open_base
from peftcli.run.packing import packing_of
from peftcli.run.subject import Subject, check_target, merged_section, proof_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcli.quantization import Packing
    from peftcli.run.opening import Base

CPU = torch.device("cpu")
BASES = ("dequantised", "original")
"""What an adapter that was trained on a packed base can be merged into."""


@dataclass(frozen=True)
class Merged:
    """A merge that was proven.

    Attributes:
        count: How many weights were merged.
        layers: How many layers were compared one by one.
        layer_difference: The largest difference of two of their outputs, relative to that layer's largest.
        agreement: How far the whole models are apart, where they were compared.
    """

    count: int
    layers: int
    layer_difference: float
    agreement: Agreement | None = None


def merge(
    subject: Subject,
    target: Path,
    dtype: str | None,
    reporter: Reporter,
    *,
    overwrite: bool,
    verify: str | None = None,
) -> Merged:
    """Writes the merged model to `target`, proves it against base and adapter, and returns how well they agree.

    The folder appears only if the proof succeeds.

    Args:
        subject: What to merge.
        target: Where to.
        dtype: The dtype to write; None keeps each weight's own.
        reporter: Where progress goes.
        overwrite: Replace what `target` holds.
        verify: What is compared: `layers`, each adapted one on random inputs as it is merged, or `logits`, of whole
            models on held-out samples, too, which needs two of them in memory, one after the other. None: the layers,
            but the logits where the base is held packed, since what its layers compute is decided by their kernels.

    Raises:
        RecipeError: The method has no merged form.
        HostError: `target` is in the way.
        ModelError: The adapter does not fit, or the merged model is not the adapted one.
    """
    whole = verify == "logits" or (verify is None and subject.base.quantization is not None)
    inputs = proof_inputs(subject) if whole else []
    with _opened(subject, target, dtype, inputs, reporter, overwrite=overwrite) as (work, new):
        count, proof = work.write(new, work.packing)
        agreement = work.proven(new) if whole else None
    return Merged(count, proof.layers, proof.max_difference, agreement)


def merge_onto(
    subject: Subject, target: Path, dtype: str | None, base: str, reporter: Reporter, *, overwrite: bool
) -> tuple[dict[str, Agreement], int]:
    """Merges as `merge`, into the base that `base` of `BASES` names, and returns how well each merge agrees.

    The merge into the dequantised base is proven whichever is written; the other one, another model than was trained,
    can only be measured.

    Raises:
        RecipeError: There is but one base to merge into.
        HostError: As `merge`.
        ModelError: As `merge`.
    """
    require_two_bases(subject)
    inputs = proof_inputs(subject)
    with _opened(subject, target, dtype, inputs, reporter, overwrite=overwrite, onto=base) as (work, new):
        count, found = 0, {}
        with files.scratch_folder(target.with_name(f".{target.name}.other")) as other:
            for name in BASES:
                folder = new if name == base else other
                packing = work.packing if name == "dequantised" else None
                count, _ = work.write(folder, packing, f"merging into the {name} weights")
                found[name] = work.measured(folder) if packing is None else work.proven(folder)
        return found, count


def require_mergeable(subject: Subject) -> None:
    """Raises a RecipeError where no plain model computes what base and adapter do together."""
    method, config = subject.adapter.method, subject.adapter.config
    reason = method.unmergeable(config)
    if reason is not None:
        name = type(config).model_fields["type"].default
        hint = "use it as it is: peftcli eval, peftcli generate"
        if hasattr(method, "averaged_low_rank"):
            hint = "peftcli export --to lora --lossy writes its mean as a LoRA, with the measured error"
        raise RecipeError(f"{name} cannot be merged: {reason}", hint=hint)


def require_two_bases(subject: Subject) -> None:
    """Raises a RecipeError where the base was not packed for the training, so that there is no choice of bases."""
    name = subject.base.section.name
    if subject.base.comes_packed:
        raise RecipeError(
            f"--base: {name} comes packed, and its original weights are not in it",
            hint="leave --base out; or merge into the model that it was made from, unmeasured: --model NAME --force",
        )
    if subject.base.quantization is None:
        raise RecipeError(
            f"--base: {name} was not quantised for the training, so there is only one to merge into",
            hint="leave --base out",
        )


@dataclass
class _Work:
    """A merge under way.

    Attributes:
        subject: What is merged.
        folder: The base's files.
        skeleton: The base on the meta device.
        packing: How the base was packed for the training, if it was.
        dtype: The dtype to write; None keeps each weight's own.
        inputs: What models are compared on.
        reporter: Where progress goes.
        expected: What base and adapter answer, once that was computed.
        computed_in: The dtypes that they compute it in.
    """

    subject: Subject
    folder: Path
    skeleton: PreTrainedModel
    packing: Packing | None
    dtype: torch.dtype | None
    inputs: list[dict[str, Tensor]]
    reporter: Reporter
    expected: list[Tensor] | None = None
    computed_in: frozenset[torch.dtype] = frozenset()

    def write(self, new: Path, packing: Packing | None, stage: str = "merging the weights") -> tuple[int, LayerProof]:
        """Writes the model merged into what `packing` makes of the base, and proves each layer.

        Returned: how many weights were merged, and the proof.
        """
        base, proof = self.subject.base, LayerProof()
        self.reporter.stage(stage)
        stored = base.quantization if base.comes_packed else None
        adapter = self.subject.adapter
        count = merging.merge_files(self.folder, self.skeleton, adapter, new, self.dtype, packing, stored, proof)
        with files.explained(new):
            base.processor.save_pretrained(new)
        return count, proof

    def measured(self, new: Path) -> Agreement:
        """Returns how far the model in `new` is from base and adapter."""
        expected = self._expected()
        self.reporter.stage("computing what the merged model answers")
        section = merged_section(self.subject, new)
        merged, _ = load_weights(open_base(section, meaning=self.subject.base.meaning), CPU)
        return merging.compare(expected, merging.logits_of(merged, self.inputs, CPU))

    def proven(self, new: Path) -> Agreement:
        """As `measured`; raises a ModelError where the two are further apart than rounding explains."""
        agreement = self.measured(new)
        merging.require_agreement(agreement, self.dtype or merging.stored_dtype(new), *self.computed_in)
        return agreement

    def _expected(self) -> list[Tensor]:
        if self.expected is None:
            self.reporter.stage("computing what base and adapter answer")
            model, _ = load_weights(self.subject.base, CPU, self.subject.seed)
            adapter_files.attach(model, self.subject.adapter)
            self.computed_in = frozenset(computing_dtypes(model))
            self.expected = merging.logits_of(model, self.inputs, CPU)
            if any(is_int8(module) for module in model.modules()):
                self._note_rounding(merging.logits_of(model, self.inputs, CPU, rounded=True))
        return self.expected

    def _note_rounding(self, as_run: list[Tensor]) -> None:
        """Says how far the answers of an int8 model as it runs are from those that a merge is compared with."""
        assert self.expected is not None
        found = merging.compare(self.expected, as_run)
        self.reporter.note(
            "int8 rounds the inputs of its layers too, which no merged model does: so run, base and adapter differ "
            f"from what is merged by up to {found.max_difference:.1e} of the largest logit, with the same choice at "
            f"{100 * found.same_choice:.1f} %"
        )


@contextmanager
def _opened(
    subject: Subject,
    target: Path,
    dtype: str | None,
    inputs: list[dict[str, Tensor]],
    reporter: Reporter,
    *,
    overwrite: bool,
    onto: str = BASES[0],
) -> Iterator[tuple[_Work, Path]]:
    """Yields what a merge needs, and the folder to write that becomes `target` when all went well.

    `onto` is which of `BASES` that folder will hold, for the note that says so.
    """
    require_mergeable(subject)
    check_target(subject, target, overwrite=overwrite)
    base = subject.base
    wanted = getattr(torch, dtype) if dtype is not None else None
    if wanted is None and base.comes_packed:  # what its weights were before they were packed
        wanted = getattr(base.config, "dtype", None) or torch.float32
    with models.plain_folder(base.section, base.source) as folder, files.new_folder(target) as new:
        skeleton = models.skeleton(base.config, base.section.task)
        packing = packing_of(base, skeleton)
        if base.quantization is not None:
            reporter.note(_said(base, packing, onto))
        yield _Work(subject, folder, skeleton, packing, wanted, inputs, reporter), new


def _said(base: Base, packing: Packing | None, onto: str) -> str:
    """Returns which weights the merged model will hold in the layers that were packed."""
    assert base.quantization is not None
    count = f"{len(packing.paths)} " if packing is not None else ""
    layers = f"the {count}linear layers that were held in {base.quantization.type}"
    if onto == "original":
        return (
            f"what is written holds the original weights of {layers}, where the adapter was trained on what these "
            "stood for: another model than was trained, so both are made and measured"
        )
    comes = f"{base.section.name} comes packed: " if base.comes_packed else ""
    return f"{comes}{layers} become the weights that these stood for, adapted or not: the adapter was trained on those"
