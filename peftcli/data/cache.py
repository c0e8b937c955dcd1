"""Encoded data, kept for later runs and shared by the processes of one.

What is kept is found by its content: by a digest of all rows, of the tokenizer with its chat template, of the fields of
the recipe that decide how rows are encoded, and of the code that does it. Nothing goes by paths, names or times.

The first process to come holds a lock while it encodes; the others of a machine wait for it and map the same files.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from peftcli import files, locks
from peftcli.data import store
from peftcli.data.dataset import EncodedDataset, EncodingReport
from peftcli.data.encoding import Gather, encode
from peftcli.data.meaning import Meaning
from peftcli.data.rows import Rows, combined
from peftcli.errors import HostError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peftcli.recipe.schema import DataSection

Encoded: TypeAlias = tuple[EncodedDataset, EncodingReport]

MIN_BYTES = 4_000_000
"""Data as large as this is kept unless the recipe says otherwise: it takes a second or more to encode."""

MAX_BYTES = 20_000_000_000
"""As much is kept in all; what was not used for the longest time goes first."""

LOCKS = ".locks"

DECIDING_FIELDS = ("columns", "max_length", "overlong", "train_on")
"""Fields of the data section that decide what rows become, beside those that decide which rows there are."""


@dataclass(frozen=True)
class Job:
    """Some rows, and all that decides how they are encoded; see `encoding.encode`."""

    rows: Rows
    form: str
    data: DataSection
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    meaning: Meaning

    def encode(self, gather: Gather = EncodedDataset.join) -> Encoded:
        """Returns the samples and the account of them."""
        return encode(self.rows, self.form, self.data, self.tokenizer, self.vocab_size, self.meaning, gather)


def encode_or_load(job: Job) -> tuple[EncodedDataset, EncodingReport, str | None]:
    """Returns the samples of a job's rows, the account of them, and what the user should know of the cache.

    Large data is in files that are mapped, whether they are kept or not.

    Raises:
        DataError: See `encoding.encode`.
        ModelError: See `encoding.encode`.
    """
    cache_folder = files.cache_folder() / "data"
    large, wanted = job.rows.num_bytes >= MIN_BYTES, job.data.cache
    key = key_of(job) if wanted is True or (large and wanted == "auto") else None
    remark = "encoded anew in each run: this tokenizer or dataset has no digest" if wanted is True else None
    try:
        if key is not None:
            return _kept(job, cache_folder, key)
        if large:
            cache_folder.mkdir(parents=True, exist_ok=True)
            return (*job.encode(store.Writer.unnamed(cache_folder).gather), remark)
    except (OSError, HostError) as error:
        remark = f"held in memory, and not kept for later runs: {error}"
    return (*job.encode(), remark)


def _kept(job: Job, cache_folder: Path, key: str) -> tuple[EncodedDataset, EncodingReport, str]:
    """Returns what the cache has under `key`; encodes it first if it has nothing, or nothing that is whole.

    Who only reads needs no lock: an entry appears as a whole. Who waited for another to encode reads what that one has
    made, at the same time as others who waited.
    """
    folder = cache_folder / key
    while True:
        seen = store.version_of(folder)
        found = store.load(folder)
        if found is not None:
            with contextlib.suppress(OSError):  # another user's cache, which may be read alone
                os.utime(folder)
            return (*found, f"encoded before, and taken from {folder}")
        with locks.file_lock(_lock_of(folder)):
            if store.version_of(folder) == seen:
                damaged = folder.exists()
                with files.new_folder(folder) as fresh:
                    encoded = job.encode(store.Writer.into(fresh).gather)
                    store.write_facts(fresh, *encoded)
                break
    total = trim(cache_folder, folder)
    damage = "; what was there was damaged" if damaged else ""
    sizes = f"{store.size_of(folder) / 1e6:,.1f} MB, of {total / 1e6:,.1f} MB in all"
    return (*encoded, f"encoded, and kept for later runs in {folder} ({sizes}){damage}")


def _lock_of(entry: Path) -> Path:
    """Returns the file that is locked while an entry, finished or not, is made."""
    return entry.parent / LOCKS / entry.name.partition(".")[0]


def trim(cache_folder: Path, newest: Path) -> int:
    """Removes what was left unfinished, and what was not used for the longest time until all is within `MAX_BYTES`.

    A process that has mapped what is removed keeps it. `newest` stays in any case. Returns the bytes that are left.
    """
    entries = []
    for path in cache_folder.iterdir():
        with contextlib.suppress(OSError):  # another process removes it, too
            if path.name.endswith(files.TEMPORARY_SUFFIX):
                _remove_abandoned(path)
            elif path.name != LOCKS:
                entries.append((path.stat().st_mtime, path, store.size_of(path)))
    total = sum(size for _, _, size in entries)
    for _, path, size in sorted(entries):
        if total > MAX_BYTES and path != newest:
            shutil.rmtree(path, ignore_errors=True)
            total -= size
    return total


def _remove_abandoned(unfinished: Path) -> None:
    """Removes what a process that is gone has not finished, which shows in that nobody holds the lock."""
    with locks.file_lock(_lock_of(unfinished), wait=False) as free:
        if free:
            shutil.rmtree(unfinished, ignore_errors=True)


def key_of(job: Job) -> str | None:
    """Returns the digest of all that decides what a job's rows become; None where that cannot be told."""
    rows, tokenizer = job.rows.digest(), tokenizer_digest(job.tokenizer)
    facts = {
        "columns": list(job.rows.columns),
        "format": job.form,
        "fields": {name: getattr(job.data, name) for name in DECIDING_FIELDS},
        "meaning": asdict(job.meaning),
        "vocab_size": job.vocab_size,
    }
    key = combined([rows, tokenizer, json.dumps(facts, sort_keys=True), code_digest()])
    return None if key is None else key[:32]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns a digest of what a tokenizer makes of texts and chats; None for one that does not tell."""
    if not tokenizer.is_fast:
        return None
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # the last call's settings are in its text, and every call sets them anew
    backend.no_padding()
    facts: dict[str, Any] = {
        "backend": hashlib.sha256(backend.to_str().encode()).hexdigest(),
        "class": type(tokenizer).__qualname__,
        "special": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "inputs": tokenizer.model_input_names,
        "truncation_side": tokenizer.truncation_side,
        "split_special_tokens": tokenizer.split_special_tokens,
    }
    if "strftime_now" in json.dumps(tokenizer.chat_template):
        facts["today"] = datetime.datetime.now().date().isoformat()  # by the clock that the template goes by
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@cache
def code_digest() -> str:
    """Returns a digest of the code that encodes: this package's files, and the versions of what it calls."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    for library in ("peftcli", "transformers", "tokenizers", "jinja2"):
        digest.update(f"{library} {version(library)}".encode())
    return digest.hexdigest()
