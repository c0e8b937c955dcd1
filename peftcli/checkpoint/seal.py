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

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SEAL_FILE = "adapter_seal.json"
DIGESTED = (WEIGHTS_FILE, "labels.json")
"""What a seal has the digests of: the weights, and where there are labels the file that an output is read by."""
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


def write(folder: Path, config: Mapping[str, Any], base: str | None) -> None:
    """Seals what lies in `folder` and the fields that its `adapter_config.json` will hold."""
    seal = Seal(config, {name: files.sha256(folder / name) for name in DIGESTED if (folder / name).is_file()}, base)
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
        reason = _fault(facts)
        if reason is None:
            return Seal(facts["config"], facts["sha256"], facts["base"])
    except KeyError as error:
        reason = f"{error.args[0]} is missing"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)
    raise ModelError(
        f"{path} cannot be used: {reason}",
        hint="restore it from a backup or a checkpoint; with --force the adapter is loaded unverified",
    )


def _fault(facts: dict[str, Any]) -> str | None:
    """Returns why a seal that says `facts` is none; raises where that is not what any seal says."""
    if facts.pop(OWN_DIGEST) != files.json_sha256(facts):
        return "it has changed since it was written"
    if facts["format"] != FORMAT:
        return f"its format is {facts['format']}, not {FORMAT}"
    if not isinstance(facts["config"], dict) or not isinstance(facts["base"], str | None):
        return "it does not say what a seal says"
    if WEIGHTS_FILE not in facts["sha256"] or not set(facts["sha256"]) <= set(DIGESTED):
        return "it names other files than an adapter has"
    return None


def examine(folder: Path, config: Mapping[str, Any]) -> tuple[Seal | None, list[Problem]]:
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
        found.append(Problem(f"{folder / CONFIG_FILE} has changed since it was written: {said}", hint=_HINT))
    for name, digest in seal.sha256.items():
        path = folder / name
        if not path.is_file():
            found.append(Problem(f"{path} is missing", hint=_HINT))
        elif (now := files.sha256(path)) != digest:
            said = f"its sha256 was {digest!s:.12}…, is {now:.12}…"
            found.append(Problem(f"{path} has changed since it was written: {said}", hint=_HINT))
    return seal, found


def with_doubts(error: PeftcliError, doubts: Iterable[Problem]) -> PeftcliError:
    """Returns `error`, which --force cannot override, with the `doubts` that may tell how it came about."""
    return ModelError.of([*error.problems, *(replace(one, hint=None) for one in doubts)])


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns what has changed from one set of fields to another, in words."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = (_text(fields[key]) if key in fields else "not there" for fields in (before, now))
        if old != new:
            found.append(f"{key:.80} was {old:.80}, is {new:.80}")
    return found


def _text(value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return "nested too deeply"
