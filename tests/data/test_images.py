"""Labelled images: folders, files named by rows, and bytes in rows."""

import io
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import ViTImageProcessorPil

from peftcli.data import prepare, read
from peftcli.data.images import ImageBatcher
from peftcli.data.preview import render
from peftcli.errors import DataError
from peftcli.recipe.schema import DataSection, ModelSection

VIT = ModelSection(name="tiny", task="image-classification")


def picture(seed, mode="RGB"):
    shape = (6, 9, 3) if mode == "RGB" else (6, 9)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def folder(tmp_path):
    for label, seeds in (("dog", (0, 1)), ("cat", (2,))):
        (tmp_path / "images" / label).mkdir(parents=True)
        for seed in seeds:
            picture(seed).save(tmp_path / "images" / label / f"{seed}.png")
    return Path("images")


def encode(path):
    data = DataSection(train=str(path))
    return prepare(data, None, vocab_size=0, max_positions=None, seed=0, raw=read(data, 0, VIT))


def batcher(dataset, channels=3):
    return ImageBatcher(dataset, ViTImageProcessorPil(size={"height": 8, "width": 8}), channels)


def test_a_folder_of_folders(folder):
    (folder / ".DS_Store").write_bytes(b"")
    prepared = encode(folder)
    assert prepared.labels == ("cat", "dog")
    assert prepared.train.targets.tolist() == [0, 1, 1]
    assert prepared.train_report.lines() == ["3 images.", "2 labels: cat 1, dog 2."]
    batch = batcher(prepared.train).batch([1, 0])
    assert batch.pixel_values.shape == (2, 3, 8, 8)
    assert batch.labels.tolist() == [1, 0]
    assert (batch.num_tokens, batch.num_supervised) == (2, 2)
    assert [part.text for part in render(prepared.train, 0, None, prepared.meaning.labels)] == [
        "images/cat/2.png (9 × 6 RGB) → ",
        "cat",
    ]


def test_the_same_pixels_from_files_paths_and_bytes(folder):
    paths = [folder / "cat/2.png", folder / "dog/0.png", folder / "dog/1.png"]
    labels = ["cat", "dog", "dog"]
    structs = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    pq.write_table(pa.table({"image": structs, "label": labels}), "d.parquet")
    Path("d.csv").write_text("image,label\n" + "".join(f"{p},{n}\n" for p, n in zip(paths, labels, strict=True)))
    first, *others = [encode(one).train for one in (folder, "d.parquet", "d.csv")]
    pixels = batcher(first).batch([0, 1, 2]).pixel_values
    for other in others:
        assert other.fingerprint == first.fingerprint
        assert batcher(other).batch([0, 1, 2]).pixel_values.equal(pixels)
    assert [batch.num_tokens for batch in batcher(first).in_order_of_length(2)] == [2, 1]


def test_a_changed_image_or_label_changes_the_fingerprint(folder):
    before = encode(folder).train.fingerprint
    picture(9).save(folder / "dog/0.png")
    changed = encode(folder).train.fingerprint
    shutil.move(folder / "dog/1.png", folder / "cat/1.png")
    assert len({before, changed, encode(folder).train.fingerprint}) == 3


def test_images_are_brought_to_the_models_channels_and_turned_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = io.BytesIO()
    picture(3).save(turned, "PNG", exif=exif)
    upright = picture(3).transpose(Image.Transpose.ROTATE_270)
    for name, content in (("a", turned.getvalue()), ("b", None)):
        (folder / "cat" / f"{name}.png").write_bytes(content or b"")
    upright.save(folder / "cat/b.png")
    dataset = encode(folder).train
    pixels = batcher(dataset).batch([1, 2]).pixel_values
    assert pixels[0].equal(pixels[1])
    picture(4, "L").save(folder / "dog/gray.png")
    assert batcher(encode(folder).train).batch([5]).pixel_values.shape == (1, 3, 8, 8)


def test_no_images_make_one_that_counts_for_nothing(folder):
    batch = batcher(encode(folder).train).batch([])
    assert batch.labels.tolist() == [-100]
    assert (batch.num_tokens, batch.num_supervised) == (0, 0)


def test_everything_in_the_folder_must_be_an_image(folder):
    (folder / "readme.txt").write_text("x")
    (folder / "dog/notes.txt").write_text("x")
    (folder / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        encode(folder)
    assert {problem.where for problem in caught.value.problems} == {
        "images/readme.txt",
        "images/dog/notes.txt",
        "images/empty",
    }


def test_damaged_images_are_named(folder):
    whole = (folder / "dog/0.png").read_bytes()
    (folder / "dog/0.png").write_bytes(b"no image")
    (folder / "dog/1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as caught:
        encode(folder)
    assert [problem.where for problem in caught.value.problems] == ["images/dog/0.png", "images/dog/1.png"]
    Path("d.csv").write_text("image,label\nimages/none.png,cat\n")
    with pytest.raises(DataError, match=r"d.csv:2: image images/none.png cannot be read"):
        encode("d.csv")


def test_an_image_that_is_lost_meanwhile(folder):
    dataset = encode(folder).train
    (folder / "cat/2.png").unlink()
    with pytest.raises(DataError, match=r"images/cat/2.png: the image cannot be read"):
        batcher(dataset).batch([0])
