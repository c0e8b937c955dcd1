"""Labelled images: found and checked once, read again for each batch, so that memory holds one batch's pixels.

An image is a file that a row names, or bytes in the row itself. It is turned as its EXIF orientation says, brought to
the channels that the model takes (transparency is dropped), and processed by the model's own image processor, with no
random step: the same file gives the same pixels in every epoch.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from peftcli.data.dataset import IGNORED, Goal
from peftcli.data.formats import BadRow, renamed
from peftcli.data.meaning import Meaning
from peftcli.data.readers import MAX_PROBLEMS, type_name
from peftcli.data.rows import Row, Rows
from peftcli.data.sampling import shares
from peftcli.errors import DataError, ModelError, Problem

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor
    from transformers import BaseImageProcessor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What the bytes may be, whatever the name says: Pillow would start a program for some other formats."""
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's name of an image with so many channels."""
CHUNK_ROWS = 64


def image_folder(path: Path, name: str) -> Rows:
    """Returns the images in a folder that has a sub-folder for each label, as rows of `image` and `label`.

    Hidden files are left out.

    Raises:
        DataError: There is anything else in the folder, or a label without images.
    """
    problems: list[Problem] = []
    found: list[tuple[Path, str]] = []
    for entry in _visible(path):
        if not entry.is_dir():
            problems.append(Problem("not in a sub-folder that says its label", str(entry)))
            continue
        inside = _visible(entry)
        images = [file for file in inside if file.is_file() and file.suffix.lower() in SUFFIXES]
        found += [(file, entry.name) for file in images]
        problems += [
            Problem("neither an image nor read", str(other), f"images end in {', '.join(SUFFIXES)}; remove the rest")
            for other in inside
            if other not in images
        ]
        if not inside:
            problems.append(Problem("the sub-folder holds no image", str(entry)))
    if problems:
        raise DataError.of(problems[:MAX_PROBLEMS])
    return Rows(
        name,
        ("image", "label"),
        len(found),
        lambda wanted: [{"image": str(found[i][0]), "label": found[i][1]} for i in wanted],
        lambda i: str(found[i][0]),
    )


def _visible(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


@dataclass(frozen=True)
class ImageDataset:
    """Labelled images, which stay where they are.

    Attributes:
        rows: Where they are, under the names that the format reads.
        targets: Number of each image's label [N].
        tasks: Number of each image's task [N].
        fingerprint: A SHA-256 of all images' bytes, labels and tasks.
    """

    rows: Rows
    targets: npt.NDArray[np.int32]
    tasks: npt.NDArray[np.int32]
    fingerprint: str
    goal: ClassVar[Goal] = "sample"

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """1 for each image [N]: all are brought to one size."""
        return np.ones(len(self), np.int64)

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self.targets)

    def image(self, index: int) -> Image:
        """Returns one image, read now.

        Raises:
            DataError: It cannot be read any more, or only in part.
        """
        try:
            opened = _opened(_content(self.rows.take([index])[0]))
            opened.load()
        except (BadRow, OSError) as error:
            raise DataError(f"the image cannot be read: {error}", where=self.rows.where(index)) from error
        return opened


@dataclass(frozen=True)
class ImageReport:
    """How many images there are, and what they are labelled with."""

    images: int
    labels: str

    def lines(self) -> list[str]:
        """Returns the report as sentences."""
        return [f"{self.images:,} images.", f"{self.labels}."]


def encode_images(rows: Rows, columns: Mapping[str, str], meaning: Meaning) -> tuple[ImageDataset, ImageReport]:
    """Returns the images of `rows`, each opened once to see that it is one, and the account of them.

    Args:
        rows: The dataset.
        columns: The recipe's `data.columns`.
        meaning: The labels and tasks.

    Raises:
        DataError: An image cannot be read, or a label is not known; up to five are named.
    """
    assert meaning.labels is not None
    digest, problems = hashlib.sha256(), list[Problem]()
    targets, tasks = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32)
    for index, row in _each(rows, columns):
        try:
            content = _content(row)
            _opened(content).verify()
            targets[index] = meaning.labels.number(row.get("label"))
            tasks[index] = meaning.task_number(row)
            digest.update(hashlib.sha256(content).digest())
        except BadRow as bad:
            problems.append(Problem(str(bad), rows.where(index), bad.hint))
        except (OSError, SyntaxError) as error:  # Pillow raises a SyntaxError for a damaged PNG
            problems.append(Problem(f"the image cannot be read: {error}", rows.where(index)))
        if len(problems) == MAX_PROBLEMS:
            break
    if problems:
        raise DataError.of(problems)
    digest.update(targets.astype("<i4").tobytes() + tasks.astype("<i4").tobytes())
    ours = replace(rows, take=lambda wanted: [renamed(row, columns) for row in rows.take(wanted)])
    return ImageDataset(ours, targets, tasks, digest.hexdigest()), ImageReport(
        len(rows), meaning.labels.summary(targets)
    )


def _each(rows: Rows, columns: Mapping[str, str]) -> Iterator[tuple[int, Row]]:
    for at in range(0, len(rows), CHUNK_ROWS):
        indices = range(at, min(at + CHUNK_ROWS, len(rows)))
        for index, row in zip(indices, rows.take(indices), strict=True):
            yield index, renamed(row, columns)


def _content(row: Row) -> bytes:
    """Returns the bytes of a row's image: its own, or those of the file it names.

    Raises:
        BadRow: It has neither.
    """
    value = row.get("image")
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise BadRow(f"image is {type_name(value)}, not a path, bytes, or an object with bytes")
    hint = "relative paths start at the current folder"
    try:
        path = Path(value).expanduser()
        if not path.is_file():  # nor a device, which may have no end
            raise BadRow(f"image {value} cannot be read: there is no such file", hint)
        return path.read_bytes()
    except (OSError, RuntimeError) as error:
        raise BadRow(f"image {value} cannot be read: {getattr(error, 'strerror', None) or error}", hint) from error


def _opened(content: bytes) -> Image:
    """Returns the image, of which only the header is read yet."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise BadRow("image is in no format that can be read", f"the formats are {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadRow("image has more pixels than an honest one", "make it smaller") from None


@dataclass(frozen=True)
class ImageBatch:
    """What one forward pass takes.

    Attributes:
        pixel_values: The processed images [B, C, H, W].
        labels: Number of each one's label, or -100 [B].
        task_ids: Number of each one's task [B].
        num_tokens: Images.
        num_supervised: Images with a label.
    """

    pixel_values: Tensor
    labels: Tensor
    task_ids: Tensor
    num_tokens: int
    num_supervised: int
    goal: ClassVar[Goal] = "sample"

    def to(self, device: torch.device | str) -> ImageBatch:
        """Returns the batch on another device."""
        return replace(
            self,
            pixel_values=self.pixel_values.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            task_ids=self.task_ids.to(device, non_blocking=True),
        )

    def model_inputs(self) -> dict[str, Tensor | None]:
        """Returns the arguments of the model's forward, labels aside."""
        return {"pixel_values": self.pixel_values}


@dataclass(frozen=True)
class ImageBatcher:
    """Makes batches of images.

    Attributes:
        dataset: The images.
        processor: The model's image processor.
        channels: How many the model takes.
    """

    dataset: ImageDataset
    processor: BaseImageProcessor
    channels: int = 3

    @property
    def num_prompts(self) -> int:
        """How many times a batch holds each of its samples: once, as an image has no prompt."""
        return 1

    def batch(self, indices: Sequence[int]) -> ImageBatch:
        """Returns the images at `indices` as one batch; one blank image without a label where there are none."""
        import torch
        from PIL import Image, ImageOps

        mode = MODES.get(self.channels)
        if mode is None:
            raise ModelError(f"the model takes images of {self.channels} channels, which no image has")
        images = [ImageOps.exif_transpose(self.dataset.image(index)).convert(mode) for index in indices]
        pixels = self.processor(images=images or [Image.new(mode, (32, 32))], return_tensors="pt")["pixel_values"]
        chosen = list(indices)
        labels = self.dataset.targets[chosen] if chosen else np.array([IGNORED])
        tasks = self.dataset.tasks[chosen] if chosen else np.array([0])
        return ImageBatch(
            pixels,
            torch.from_numpy(labels.astype(np.int64)),
            torch.from_numpy(tasks.astype(np.int64)),
            len(chosen),
            len(chosen),
        )

    def in_order_of_length(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[ImageBatch]:
        """Yields a rank's images, in the data's order."""
        for share in shares(len(self.dataset), batch_size, rank, world_size):
            yield self.batch(share)
