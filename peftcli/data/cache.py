"""Encoded data, kept for later runs and shared by the processes of one.

What is kept is found by its content: by a digest of all rows, of the tokenizer with its chat template, of the fields of
the recipe that decide how rows are encoded, and of the code that does it. Nothing goes by paths, names or times.

The first process to come holds a lock while it encodes; the others of a machine wait for it and map the same files.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

from peftcli import files
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

ABANDONED_SECONDS = 7 * 24 * 3600
"""What is unfinished for as long was left by a process that was killed."""


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
    large, wanted = job.rows.num_bytes >= MIN_BYTES, job.data.cache
    key = key_of(job) if wanted is True or (large and wanted == "auto") else None
    if key is not None:
        return _kept(job, files.cache_folder() / "data", key)
    remark = "encoded anew in each run: this tokenizer or dataset has no digest" if wanted is True else None
    return (*(_in_passing(job) if large else job.encode()), remark)


def _kept(job: Job, cache_folder: Path, key: str) -> tuple[EncodedDataset, EncodingReport, str | None]:
    """Returns what the cache has under `key`; encodes it first if it has nothing, or nothing that is whole."""
    folder = cache_folder / key
    try:
        with files.waited_for(cache_folder / ".locks" / key):
            there = folder.exists()
            found = store.load(folder) if there else None
            if found is not None:
                os.utime(folder)
                return (*found, f"encoded before, and taken from {folder}")
            with files.new_folder(folder) as fresh:
                found = job.encode(store.Writer(fresh).gather)
                store.write_facts(fresh, *found)
    except (OSError, HostError) as error:
        return (*job.encode(), f"encoded, and not kept for later runs: {error}")
    damage = "; what was there was damaged" if there else ""
    total = trim(cache_folder, folder)
    sizes = f"{store.size_of(folder) / 1e6:,.1f} MB, of {total / 1e6:,.1f} MB in all"
    return (*found, f"encoded, and kept for later runs in {folder} ({sizes}){damage}")


def _in_passing(job: Job) -> Encoded:
    """Returns the samples in files that nothing else can find, and that are gone when they are no longer used."""
    with TemporaryDirectory(prefix="peftcli-") as folder:
        return job.encode(store.Writer(Path(folder)).gather)


def trim(cache_folder: Path, newest: Path) -> int:
    """Removes what was not used for the longest time until all is within `MAX_BYTES`, and returns what is left.

    A process that has mapped what is removed keeps it. `newest` stays in any case.
    """
    entries = {}
    for path in cache_folder.iterdir():
        if path.is_dir() and path.name != ".locks":
            entries[path] = (path.stat().st_mtime, store.size_of(path))
    total = sum(size for _, size in entries.values())
    for path, (used, size) in sorted(entries.items(), key=lambda entry: entry[1]):
        unfinished = path.name.endswith(files.TEMPORARY_SUFFIX)
        abandoned = unfinished and time.time() - used > ABANDONED_SECONDS
        if abandoned or (total > MAX_BYTES and path != newest and not unfinished):
            shutil.rmtree(path, ignore_errors=True)
            total -= size
    return total


def key_of(job: Job) -> str | None:
    """Returns the digest of all that decides what a job's rows become; None where that cannot be told."""
    rows, tokenizer = job.rows.digest(), tokenizer_digest(job.tokenizer)
    facts = {
        "columns": list(job.rows.columns),
        "format": job.form,
        "fields": {name: getattr(job.data, name) for name in ("columns", "max_length", "overlong", "train_on")},
        "meaning": asdict(job.meaning),
        "vocab_size": job.vocab_size,
    }
    key = combined([rows, tokenizer, json.dumps(facts, sort_keys=True), code_digest()])
    return None if key is None else key[:32]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Returns a digest of what a tokenizer makes of texts and chats; None for one that does not tell."""
    if not tokenizer.is_fast:
        return None
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    facts: dict[str, Any] = {
        # The last call's settings, which every call sets anew.
        "backend": {name: value for name, value in backend.items() if name not in ("truncation", "padding")},
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
