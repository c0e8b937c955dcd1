"""What an adapter's files were when they were written: `adapter_seal.json`, which PEFT and vLLM pass over.

Names, shapes and settings that do not belong together show by themselves. An alpha of 80 for 8, a flipped bit or a base
model of the same shape but other weights do not: these are compared with what the seal says. It guards against
accidents, not against someone who writes a seal of his own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import peftcli
from peftcli import files
from peftcli.errors import ModelError, PeftcliError, Problem

SEAL_FILE = "adapter_seal.json"
FORMAT = 1
OWN_DIGEST = "seal_sha256"
NUM_NAMED = 5
_HINT = "restore it from a backup or a checkpoint; where it was changed on purpose, --force loads it as it is"


@dataclass(frozen=True)
class Seal:
    """What an adapter's files were when they were written.

    Attributes:
        config: The fields of `adapter_config.json`.
        sha256: The digests of the other files, by name.
        base: The fingerprint of the base model's files; None where it could not be taken.
    """

    config: Mapping[str, Any]
    sha256: Mapping[str, str]
    base: str | None


def write(folder: Path, config: Mapping[str, Any], names: Iterable[str], base: str | None) -> None:
    """Seals the files called `names` in `folder`, and the fields that its `adapter_config.json` will hold."""
    seal = Seal(config, {name: files.sha256(folder / name) for name in names}, base)
    facts = {"format": FORMAT, "peftcli": peftcli.__version__, **asdict(seal)}
    files.write_json(folder / SEAL_FILE, {**facts, OWN_DIGEST: files.json_sha256(facts)})


def read(folder: Path) -> Seal | None:
    """Returns the seal in `folder`; None where there is none, as in what PEFT has written.

    Raises:
        ModelError: It is damaged.
    """
    path = folder / SEAL_FILE
    if not path.is_file():
        return None
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        whole = facts.pop(OWN_DIGEST) == files.json_sha256(facts)
        if whole and facts["format"] == FORMAT:
            return Seal(facts["config"], facts["sha256"], facts["base"])
        reason = (
            "it has changed since it was written" if not whole else f"its format is {facts['format']}, not {FORMAT}"
        )
    except KeyError as error:
        reason = f"{error.args[0]} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = str(error)
    raise ModelError(
        f"{path} cannot be used: {reason}",
        hint="restore it from a backup or a checkpoint; with --force the adapter is loaded unverified",
    )


def examine(folder: Path, config_file: str, config: Mapping[str, Any]) -> tuple[Seal | None, list[Problem]]:
    """Returns the seal in `folder`, and in what the files there, `config` among them, are not what was sealed."""
    try:
        seal = read(folder)
    except ModelError as error:
        return None, list(error.problems)
    if seal is None:
        return None, []
    found = []
    changes = _changes(seal.config, config)
    if changes:
        more = f" and {len(changes) - NUM_NAMED} more" if len(changes) > NUM_NAMED else ""
        said = f"{'; '.join(changes[:NUM_NAMED])}{more}"
        found.append(Problem(f"{folder / config_file} has changed since it was written: {said}", hint=_HINT))
    for name, digest in seal.sha256.items():
        path = folder / name
        if not path.is_file():
            found.append(Problem(f"{path} is missing", hint=_HINT))
        elif (now := files.sha256(path)) != digest:
            said = f"its sha256 was {digest[:12]}…, is {now[:12]}…"
            found.append(Problem(f"{path} has changed since it was written: {said}", hint=_HINT))
    return seal, found


def with_doubts(error: PeftcliError, doubts: Iterable[Problem]) -> PeftcliError:
    """Returns `error`, which --force cannot override, with the `doubts` that may tell how it came about."""
    return ModelError.of([*error.problems, *(replace(one, hint=None) for one in doubts)])


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns what has changed from one set of fields to another, in words."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = (json.dumps(fields[key]) if key in fields else "not there" for fields in (before, now))
        if old != new:
            found.append(f"{key} was {old}, is {new}")
    return found
