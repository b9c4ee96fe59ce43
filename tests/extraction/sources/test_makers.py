"""Sources made by their makers' own libraries, against what these libraries read in them.

tests/fixtures/make_sources.py made them and says with which versions.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from blip3o_dit.extraction.sources.image_list import ImageList
from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.extraction.sources.options import ListingOptions

SOURCES = Path(__file__).parent.parent.parent / "fixtures" / "sources"
EXPECTED: dict[str, list[dict[str, Any]]] = json.loads((SOURCES / "expected.json").read_text())["pictures"]


def about(images: ImageList) -> list[dict[str, Any]]:
    return [
        {
            "sha256": hashlib.sha256(image.read()).hexdigest(),
            "caption": image.caption,
            "label": image.label,
        }
        for image in images
    ]


@pytest.mark.parametrize("source", EXPECTED)
def test_a_source_is_what_its_maker_reads(source: str) -> None:
    images = list_images(SOURCES / source)
    assert about(images) == EXPECTED[source]
    assert not images.skipped
    assert len({image.key for image in images}) == len(images)


KEYS = {
    "img2dataset_webdataset": ("00000/000000", "00001/000011"),
    "img2dataset_files": ("00000/000000.jpg", "00001/000011.jpg"),
    "img2dataset_parquet": ("00000/0", "00001/1"),
    "webdataset": ("000001/j", "part-1/000000/sub.folder/0002"),
    "hf_saved": ("data-00000-of-00002/0", "data-00001-of-00002/1"),
    "hf_dict/train": ("data-00000-of-00001/0", "data-00000-of-00001/2"),
    "hf_hub/data/train*": ("train-00000-of-00001/0", "train-00000-of-00001/2"),
    "hf_lists": ("0000/0", "0000/4"),
    "imagefolder_jsonl": ("sub/0.png", "sub/2.png"),
    "imagefolder_csv": ("sub/0.png", "sub/2.png"),
    "imagefolder_parquet": ("sub/0.png", "sub/2.png"),
    "imagefolder_classes": ("cat/0.png", "dog/1.png"),
}


def test_keys() -> None:
    images = {source: list_images(SOURCES / source) for source in EXPECTED}
    assert {source: (found[0].key, found[-1].key) for source, found in images.items()} == KEYS


IGNORED = {
    "img2dataset_webdataset": {".parquet": 2, ".json": 2},
    "img2dataset_files": {".parquet": 2, ".json": 2},
    "img2dataset_parquet": {".json": 2, "failed downloads": 1},
    "webdataset": {".seg.png": 6, ".npy": 6},
    "hf_saved": {".arrow": 1, ".json": 2},
    "imagefolder_classes": {},
}


@pytest.mark.parametrize("source", IGNORED)
def test_what_is_no_picture_is_counted(source: str) -> None:
    assert {kind: n for kind, n in list_images(SOURCES / source).ignored.items() if n} == IGNORED[source]


def test_splits_are_not_merged() -> None:
    with pytest.raises(
        ValueError, match=r"hf_dict: expected one split, found the splits \['held out', 'train'\]: name"
    ):
        list_images(SOURCES / "hf_dict")
    with pytest.raises(
        ValueError, match=r"found 1 of test, 1 of train: .*data/test\*\.parquet' or '.*data/train"
    ):
        list_images(SOURCES / "hf_hub")


def test_open_clip_tables() -> None:
    captions = [
        "a red square",
        "a green\nsquare",
        "ein grüner Würfel",
        "blue, with a comma",
        'so-called "white"',
    ]
    images = list_images(SOURCES / "open_clip" / "train.csv")
    assert [(image.key, image.caption) for image in images] == [
        (f"{i}.png", c) for i, c in enumerate(captions)
    ]
    assert images[3].read() == (SOURCES / "open_clip" / "3.png").read_bytes()
    with pytest.raises(ValueError, match="expected a header that names the picture's column"):
        list_images(SOURCES / "open_clip" / "other.csv")
    named = ListingOptions(image_column="photo", caption_column="words")
    assert [image.caption for image in list_images(SOURCES / "open_clip" / "other.csv", named)] == captions


def test_the_other_part_of_a_sample_by_name() -> None:
    images = list_images(SOURCES / "webdataset" / "part-0", ListingOptions(image_field="seg.png"))
    assert len({image.read() for image in images}) == 1
    assert images.ignored == {".png": 3, ".npy": 3}


def test_a_moved_source_has_the_same_digest_and_another_content_has_not(tmp_path: Path) -> None:
    for source in ("img2dataset_files", "webdataset", "hf_saved"):
        there, here = SOURCES / source, tmp_path / source
        shutil.copytree(there, here)
        assert list_images(here).digest() == list_images(there).digest()
    (tmp_path / "img2dataset_files" / "00000" / "000000.jpg").write_bytes(b"another picture")
    assert (
        list_images(here.parent / "img2dataset_files").digest()
        != list_images(SOURCES / "img2dataset_files").digest()
    )
