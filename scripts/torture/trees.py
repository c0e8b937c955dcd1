"""Whether two run folders are the same, byte for byte, but for what the clock and the machine put there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

MEASURED = {"tokens_per_second", "memory_gb", "seconds"}
NOT_OF_A_RUN = {".lock"}


def differences(found: Path, expected: Path) -> list[str]:
    """Returns a few words on each file that is not in both folders, or not with the same content."""
    ours, theirs = contents(found), contents(expected)
    wrong = [f"{name} is missing" for name in theirs if name not in ours]
    wrong += [f"{name} is left over" for name in ours if name not in theirs]
    return sorted(wrong + [f"{name} differs" for name in ours if name in theirs and ours[name] != theirs[name]])


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file under `folder` by its path there, less times and speeds."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: _comparable(path) for name, path in sorted(files.items()) if name not in NOT_OF_A_RUN}


def _comparable(path: Path) -> bytes:
    comparable = COMPARABLE.get(path.name)
    content = path.read_bytes()
    return content if comparable is None else comparable(content.decode())


def _metrics(text: str) -> bytes:
    return json.dumps([_less_measured(json.loads(line)) for line in text.splitlines()]).encode()


def _manifest(text: str) -> bytes:
    return json.dumps(_less_measured(json.loads(text))).encode()


def _less_measured(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return {key: _less_measured(one) for key, one in value.items() if key not in MEASURED}


COMPARABLE: dict[str, Callable[[str], bytes]] = {"metrics.jsonl": _metrics, "manifest.json": _manifest}
