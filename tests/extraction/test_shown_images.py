"""Images that a page shows without being asked: those that the store was made from, or none."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from blip3o_dit.extraction import shown_images
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.extract import extract
from blip3o_dit.extraction.shown_images import pictures_of_store
from blip3o_dit.extraction.sources.image_list import ImageList
from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.extraction.sources.options import ListingOptions


@pytest.fixture(autouse=True)
def listing(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where images were listed."""
    asked: list[str] = []

    def listed(where: str, options: ListingOptions) -> ImageList:
        asked.append(str(where))
        return list_images(where, options)

    monkeypatch.setattr(shown_images, "list_images", listed)
    return asked


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(4):
        Image.new("RGB", (600, 20 + index), (index, 0, 0)).save(folder / f"{index}.png")
    return folder


def manifest_of(images: Path, **changes: Any) -> dict[str, Any]:
    found = list_images(images)
    recorded = {"count": len(found), "content_sha256": found.digest()}
    return {"pictures": str(images), "extraction": {"pictures": recorded}} | changes


def test_those_of_the_store_are_shown(
    images: Path, listing: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    show = pictures_of_store(manifest_of(images))
    assert not listing  # until some are wanted
    (images / "3.png").write_bytes((images / "3.png").read_bytes())
    found = show(["2.png", "none.png", "0.png"])
    assert [views and list(views) for views in found] == [["whole picture"], None, ["whole picture"]]
    images_found = [views and views["whole picture"] for views in found]
    assert [image and image.getpixel((0, 0)) for image in images_found] == [(2, 0, 0), None, (0, 0, 0)]
    assert all(image is None or max(image.size) <= 448 for image in images_found)
    assert show(["1.png"]) != [None] and show([]) == []
    assert listing == [str(images)] and not caplog.records  # listed once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder, _: shutil.rmtree(folder), "found nothing there"),
        (lambda folder, _: (folder / "3.png").unlink(), "not the pictures that the store was made from"),
        (lambda folder, _: (folder / "3.png").write_bytes(b"another"), "not the pictures"),
        (lambda folder, found: found.update(pictures="images"), "does not say which they were"),
        (lambda folder, found: found.update(extraction=None), "does not say which they were"),
        (lambda folder, found: found.update(extraction={"pictures": 5}), "does not say which they were"),
        (lambda folder, found: found.update(extraction={"pictures": {"count": "x"}}), "does not say which"),
        (
            lambda folder, found: found["extraction"]["pictures"].update(content_sha256=None),
            "not the pictures",
        ),
        (
            lambda folder, found: found["extraction"]["pictures"].update(count=10**7),
            "listing them takes long",
        ),
        (lambda folder, found: found.update(pictures=str(folder / "cut.tar")), "cut.tar: not a whole tar"),
        (
            lambda folder, found: found.update(pictures="/a\x1b[31m\n"),
            r"/a\x1b[31m : expected at least one picture",
        ),
    ],
)
def test_others_are_not_and_the_log_says_why(
    images: Path,
    tmp_path: Path,
    change: Any,
    message: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a folder of that name is in the working directory."""
    monkeypatch.chdir(tmp_path)
    manifest = manifest_of(images)
    (images / "cut.tar").write_bytes(b"x" * 600)
    if "cut" not in message:
        (images / "cut.tar").unlink()
    change(images, manifest)
    show = pictures_of_store(manifest)
    with caplog.at_level(logging.INFO):
        assert show(["0.png", "1.png"]) == [None, None] and show(["0.png"]) == [None]
    (record,) = caplog.records
    assert message in record.getMessage() and "\n" not in record.getMessage()


def test_pictures_that_were_asked_for_are_those_of_the_store_wherever_they_are(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = manifest_of(images)
    moved = images.rename(tmp_path / "moved")
    (views,) = pictures_of_store(manifest, str(moved))(["1.png"])
    assert views is not None and views["whole picture"].getpixel((0, 0)) == (1, 0, 0)
    assert not caplog.records


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "3.png").unlink(),
        lambda folder: Image.new("RGB", (50, 50)).save(folder / "1.png"),
        lambda folder: Image.new("RGB", (50, 50)).save(folder / "4.png"),
        lambda folder: (folder / "3.png").rename(folder / "other.png"),
        lambda folder: (folder / "3.txt").write_text("a caption"),
    ],
)
def test_others_with_the_same_names_are_refused(images: Path, change: Any) -> None:
    """At once, before anything is measured."""
    manifest = manifest_of(images)
    change(images)
    with pytest.raises(ValueError, match=r"expected the 4 pictures of .* found \d whose names"):
        pictures_of_store(manifest, str(images))


@pytest.mark.parametrize(
    "manifest",
    [{}, {"extraction": {"pictures": {"count": 4}}}, {"appended": [{"pictures": "b", "added": 1}]}],
)
def test_where_nothing_is_recorded_pictures_are_found_by_name_and_say_so(
    images: Path, manifest: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    if "appended" in manifest:  # the record is of the pictures that came first
        manifest = manifest_of(images) | manifest
        Image.new("RGB", (50, 50)).save(images / "4.png")
    found, unknown = pictures_of_store(manifest, str(images))(["1.png", "7.png"])
    assert found is not None and list(found) == ["whole picture, found by its name"] and unknown is None
    assert "do not say which pictures" in caplog.text
    with pytest.raises(FileNotFoundError, match="found nothing there"):
        pictures_of_store(manifest, str(images / "none"))


def test_nothing_is_listed_where_nothing_is_shown_or_known(images: Path, listing: list[str]) -> None:
    assert pictures_of_store(manifest_of(images))([]) == []
    assert pictures_of_store({})(["0.png"]) == [None]
    assert pictures_of_store({"pictures": 5})(["0.png"]) == [None]
    assert not listing


def test_the_images_of_an_extraction_are_shown(images: Path, tmp_path: Path) -> None:
    config = ExtractionConfig(
        images=str(images), output=str(tmp_path / "store"), towers_from_scratch=True, tokens=16, workers=0
    )
    store = extract(config, progress=False)
    assert store is not None
    show = pictures_of_store(store.manifest)
    for views in show(["0.png", "3.png"]):
        assert views is not None and [(name, view.size) for name, view in views.items()] == [
            ("picture", (224, 224))
        ]
    Image.new("RGB", (50, 50)).save(images / "3.png")
    assert pictures_of_store(store.manifest)(["0.png", "3.png"]) == [None, None]
