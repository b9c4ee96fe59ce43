"""Folder trees: order, captions beside pictures, classes, links, names, and what is said of the rest."""

from __future__ import annotations

import inspect
import json
import os
import socket
import sys
from pathlib import Path

import pytest

from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.extraction.sources.options import ListingOptions
from tests.helpers.sources import keys, listed, reasons, tar, write, write_raw


def test_the_order_is_that_of_whole_paths(tmp_path: Path) -> None:
    names = [
        "a-b.png",
        "a/z.png",
        "a.png",
        "a/b/c.png",
        "a0.png",
        "b.png",
        "a/b-c.png",
        "Ä.png",
        "\U0001f600.png",
    ]
    write(tmp_path, dict.fromkeys(names, "x"))
    assert keys(tmp_path) == sorted(names, key=os.fsencode)


def test_every_format_that_pillow_opens_and_nothing_else(tmp_path: Path) -> None:
    pictures = ["a.JPG", "b.avif", "c.jp2", "d.ico", "e.qoi", "f.mpo", "g.tga", "h.TIFF", "i.dds"]
    write(tmp_path, dict.fromkeys(pictures, "x"))
    write(
        tmp_path, dict.fromkeys(["x.pdf", "y.mp4", "z.mpg", "u.eps", "v.h5", "w", "t.0001", ".DS_Store"], "x")
    )
    images = list_images(tmp_path)
    assert [image.key for image in images] == sorted(pictures)
    assert images.ignored == {
        **dict.fromkeys([".pdf", ".mp4", ".mpg", ".eps", ".h5", ".DS_Store"], 1),
        "without a usual suffix": 2,
    }


def test_captions_beside_pictures(tmp_path: Path) -> None:
    texts = {
        "utf8.txt": "é one\n",
        "bom.txt": "é two".encode("utf-8-sig"),
        "utf16.txt": "é three".encode("utf-16"),
        "utf16le.txt": "three more".encode("utf-16-le"),
        "latin.txt": "é four".encode("latin-1"),
        "windows.txt": "“five”".encode("cp1252"),
        "lines.txt": "one\ntwo\n",
        "empty.txt": " \n",
        "upper.TXT": "upper",
        "other.caption": "other",
        "json.json": json.dumps({"caption": ["first", "second"], "label": 3}),
        "both.json": json.dumps({"caption": "by json", "label": "cat"}),
        "both.txt": "by text",
        "surrogate.json": '{"caption": "a \\ud800 b"}',
    }
    write(tmp_path, texts)
    stems = sorted({name.split(".")[0] for name in texts})
    write(tmp_path, {f"{stem}.png": "x" for stem in stems} | {"alone.txt": "of no picture", "notes.md": "x"})
    images = list_images(tmp_path)
    assert {image.key[:-4]: image.caption for image in images} == {
        "utf8": "é one",
        "bom": "é two",
        "utf16": "é three",
        "utf16le": "three more",
        "latin": "é four",
        "windows": "“five”",
        "lines": "one\ntwo",
        "empty": None,
        "upper": "upper",
        "other": "other",
        "json": "first",
        "both": "by text",
        "surrogate": "a \\ud800 b",
    }
    assert {image.key: image.label for image in images if image.label} == {"json.png": "3", "both.png": "cat"}
    assert images.ignored == {".txt": 1, ".md": 1}


def test_two_pictures_may_share_a_caption_and_differ_by_suffix(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": "1", "a.png": "2", "a.txt": "both"})
    assert listed(tmp_path) == [("a.jpg", "both", b"1"), ("a.png", "both", b"2")]


def labels(where: Path) -> list[str | None]:
    return [image.label for image in list_images(where)]


def test_classes_are_the_folders_below_the_root(tmp_path: Path) -> None:
    write(tmp_path, {"cat/1.png": "x", "dog/deep/2.png": "x", "notes.md": "x"})
    assert labels(tmp_path) == ["cat", "dog"]
    write(tmp_path, {"0.png": "x"})  # a picture among the folders: a tree, not classes
    assert labels(tmp_path) == [None, None, None]


def test_what_is_no_class(tmp_path: Path) -> None:
    assert labels(write(tmp_path / "one", {"images/1.png": "x", "images/2.png": "x"})) == [None, None]
    write(tmp_path / "other", {"images/1.png": "x", "annotations/2.md": "x"})
    assert labels(tmp_path / "other") == [None]
    splits = {"train/cat/1.png": "x", "train/dog/1.png": "x", "val/cat/2.png": "x"}
    assert labels(write(tmp_path / "splits", splits)) == ["cat", "dog", "cat"]
    shards = {"00000/1.png": "x", "00001/1.png": "x", "00000_stats.json": "{}", "00000.parquet": "x"}
    assert labels(write(tmp_path / "img2dataset", shards)) == [None, None]


def test_links_are_followed_once_and_loops_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "outside", {"deep/1.png": "1", "2.png": "2"})
    root = write(tmp_path / "root", {"m/3.png": "3", ".hidden/4.png": "4"})
    (root / "a").symlink_to(tmp_path / "outside")
    (root / "again").symlink_to(tmp_path / "outside")
    (root / "z").symlink_to(root / "m")
    (root / "h").symlink_to(".hidden")
    (root / "loop").symlink_to(root)
    (root / "up").symlink_to("..")
    (tmp_path / "outside" / "deep" / "back").symlink_to(root)
    (root / "file.png").symlink_to(tmp_path / "outside" / "2.png")
    (root / "broken.png").symlink_to("gone.png")
    (root / "broken").symlink_to("gone")
    (root / "self.png").symlink_to("self.png")
    (root / "gone.md").symlink_to("gone.md.md")
    with caplog.at_level("INFO"):
        images = list_images(root)
    assert [(image.key, image.read()) for image in images] == [
        ("a/2.png", b"2"),
        ("a/deep/1.png", b"1"),
        ("file.png", b"2"),
        ("h/4.png", b"4"),
        ("m/3.png", b"3"),
    ]
    assert [entry["key"] for entry in images.skipped] == ["broken", "broken.png", "self.png"]
    assert all("a link to what is not there" in entry["reason"] for entry in images.skipped)
    assert "2 linked folders followed" in caplog.text
    assert "5 linked folders lead to what is listed already" in caplog.text
    assert keys(root, skip_links=True) == ["file.png", "m/3.png"]


def test_a_tree_deeper_than_the_stack(tmp_path: Path) -> None:
    write(tmp_path, {"d/" * 300 + "1.png": "x"})
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        assert keys(tmp_path) == ["d/" * 300 + "1.png"]
    finally:
        sys.setrecursionlimit(limit)


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    write_raw(tmp_path, b"caf\xe9.png", b"1")
    write_raw(tmp_path, b"caf\xe9.txt", b"one")
    write(tmp_path, {"caf\\xe9.png": "2", "b\\s.png": "3", "new\nline.png": "4"})
    images = {image.key: image for image in list_images(tmp_path)}
    assert sorted(images) == ["b\\s.png", "caf\\x5cxe9.png", "caf\\xe9.png", "new\nline.png"]
    assert images["caf\\xe9.png"].read() == b"1" and images["caf\\xe9.png"].caption == "one"
    assert images["caf\\x5cxe9.png"].read() == b"2"
    assert all(key.encode() for key in images)


def test_what_cannot_be_read_as_a_picture_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"good.png": "x"})
    os.mkfifo(tmp_path / "fifo.jpg")
    os.mkfifo(tmp_path / "fifo.tar")
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(50 * 2**30)
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        assert reasons(tmp_path) == {
            "fifo": "not a regular file",
            "fifo.jpg": "not a regular file",
            "fifo.tar": "not a regular file",
            "huge.jpg": "too large: 53687091200 bytes, expected at most 1073741824",
            "socket.png": "not a regular file",
        }
    with pytest.raises(ValueError, match=r": not a regular file \(--strict\)"):
        list_images(tmp_path, ListingOptions(strict=True))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    write(tmp_path, {"a/1.png": "x", "b/2.png": "x"})
    (tmp_path / "a").chmod(0)
    assert reasons(tmp_path) == {"a": "cannot be read: Permission denied"}


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, {"a/1.png": "x", "b/2.png": "x"})
    scandir, number = os.scandir, [13]

    def failing(path: str) -> object:
        if path.endswith("/a"):
            raise OSError(number[0], os.strerror(number[0]), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    assert reasons(tmp_path) == {"a": "cannot be read: Permission denied"}
    number[0] = 5  # of the disk, not of the folder
    with pytest.raises(OSError, match="Input/output error"):
        list_images(tmp_path)


def test_shards_in_folders_of_the_same_name(tmp_path: Path) -> None:
    for part in ("part-0", "part-1"):
        tar(tmp_path / part / "00000.tar", [("0.jpg", part.encode())])
    assert keys(tmp_path) == ["part-0/00000/0", "part-1/00000/0"]
    assert keys(tmp_path / "part-0") == ["00000/0"]
    assert keys(f"{tmp_path}/part-{{0..1}}/00000.tar") == ["part-0/00000/0", "part-1/00000/0"]


def test_one_key_of_two_shards_is_refused(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", [("b/0.jpg", b"x")])
    tar(tmp_path / "a" / "b.tar", [("0.jpg", b"x")])
    with pytest.raises(
        ValueError, match=r"key 'a/b/0' belongs to both .*a\.tar:b/0\.jpg and .*a/b\.tar:0\.jpg"
    ):
        list_images(tmp_path)


def test_tfrecords_are_named(tmp_path: Path) -> None:
    write(tmp_path, {"00000.tfrecord": "x", "00000.parquet": "x", "00000_stats.json": "{}"})
    with pytest.raises(
        ValueError, match=r"found 1 \.tfrecord files, which only TensorFlow reads: run img2dat"
    ):
        list_images(tmp_path)
