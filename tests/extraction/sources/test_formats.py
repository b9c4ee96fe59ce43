"""Suffixes: what Pillow opens, what needs an extra, and how other files are counted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image, PngImagePlugin

from blip3o_dit.extraction.image_decoding import UnreadableImageError, decode_image
from blip3o_dit.extraction.sources import formats
from tests.helpers.sources import keys, reasons, tar, write


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    caches = (formats.picture_formats, formats._opened, formats.image_suffixes)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_what_pillow_opens_is_a_picture_and_documents_are_not() -> None:
    suffixes = formats.image_suffixes()
    assert {".avif", ".jp2", ".jpg", ".tif", ".webp", ".ppm", ".mpo", ".qoi", ".heic", ".jxl"} <= suffixes
    assert not {".pdf", ".eps", ".ps", ".mpg", ".h5", ".wmf", ".txt", ".json", ".tar"} & suffixes


def test_formats_without_their_extra_are_skipped_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    write(tmp_path, dict.fromkeys(["a.HEIC", "b.jxl", "c.png"], "x"))
    heic, jxl = (f"files need pip install {name}" for name in ("pillow-heif", "pillow-jxl-plugin"))
    assert reasons(tmp_path) == {"a.HEIC": f".heic {heic}", "b.jxl": f".jxl {jxl}"}
    tar(tmp_path / "t" / "a.tar", [("0.heif", b"x"), ("1.png", b"x")])
    assert reasons(tmp_path / "t") == {"a/0": f".heif {heic}"}


def test_an_extra_that_is_installed_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for pillow_heif: it opens PNG under another name."""
    plugin = ModuleType("pillow_heif")

    calls: list[str] = []

    def register() -> None:
        calls.append("register")
        Image.register_open("STAND-IN", PngImagePlugin.PngImageFile, lambda head: head[:4] == b"\x89PNG")
        Image.register_extension("STAND-IN", ".heic")

    plugin.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    Image.new("RGB", (2, 2), "red").save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.heic")
    assert keys(tmp_path) == ["a.heic"]
    formats.picture_formats.cache_clear()
    calls.clear()
    decode_image((tmp_path / "a.heic").read_bytes())  # as in a process that decodes and has not listed
    assert calls == ["register"]


def test_no_document_is_opened_under_a_pictures_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand PostScript to Ghostscript, a program that runs what the file says."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    started: list[object] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *words, **_: started.append(words))
    with pytest.raises(UnreadableImageError, match="of an unknown format"):
        decode_image(eps)
    assert not started


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.MD", ".md"),
        (".DS_Store", ".DS_Store"),
        ("a.tar.zst", ".zst"),
        ("a.7z", ".7z"),
        ("log.0001", "without a usual suffix"),
        ("README", "without a usual suffix"),
        ("a.b c", "without a usual suffix"),
        ("a." + "x" * 40, "without a usual suffix"),
        ("..png", "without a usual suffix"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert formats.kind_of(name) == kind


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("a.PNG", ".png"), (".png", ""), ("..png", ""), ("a", ""), ("a.", "."), ("a.b.c", ".c")],
)
def test_suffixes(name: str, suffix: str) -> None:
    assert formats.suffix_of(name) == suffix
