"""Finds the recipe's data sources: local files by their suffix, everything else on the Hugging Face Hub."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from peftcli import hub
from peftcli.data.readers import READERS, read_file
from peftcli.data.rows import Row, Rows, concatenate, without_nulls
from peftcli.errors import DataError, RecipeError
from peftcli.recipe.paths import expand_home

if TYPE_CHECKING:
    from peftcli.recipe.schema import Source

UNPICKLING = ("webdataset", "pandas")
"""Readers of `datasets` that may unpickle what they read."""


def read_rows(sources: Sequence[Source], section_key: str, *, images: bool = False) -> Rows:
    """Returns the rows of all `sources`, one after the other.

    Args:
        sources: What the recipe names; at least one.
        section_key: The recipe key that names them, such as `data.train`.
        images: Whether a folder of folders means images, with the inner folder's name as label.

    Raises:
        DataError: A file is missing, empty or malformed, a hub dataset cannot be had, or columns disagree.
        RecipeError: A source sets a key that means nothing for its kind.
    """
    parts = [_read(source, section_key, images=images) for source in sources]
    for part in parts[1:]:
        missing = [column for column in parts[0].columns if column not in part.columns]
        extra = [column for column in part.columns if column not in parts[0].columns]
        if missing or extra:
            lacks = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"adds {', '.join(extra)}"] * bool(extra)
            raise DataError(
                f"{section_key}: the columns differ from those of {parts[0].name}: it {' and '.join(lacks)}",
                where=part.name,
                hint="sources that are read together need the same columns",
            )
    return concatenate(parts)


def _read(source: Source, section_key: str, *, images: bool) -> Rows:
    """Returns the rows of one source."""
    path = Path(expand_home(source.path))
    if images and path.is_dir() and any(entry.is_dir() for entry in path.iterdir()):
        from peftcli.data.images import image_folder

        rows = _slice(image_folder(path, source.path), source, section_key)
    elif path.is_dir() or not _means_file(source.path):
        rows = _load(source, section_key)
    elif path.is_file():
        rows = _slice(read_file(path, source.path), source, section_key)
    else:
        raise DataError(f"{section_key}: there is no such file", where=source.path, hint=_missing_hint(path))
    if not len(rows):
        raise DataError(f"{section_key}: there are no rows", where=rows.name)
    return rows


def _means_file(path: str) -> bool:
    """Returns whether a source means a file rather than a hub id such as `tatsu-lab/alpaca` or `squad`."""
    return (
        Path(path).suffix.lower() in READERS
        or path.startswith(("/", "./", "../", "~"))
        or path.count("/") > 1
        or Path(path).exists()
    )


def _missing_hint(path: Path) -> str:
    """Returns where a missing file may be: under a similar name, or relative to another folder."""
    cwd = Path.cwd()
    elsewhere = [] if path.is_absolute() else [cwd.parent / path]
    found = next(
        (other for other in (*elsewhere, cwd / path.name, *cwd.glob(f"*/{path.name}")) if other.is_file()), None
    )
    if found:
        return f"relative paths start at the current folder, {cwd}; there is {found}"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent.absolute()} either; relative paths start at the current folder"
    names = [entry.name for entry in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(str(path.parent / name) for name in close)}?"
    return f"relative paths start at the current folder, {cwd}"


def _slice(rows: Rows, source: Source, section_key: str) -> Rows:
    """Returns the part of a local file that `split` asks for: all of it, or a slice such as `train[:10%]`."""
    if source.name is not None:
        raise RecipeError(f"{section_key}: `name` chooses a part of a hub dataset; {source.path} is a file")
    if source.split == "train":
        return rows
    hint = "a file is one split: leave `split` out, or slice it as in train[:1000] or train[:10%]"
    if not source.split.startswith("train["):
        raise RecipeError(f'{section_key}: the file {source.path} has no split "{source.split}"', hint=hint)
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(source.split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError) as error:
        raise RecipeError(f'{section_key}: split "{source.split}" of {source.path}: {error}', hint=hint) from error
    return rows.select([i for part in parts for i in range(part.from_, part.to)])


def _load(source: Source, section_key: str) -> Rows:
    """Returns the rows of a dataset on the hub, in the hub's cache on this machine, or in a local folder."""
    import datasets

    folder = Path(expand_home(source.path))
    try:
        with _quiet():
            dataset = _load_folder(str(folder), source) if folder.is_dir() else _load_from_hub(source)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        message = f"{section_key}: {str(error).strip() or type(error).__name__}"
        raise DataError(message, where=source.path, hint=_load_hint(source.path)) from error
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):  # as bytes: pixels are read when a batch needs them
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    name = f"{source.path}[{source.split}]"

    def take(wanted: Sequence[int]) -> list[Row]:
        columns: dict[str, list[Any]] = dataset[list(wanted)]
        return [
            {key: without_nulls(value) for key, value in zip(columns, values, strict=True)}
            for values in zip(*columns.values(), strict=True)
        ]

    return Rows(
        name,
        tuple(dataset.column_names),
        len(dataset),
        take,
        lambda i: f"{name} row {i + 1}",
        lambda: _digest(dataset),
        int(dataset.data.nbytes),
    )


def _digest(dataset: Any) -> str:
    """Returns a SHA-256 of the content and order of a dataset's rows, whatever files they are in."""
    import pyarrow as pa  # type: ignore[import-untyped]

    digest = hashlib.sha256()
    with pa.PythonFile(_Hashing(digest), mode="w") as sink:
        for table in dataset.with_format("arrow").iter(batch_size=1000):
            plain = table.replace_schema_metadata(None).combine_chunks()
            with pa.ipc.new_stream(sink, plain.schema) as stream:
                stream.write_table(plain)
    return digest.hexdigest()


class _Hashing:
    """A file that keeps nothing but a digest of what is written to it."""

    closed = False

    def __init__(self, digest: Any) -> None:
        self._digest = digest

    def write(self, data: Any) -> int:
        """Takes `data` into the digest."""
        self._digest.update(data)
        return len(data)

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def _load_from_hub(source: Source) -> Any:
    """Returns a hub dataset; from the local cache, at once, where the hub cannot be reached."""
    import datasets

    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or not hub.reachable()
    try:
        return _made(datasets.load_dataset_builder(source.path, source.name), source)
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _load_folder(folder: str, source: Source) -> Any:
    """Returns the dataset in a folder as it is now: the cache of `datasets` goes by modification times."""
    import datasets

    with TemporaryDirectory(prefix="peftcli-") as cache:
        return _made(datasets.load_dataset_builder(folder, source.name, cache_dir=cache), source, in_memory=True)


def _made(builder: Any, source: Source, *, in_memory: bool = False) -> Any:
    """Returns the dataset of a `datasets` builder.

    Raises:
        DataError: It reads archives in WebDataset's form, whose members may be pickles.
    """
    if type(builder).__module__.rpartition(".")[2] in UNPICKLING:
        raise DataError(
            "archives may hold pickles, which are never read",
            where=source.path,
            hint="unpack them into files, or write the rows as Parquet",
        )
    builder.download_and_prepare()
    return builder.as_dataset(split=source.split, in_memory=in_memory)


def _load_hint(path: str) -> str:
    """Returns what to do about a dataset that could not be loaded."""
    folder = Path(expand_home(path))
    if folder.is_dir():
        inside = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in READERS)
        return f"name a file in it, such as {Path(path) / inside[0]}" if inside else "name a data file instead"
    names = [entry for entry in folder.parent.iterdir() if entry.stem == folder.name] if folder.parent.is_dir() else []
    near = next((entry for entry in names if entry.suffix.lower() in READERS), None)
    if near is not None:
        return f"did you mean {near}?"
    return (
        f'no local file is called "{path}", so it was looked for on the Hugging Face Hub: check the name, the network '
        "and HF_HUB_OFFLINE, and HF_TOKEN for a gated dataset"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the progress bars and log lines of `datasets`; what matters in them is in the errors."""
    import datasets

    bars_off, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars_off:
            datasets.enable_progress_bars()
