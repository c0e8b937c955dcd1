"""What tells a base model's files from another's of the same shape: an adapter belongs to one of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from peftcli import headers, models
from peftcli.checkpoint import seal as seals
from peftcli.errors import ModelError, Problem

if TYPE_CHECKING:
    from peftcli.checkpoint.seal import Seal
    from peftcli.run.opening import Base

PIECE_BYTES = 64
NUM_PIECES = 4
"""How much is read of each tensor: 256 bytes in four places, since a whole model would take as long as to load it."""
NUM_GGUF_PIECES = 1024


def fingerprint(base: Base) -> str | None:
    """Returns a digest of the names, forms and some bytes of all tensors in the base's files.

    It does not depend on how they are split into files, nor on the dtype, device or packing that they are loaded to.
    A model that was trained further differs; a base with one damaged byte most likely does not.

    Returns:
        The digest, or None where the files are not on this machine.

    Raises:
        ModelError: A file is damaged.
    """
    try:
        paths = models.weight_files(base.source)
    except (OSError, ValueError) as error:
        raise ModelError(f"the files of {base.section.name}: {error}", hint="get the model's files again") from error
    if not paths:
        return None
    if base.section.gguf_file is not None:
        return _digest([_pieces(paths[0], 0, paths[0].stat().st_size, NUM_GGUF_PIECES)])
    rows = []
    for path in paths:
        try:
            tensors, start = headers.checked(path)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"{path} is damaged: {error}", hint="get the model's files again") from error
        for name, facts in tensors.items():
            begin, end = facts["data_offsets"]
            rows.append(
                f"{name} {facts['dtype']} {facts['shape']} {_pieces(path, start + begin, end - begin, NUM_PIECES)}"
            )
    return _digest(sorted(rows))


def _pieces(path: Path, start: int, size: int, count: int) -> str:
    """Returns the digest of `count` pieces, evenly spread over `size` bytes from `start`; of all where that is less."""
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= count * PIECE_BYTES:
            file.seek(start)
            digest.update(file.read(size))
            return digest.hexdigest()
        for index in range(count):
            file.seek(start + index * (size - PIECE_BYTES) // (count - 1))
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()


def _digest(rows: list[str]) -> str:
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def other_base(seal: Seal | None, base: Base, known: str | None = None) -> list[Problem]:
    """Returns in what `base` is not the one that `seal` names: nothing where they agree, or one is not known.

    Args:
        seal: The seal.
        base: The base.
        known: Its fingerprint, where that was taken already.
    """
    if seal is None or seal.base is None:
        return []
    now = known or fingerprint(base)
    if now in (None, seal.base):
        return []
    named = seal.config.get("base_model_name_or_path")
    return [
        Problem(
            f"the weights of {base.section.name} are not those that the adapter was trained on, which it calls "
            f"{named}: their fingerprint was {seal.base[:12]}…, is {str(now)[:12]}…",
            hint="name the right base with --model; where another is meant, --force applies the adapter all the same",
        )
    ]


def require_same_base(checkpoint: Path, base: Base, known: str | None) -> None:
    """Raises a ModelError where `base`, of the fingerprint `known`, is not what `checkpoint` was trained on so far."""
    problems = other_base(seals.read(checkpoint), base, known)
    if problems:
        hint = "put the old base back, or start a new run with output_dir=DIR"
        raise ModelError(f"{checkpoint.name} cannot be resumed: {problems[0].message}", hint=hint)
