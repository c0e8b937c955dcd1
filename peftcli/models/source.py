"""Where a base model's files come from: a local folder, or the hub and its cache; and whether they may be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from peftcli import headers, hub
from peftcli.errors import ModelError
from peftcli.recipe.paths import expand_home

if TYPE_CHECKING:
    from peftcli.recipe import ModelSection


@dataclass(frozen=True)
class ModelSource:
    """Where a model's files come from.

    Attributes:
        name: A local folder, or a hub id.
        is_local: Whether `name` is a folder on this machine.
        options: Keyword arguments for every `from_pretrained` call that reads from it.
    """

    name: str
    is_local: bool
    options: dict[str, Any]


def locate(section: ModelSection) -> ModelSource:
    """Returns where the recipe's model is to be read from.

    A hub id whose hub cannot be reached is read from the local cache at once, instead of after the hub client's half
    minute of retries.

    Raises:
        ModelError: `model.name` looks like a path and there is no such folder, or it lacks a config.json.
    """
    path = Path(expand_home(section.name))
    options: dict[str, Any] = {"trust_remote_code": False}
    if section.gguf_file is not None:
        options["gguf_file"] = section.gguf_file
    if path.is_dir():
        wanted = section.gguf_file or "config.json"
        if not (path / wanted).is_file():
            raise ModelError(f"model.name: {section.name} has no {wanted}", hint=_folder_listing(path))
        return ModelSource(str(path), True, options)
    if path.exists() or section.name.startswith((".", "/", "~")) or section.name.count("/") > 1:
        what = "is a file, not a model folder" if path.exists() else "there is no such folder"
        raise ModelError(
            f"model.name: {section.name}: {what}",
            hint="name a folder with config.json and *.safetensors, or a hub id such as org/model; "
            "the recipe's header may say how to make it",
        )
    if section.revision is not None:
        options["revision"] = section.revision
    if not hub.reachable():
        options["local_files_only"] = True
    return ModelSource(section.name, False, options)


def _folder_listing(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())[:8]
    return f"it has {', '.join(names)}" if names else "the folder is empty"


@contextmanager
def explained(section: ModelSection, source: ModelSource, what: str) -> Iterator[None]:
    """Turns the loaders' many exceptions into one ModelError that names the model and the cause."""
    try:
        yield
    except Exception as error:  # a damaged file decides which: tokenizers raise no class but this
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = None
        is_damaged = isinstance(error, ValueError | KeyError | TypeError | SafetensorError)
        if not source.is_local and not is_damaged:
            if source.options.get("local_files_only"):
                reason = "it is not in the local cache, and the model hub cannot be reached"
                hint = "check the network and HF_HUB_OFFLINE, or name a local folder: model.name=PATH"
            elif "gated" in str(error) or "401" in str(error):
                hint = "accept the model's licence on its hub page and set HF_TOKEN (or run `hf auth login`)"
            else:
                hint = "check the id's spelling and `model.revision`, or name a local folder: model.name=PATH"
        raise ModelError(f"model.name: cannot load the {what} of {section.name}: {reason}", hint=hint) from error


def weight_files(source: ModelSource) -> list[Path]:
    """Returns the files that hold the model's weights: fetched, if they are on the hub; none where one is missing.

    Raises:
        HeaderError: The index is none, or names other files than it may.
    """
    found = _weights(source).values()
    return [] if None in found else [path for path in found if path is not None]


def check_weights(source: ModelSource) -> None:
    """Checks the model's safetensors files, those on the hub once they are here, before a loader reads any of them.

    What is missing is for the loader to say.

    Raises:
        OSError: A file cannot be read.
        HeaderError: One is no safetensors file, or not one that an honest program writes; it is named.
    """
    for name, path in _weights(source).items():
        if path is None or path.suffix != headers.SUFFIX:
            continue
        try:
            headers.read(path)
        except headers.HeaderError as error:
            raise headers.HeaderError(f"{name}: {error}") from None


def _weights(source: ModelSource) -> dict[str, Path | None]:
    """Returns the files with the model's weights by their names, None for one that is missing; {} for no names."""
    single = source.options.get("gguf_file", headers.SINGLE_FILE)
    if (path := _find(source, single)) is not None:
        return {single: path}
    index = _find(source, headers.INDEX_FILE)
    if index is None:
        return {}
    try:
        names = sorted(set(headers.read_index(index).values()))
    except headers.HeaderError as error:
        raise headers.HeaderError(f"{headers.INDEX_FILE}: {error}") from None
    return {name: _find(source, name) for name in names}


def _find(source: ModelSource, name: str) -> Path | None:
    """Returns one of the model's files, fetched if it is on the hub; None where there is no such file."""
    if source.is_local:
        return path if (path := Path(source.name) / name).is_file() else None
    from transformers.utils.hub import cached_file

    options = {name: value for name, value in source.options.items() if name in ("revision", "local_files_only")}
    quiet: Any = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(source.name, name, **options, **quiet)
    return None if found is None else Path(found)


def snapshot(section: ModelSection, source: ModelSource) -> Path:
    """Returns the folder in the hub's cache that holds the model's files, fetched where they are not there yet.

    Raises:
        ModelError: They cannot be fetched.
    """
    from huggingface_hub import snapshot_download

    with explained(section, source, "files"):
        return Path(
            snapshot_download(
                section.name,
                revision=section.revision,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"],
                local_files_only=bool(source.options.get("local_files_only")),
            )
        )
