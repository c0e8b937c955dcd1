"""Writes the merged model's folder, one tensor after the other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftcli import files
from peftcli.checkpoint.adapter import Adapter, is_finite
from peftcli.errors import ModelError
from peftcli.headers import INDEX_FILE, SINGLE_FILE
from peftcli.merge.changes import Changes
from peftcli.merge.sources import Sources, form_of, is_float
from peftcli.merge.stored import DTYPES, base_entries, bytes_of, entries, require_all
from peftcli.merge.tensor_file import TensorForm, tensor_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcli.merge.proof import LayerProof
    from peftcli.quantization import Packing
    from peftcli.recipe import QuantizationSection

NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md"}


def merge_files(
    base: Path,
    skeleton: PreTrainedModel,
    adapter: Adapter,
    target: Path,
    dtype: torch.dtype | None,
    packing: Packing | None = None,
    stored: QuantizationSection | None = None,
    proof: LayerProof | None = None,
) -> int:
    """Writes the merged model into the existing, empty folder `target` and returns how many weights changed.

    Beside the adapter it takes the memory of one layer: its weight in float32, what that becomes, and what is written.
    What no adapter changes is copied in parts.

    Args:
        base: The base model's folder, with safetensors.
        skeleton: The base model on the meta device.
        adapter: What to merge.
        target: Where to write.
        dtype: The dtype of the merged weights; None keeps each as it is stored.
        packing: How the base was packed; its layers are written as what these stood for, adapted or not.
        stored: How the base's files themselves are packed; they are written as what they stand for.
        proof: Compares each adapted layer with the merged one.

    Raises:
        ModelError: The adapter does not fit, a weight of the model is in none of the base's files, a number there is
            not finite, or a merged layer is not the adapted one.
    """
    sources = Sources(skeleton, base_entries(base), packing, stored)
    changes = Changes(skeleton, adapter, sources, proof)
    sources.stored.require_whole(sources.entries, changes.new)
    writing = _Writing(sources, changes, dtype)
    outputs = writing.outputs()
    for shard in sorted(outputs):
        forms = {one.name: one.form for one in outputs[shard]}
        with tensor_file(target / shard, forms, {"format": "pt"}) as new:
            for one in outputs[shard]:
                new.write(one.name, writing.data(one))
    _copy_rest(base, target, dtype, {**changes.config(), **({"tie_word_embeddings": False} if writing.untied else {})})
    if set(outputs) != {SINGLE_FILE}:
        shards = {one.name: shard for shard, those in outputs.items() for one in those}
        total_size = sum(one.form.nbytes for those in outputs.values() for one in those)
        files.write_json(target / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": shards})
    found = {key: entry for shard in outputs for key, entry in entries(target / shard).items()}
    require_all(found, skeleton, {*sources.stored.names.values(), *changes.new, *writing.untied_names})
    return changes.count


@dataclass(frozen=True)
class _Output:
    """One tensor to write.

    Attributes:
        name: Its name.
        key: The base's tensor that it comes from; None for one that the base lacks.
        is_changed: Whether it is what the adapter makes of that.
        form: Its dtype and shape.
    """

    name: str
    key: str | None
    is_changed: bool
    form: TensorForm


class _Writing:
    """What is written of each of the base's tensors."""

    def __init__(self, sources: Sources, changes: Changes, dtype: torch.dtype | None) -> None:
        self.sources, self.changes, self.dtype = sources, changes, dtype
        self.untied = changes.untied()
        self.untied_names = {name for names in self.untied.values() for name in names}
        self.parameters = {name for name, _ in sources.skeleton.named_parameters(remove_duplicate=False)}

    def outputs(self) -> dict[str, list[_Output]]:
        """Returns what is to be written, by the name of its file; what is new comes into the last."""
        found: dict[str, list[_Output]] = {}
        for key, entry in self.sources.entries.items():
            names = self.untied.get(key, {self.changes.name_of(key): key in self.changes})
            for name, is_changed in names.items():
                form = self._form(self.sources.form(key), self.changes.whole.get(key))
                found.setdefault(entry.path.name, []).append(_Output(name, key, is_changed, form))
        if self.changes.new:
            forms = (one.form for those in found.values() for one in those)
            kept = self.dtype or next(DTYPES[form.dtype] for form in forms if is_float(form))
            found[max(found)] += [
                _Output(name, None, True, form_of(kept, tuple(tensor.shape)))
                for name, tensor in self.changes.new.items()
            ]
        return found

    def _form(self, old: TensorForm, whole: Tensor | None) -> TensorForm:
        if not is_float(old):
            return old
        dtype = self.dtype or DTYPES[old.dtype]
        return form_of(dtype, old.shape if whole is None else tuple(whole.shape))

    def data(self, one: _Output) -> Iterable[bytes | memoryview]:
        """Returns the bytes of what is to be written, in parts."""
        if one.key is None:
            return _written(self.changes.new[one.name], one)
        if one.is_changed:
            return _written(self.changes.of(one.key), one)
        entry = self.sources.entries[one.key]
        # A buffer may hold infinities that mean something, and what the model does not have does no harm.
        matters = is_float(one.form) and self.sources.stored.names.get(one.key) in self.parameters
        if self.sources.is_as_stored(one.key) and one.form == self.sources.form(one.key):
            return entry.chunks(finite=matters)
        tensor = self.sources.read(one.key)
        if matters:
            entry.require_finite(tensor)
        return _written(tensor, one)


def _written(tensor: Tensor, one: _Output) -> Iterator[memoryview]:
    """Yields the bytes of `tensor` as it is written: rounded this once."""
    assert tuple(tensor.shape) == one.form.shape, one.name
    dtype = DTYPES[one.form.dtype]
    rounded = tensor.detach().to(dtype).contiguous()
    if not is_finite(rounded) and bool((torch.isfinite(tensor) & ~torch.isfinite(rounded)).any()):
        raise ModelError(f"{one.name} holds values that are too large for {str(dtype).removeprefix('torch.')}")
    if rounded.numel():
        yield bytes_of(rounded)


def _copy_rest(base: Path, target: Path, dtype: torch.dtype | None, changes: Mapping[str, Any]) -> None:
    """Copies what belongs to the model beside its weights, and states in config.json what has changed."""
    for path in sorted(base.iterdir()):
        skipped = path.suffix in NOT_COPIED or path.name == INDEX_FILE or path.name.startswith(".")
        if path.is_file() and not skipped:
            with files.explained(target):
                shutil.copyfile(path, target / path.name)
    config: dict[str, Any] = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)  # nothing is packed in it
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
    files.write_json(target / "config.json", {**config, **changes})
