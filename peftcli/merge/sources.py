"""What the base's tensors are before an adapter changes them: as they are stored, or as packed layers hold them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftcli.merge.stored import DTYPES, NAMES, Entry, Stored
from peftcli.merge.tensor_file import TensorForm
from peftcli.quantization import companions_of, compute_dtype, is_companion, unpack_stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peftcli.quantization import Packing
    from peftcli.recipe import QuantizationSection


class Sources:
    """The base's tensors by their key, read one at a time.

    Attributes:
        skeleton: The model on the meta device.
        entries: Those that are weights of the model: not what belongs to a packed one.
        stored: Which parameter each of them is.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel,
        found: Mapping[str, Entry],
        packing: Packing | None,
        section: QuantizationSection | None,
    ) -> None:
        """Args as `merge_files` has them; `found` is all that the base's files hold."""
        self._all, self._packing, self._section, self.skeleton = found, packing, section, skeleton
        self.entries = {key: entry for key, entry in found.items() if section is None or not is_companion(key)}
        self.stored = Stored(skeleton, self.entries)
        paths = packing.paths if packing is not None else ()
        self._packed = {self.stored.require(f"{path}.weight") for path in paths}
        beside = {key: companions_of(key, found) for key in self.entries} if section is not None else {}
        self._companions = {key: names for key, names in beside.items() if names}

    def is_as_stored(self, key: str) -> bool:
        """Returns whether a tensor is what its file says."""
        return key not in self._packed and key not in self._companions

    def form(self, key: str) -> TensorForm:
        """Returns dtype and shape to write a tensor in, unread: as it is stored, or its packed layer computes."""
        entry, companions = self.entries[key], self._companions.get(key)
        if not companions:
            return TensorForm(entry.dtype, entry.shape, entry.nbytes)
        assert self._section is not None
        in_8_bits = "SCB" in companions
        dtype = torch.float32 if in_8_bits else compute_dtype(self._section, torch.device("cpu"))
        shape = tuple(self.skeleton.get_parameter(self.stored.names[key]).shape)
        return form_of(dtype, shape)

    def read(self, key: str) -> Tensor:
        """Returns what the layer that holds it computes with."""
        tensor, companions = self.entries[key].read(), self._companions.get(key)
        if companions:
            assert self._section is not None
            return unpack_stored(
                tensor, {name: self._all[one].read() for name, one in companions.items()}, self._section
            )
        if key in self._packed:
            assert self._packing is not None
            return self._packing.of(tensor)
        return tensor


def form_of(dtype: torch.dtype, shape: tuple[int, ...]) -> TensorForm:
    """Returns the form of a tensor of this dtype and shape."""
    return TensorForm(NAMES[dtype], shape, torch.Size(shape).numel() * dtype.itemsize)


def is_float(form: TensorForm) -> bool:
    """Returns whether a tensor holds floating-point numbers that are computed with."""
    return form.dtype in DTYPES and DTYPES[form.dtype].is_floating_point
