"""What decoding processes hand over, and what that takes."""

from __future__ import annotations

import os
import pickle
import resource
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing import process
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.decoding import Decoded, DecodingDataset, decoded_images, stack
from blip3o_dit.extraction.extract import extract
from blip3o_dit.extraction.image_decoding import MAX_PIXELS, UnreadableImageError, decode_image
from blip3o_dit.extraction.preprocessing import Preprocessing
from blip3o_dit.extraction.reading_errors import Source
from blip3o_dit.extraction.sources.image_ref import ImageRef
from blip3o_dit.extraction.sources.listing import list_images
from tests.helpers.extraction import BROKEN, COUNT, write_images

CLIP = Preprocessing(64)
OTHER_MEAN, SMALLER = replace(CLIP, mean=(0.1, 0.2, 0.3)), Preprocessing(48)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("pictures"))


def decoded(images: Path, *preprocessing: Preprocessing, workers: int = 0) -> Iterator[Decoded]:
    refs = list_images(images)
    sides = dict(zip(("eva", "clip"), preprocessing, strict=False))
    source = Source.of(refs)
    return decoded_images(
        refs, range(len(refs)), sides, source=source, max_pixels=MAX_PIXELS, workers=workers
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_images_come_in_order_as_the_towers_take_them(images: Path, workers: int) -> None:
    refs, found = list_images(images), list(decoded(images, CLIP, SMALLER, workers=workers))
    assert [image.index for image in found] == list(range(COUNT))
    assert {refs[image.index].key for image in found if image.reason} == set(BROKEN)
    whole = [image for image in found if not image.reason]
    for side, preprocessing in (("eva", CLIP), ("clip", SMALLER)):
        expected = [preprocessing(decode_image(refs[image.index].read())) for image in whole]
        assert torch.equal(preprocessing.normalize(stack(whole, side)), torch.stack(expected))


def test_sides_with_the_same_resize_and_crop_share_bytes(images: Path) -> None:
    shared, apart = next(decoded(images, CLIP, OTHER_MEAN)), next(decoded(images, CLIP, SMALLER))
    assert np.shares_memory(shared.pixels["eva"], shared.pixels["clip"])
    assert [apart.pixels[side].shape for side in ("eva", "clip")] == [(3, 64, 64), (3, 48, 48)]
    refs = list_images(images)
    dataset = DecodingDataset(refs, range(len(refs)), [CLIP], Source.of(refs), MAX_PIXELS)
    assert len(pickle.dumps(dataset.__getitems__(next(dataset.requests())[:5]))) < 1.1 * 5 * 3 * 64 * 64


def test_batches_take_neither_descriptors_nor_sockets(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of other processes hold two each, which come through a socket in the temporary folder."""
    monkeypatch.setitem(process.current_process()._config, "tempdir", "/tmp/" + 100 * "x")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 25, limits[1]))
    try:
        found = list(decoded(images, CLIP, SMALLER, workers=1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(found) == COUNT


def test_a_run_says_which_grey_values_it_scaled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "images").mkdir()
    write_images(tmp_path / "images")
    deep = np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64)
    for name in ("deep-0.png", "deep-1.png"):
        Image.fromarray(deep).save(tmp_path / "images" / name)
    config = ExtractionConfig(
        images=str(tmp_path / "images"),
        output=str(tmp_path / "store"),
        towers_from_scratch=True,
        tokens=16,
        workers=0,
        device="cpu",
        max_skipped=1.0,
    )
    extract(config, progress=False)
    (line,) = [record.getMessage() for record in caplog.records if "more than 8 bits" in record.getMessage()]
    assert line.startswith("2 pictures of more than 8 bits") and "deep-0.png: integers up to 4095" in line


@pytest.mark.parametrize("workers", [0, 2])
def test_tables_and_compressed_tars_are_read_by_one_process(
    images: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each worker would read every row group, and decompress the whole tar."""
    files = [file for file in sorted(images.rglob("*.png")) if file.read_bytes()] * 3
    column = pyarrow.array([file.read_bytes() for file in files])
    pyarrow.parquet.write_table(pyarrow.table({"image": column}), tmp_path / "a.parquet", row_group_size=7)
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        for number, file in enumerate(files):
            tar.add(file, f"{number:03d}.png")
    here, read = os.getpid(), ImageRef.read
    expected = {data: decode(data) for data in map(Path.read_bytes, files)}

    def guarded(ref: ImageRef) -> bytes:
        assert os.getpid() == here, "read by a worker"
        return read(ref)

    monkeypatch.setattr(ImageRef, "read", guarded)
    for name in ("a.parquet", "b.tar.gz"):
        found = list(decoded(tmp_path / name, CLIP, workers=workers))
        assert [image.index for image in found] == list(range(len(files)))
        for image, file in zip(found, files, strict=True):
            wanted = expected[file.read_bytes()]
            assert (image.reason is not None) == (wanted is None)
            assert wanted is None or np.array_equal(image.pixels["eva"], wanted)


def decode(data: bytes) -> np.ndarray | None:
    try:
        return CLIP.pixels(decode_image(data)).numpy()
    except UnreadableImageError:
        return None
