"""Webdataset tars: samples of several members, whatever their order, and tars that are not whole."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from pathlib import Path

import pytest

from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.extraction.sources.options import ListingOptions
from tests.helpers.sources import keys, listed, reasons, tar, write

SAMPLE = [
    ("d.0/0001.jpg", b"picture"),
    ("d.0/0001.seg.png", b"mask"),
    ("d.0/0001.depth.png", b"depth"),
    ("d.0/0001.json", b'{"caption": "by json", "label": 7}'),
    ("d.0/0001.txt", b"by text"),
    ("d.0/0001.cls", b"3"),
]


@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_members_does_not_matter(tmp_path: Path, seed: int) -> None:
    order = list(itertools.permutations(SAMPLE))[seed * 119]
    images = list_images(tar(tmp_path / "a.tar", order))
    assert [(i.key, i.caption, i.label, i.read()) for i in images] == [
        ("a/d.0/0001", "by text", "3", b"picture")
    ]
    assert images.ignored == {".seg.png": 1, ".depth.png": 1}


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        (["png", "jpg"], "jpg"),
        (["PNG", "WebP"], "png"),
        (["seg.png", "image.png"], "image.png"),
        (["img", "mask.png"], "img"),
        (["tiff", "gif"], "gif"),
        (["avif"], "avif"),
        (["image.0.jpg"], "image.0.jpg"),
    ],
)
def test_which_member_is_the_image(tmp_path: Path, fields: list[str], chosen: str) -> None:
    members = [(f"0.{part}", part.lower().encode()) for part in fields]
    images = list_images(tar(tmp_path / "a.tar", members))
    assert [image.read().decode() for image in images] == [chosen]
    assert sum(images.ignored.values()) == len(fields) - 1


def test_the_member_by_name(tmp_path: Path) -> None:
    tar(tmp_path / "a.tar", [*SAMPLE, ("2.npz.bin", b"odd"), ("2.jpg", b"two")])
    assert [data for *_, data in listed(tmp_path, image_field=".Depth.png;jpg")] == [b"depth", b"two"]
    assert [data for *_, data in listed(tmp_path, image_field="npz.bin")] == [b"odd"]
    found = list_images(tmp_path, ListingOptions(image_field="npz.bin")).skipped
    assert [entry["key"] for entry in found] == ["a/d.0/0001"]
    assert "expected a field npz.bin, found jpg, seg.png, depth.png" in found[0]["reason"]


def test_samples_without_one_image(tmp_path: Path) -> None:
    members = [("0.jpg", b"x"), ("1.seg.png", b"x"), ("2.jpg", b"x"), ("2.JPG", b"x"), ("3.txt", b"alone")]
    tar(tmp_path / "a.tar", [*members, ("4.npy", b"x"), ("._0.jpg", b"x"), ("README", b"x")])
    images = list_images(tmp_path)
    assert [image.key for image in images] == ["a/0"]
    assert {entry["key"]: entry["reason"] for entry in images.skipped} == {
        "a/1": "expected a field jpg, png, ..., found seg.png: see --image_field",
        "a/2": "2 members with the field jpg",
    }
    assert images.ignored == {".txt": 1, ".npy": 1, ".jpg": 1, "without a usual suffix": 1}


@pytest.mark.parametrize(
    ("name", "text", "caption"),
    [
        ("0.caption", b"one", "one"),
        ("0.text", "é".encode("utf-16"), "é"),
        ("0.caption.txt", "é".encode("latin-1"), "é"),
        ("0.json", b'{"text": ["one", "two"]}', "one"),
        ("0.json", json.dumps({"caption": None, "title": "t"}).encode(), "t"),
        ("0.json", b"[1, 2", None),
        ("0.json", b"[" * 100_000, None),
        ("0.txt", b" ", None),
    ],
)
def test_captions(tmp_path: Path, name: str, text: bytes, caption: str | None) -> None:
    images = list_images(tar(tmp_path / "a.tar", [("0.png", b"x"), (name, text)]))
    assert [image.caption for image in images] == [caption]


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.bz2", "w:bz2"), ("a.TAR.XZ", "w:xz")]
)
def test_compressed_tars(tmp_path: Path, name: str, mode: str) -> None:
    tar(tmp_path / name, [(f"{n}.jpg", bytes([n]) * 5000) for n in range(9)], mode)
    images = list_images(tmp_path)
    assert [image.key for image in images] == [f"a/{n}" for n in range(9)]
    for number in (0, 3, 8, 1, 5):
        assert images[number].read() == bytes([number]) * 5000
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole tar"):
        list_images(tmp_path)
    with pytest.raises(ValueError, match=r"expected a \.tar, \.tar\.gz"):
        list_images(write(tmp_path, {"b.tar.zst": "x"}) / "b.tar.zst")


def test_links_and_holes(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:

        def add(name: str, data: bytes = b"", **changes: object) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in changes.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(data))

        add("d/early.jpg", type=tarfile.SYMTYPE, linkname="../0.jpg")
        add("0.jpg", b"picture")
        add("0.txt", b"caption")
        add("1.jpg", type=tarfile.LNKTYPE, linkname="0.jpg")
        add("1.txt", type=tarfile.LNKTYPE, linkname="0.txt")
        add("2.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add("3.jpg", type=tarfile.FIFOTYPE)
        add("folder.jpg", type=tarfile.DIRTYPE)
    assert listed(tmp_path) == [
        ("a/0", "caption", b"picture"),
        ("a/d/early", None, b"picture"),
        ("a/1", "caption", b"picture"),
    ]
    assert reasons(tmp_path) == {
        "a/2": "a link to /etc/passwd, which is not in the tar",
        "a/3": "not a regular file",
    }


def test_a_shard_that_is_not_whole_is_one_skipped_entry(tmp_path: Path) -> None:
    members = [(f"{n}.jpg", b"x" * 700) for n in range(5)]
    tar(tmp_path / "good.tar", members)
    whole = (tmp_path / "good.tar").read_bytes()
    damaged = bytearray(whole)
    damaged[3 * 1536 : 3 * 1536 + 200] = b"?" * 200  # a header in the middle: tarfile takes it for the end
    write(tmp_path, {"cut.tar": whole[:4000], "empty.tar": "", "noise.tar": "noise" * 300})
    write(tmp_path, {"hole.tar": bytes(damaged), "joined.tar": whole + whole})
    (tmp_path / "gone.tar").symlink_to("nowhere.tar")
    images = list_images(tmp_path)
    assert [image.key for image in images] == [f"good/{n}" for n in range(5)]
    bad = {entry["key"]: entry["reason"].split(":")[0] for entry in images.skipped}
    assert bad == {
        **dict.fromkeys(["cut.tar", "empty.tar", "noise.tar", "hole.tar", "joined.tar"], "not a whole tar"),
        "gone.tar": "a link to what is not there",
    }
    with pytest.raises(ValueError, match=r"\(--strict\)"):
        list_images(tmp_path, ListingOptions(strict=True))


def test_a_range_of_shards(tmp_path: Path) -> None:
    for number in (0, 1, 3):
        tar(tmp_path / f"{number:05d}.tar", [("0.jpg", b"x")])
    images = list_images(f"{tmp_path}/{{00000..00003}}.tar")
    assert [image.key for image in images] == ["00000/0", "00001/0", "00003/0"]
    assert [entry["key"] for entry in images.skipped] == ["00002.tar"]
    assert images.root == tmp_path
    assert keys(f"{tmp_path}/{{00003,00001}}.tar") == ["00003/0", "00001/0"]
    assert keys(f"{tmp_path}/0000[01].tar") == ["00000/0", "00001/0"]


def test_names_in_another_encoding(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        archive.addfile(tarfile.TarInfo("./é.jpg"))
    image = list_images(tmp_path)[0]
    assert image.key == "a/\\xe9" and image.location.encode()


def test_what_a_tar_does_not_hold_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tar(tmp_path / "a.tar", [("0.jpg", b"x"), ("0.json", b"{"), ("1.jpg", b"y"), ("1.json", b"[1]")])
    tar(tmp_path / "b.tar", [])
    with caplog.at_level("INFO"):
        assert list_images(tmp_path).ignored == {"tars without a member": 1}
    assert "2 JSON texts that hold no object" in caplog.text
    caplog.clear()
    write(tmp_path / "tree", {"0.jpg": b"x", "0.json": "{"})
    with caplog.at_level("INFO"):
        assert keys(tmp_path / "tree") == ["0.jpg"]
    assert "1 JSON texts that hold no object" in caplog.text
