"""Whether an adapter's files are those that its run or checkpoint wrote, by the digests that lie beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftcli import files
from peftcli.errors import ModelError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "manifest.json"
STATE_FILE = "state.json"
MANIFEST_KEYS = {"adapter_sha256": WEIGHTS_FILE, "adapter_config_sha256": CONFIG_FILE}
"""A manifest's keys with digests, and of which file each is."""


def digests(folder: Path) -> dict[str, str]:
    """Returns the digests of the adapter in `folder` as its run's manifest has them."""
    return {key: files.sha256(folder / name) for key, name in MANIFEST_KEYS.items()}


def check(folder: Path) -> None:
    """Checks an adapter's files against the manifest or the checkpoint's state beside them, where there is one.

    PEFT reads a changed `lora_alpha` or a flipped bit as another adapter, without a word.

    Raises:
        ModelError: A file is not what was written.
    """
    for path, name, digest in _vouched(folder):
        if (folder / name).is_file() and files.sha256(folder / name) != digest:
            raise ModelError(
                f"{folder / name} has changed since {path.name} was written",
                hint="restore it from a backup or a checkpoint, or go on with the run by --resume; where the change "
                f"is meant, remove {path.name}",
            )


def _vouched(folder: Path) -> list[tuple[Path, str, object]]:
    """Returns the files that something beside them vouches for: by what, their names, and their digests."""
    manifest, state = folder / MANIFEST_FILE, folder / STATE_FILE
    by_manifest = _read(manifest)
    by_state = _read(state).get("sha256")
    found = [(manifest, name, by_manifest[key]) for key, name in MANIFEST_KEYS.items() if key in by_manifest]
    if isinstance(by_state, Mapping):
        found += [(state, name, by_state[name]) for name in MANIFEST_KEYS.values() if name in by_state]
    return found


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint="it vouches for the adapter beside it") from error
    return found if isinstance(found, dict) else {}
