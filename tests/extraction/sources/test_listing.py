"""Where images come from: order, keys, captions, and one line for what cannot be understood."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.extraction.sources.options import ListingOptions
from tests.helpers.sources import write


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def listed(path: Path, **columns: Any) -> list[tuple[str, str | None, bytes]]:
    return [(ref.key, ref.caption, ref.read()) for ref in list_images(path, ListingOptions(**columns))]


def test_a_folder_tree(tmp_path: Path) -> None:
    files = {"b/1.JPG": "B", "a/2.png": "A", "a/2.txt": " two\n", "a-b.webp": "C", "notes.md": "x"}
    write(tmp_path, {**files, ".hidden/3.png": "x", "a/.4.png": "x"})
    (tmp_path / "loop").symlink_to(tmp_path)
    assert listed(tmp_path) == [("a-b.webp", None, b"C"), ("a/2.png", "two", b"A"), ("b/1.JPG", None, b"B")]


def test_list_files(tmp_path: Path) -> None:
    write(tmp_path, {"x.png": "X", "y/z.png": "Z"})
    write(tmp_path, {"l.txt": "x.png\ta caption\n\ny/z.png\nx.png\n"})
    assert listed(tmp_path / "l.txt") == [
        ("x.png", "a caption", b"X"),
        ("y/z.png", None, b"Z"),
        ("x.png#2", None, b"X"),
    ]
    write(tmp_path, {"l.csv": 'path,caption\nx.png,"one, two"\n'})
    assert listed(tmp_path / "l.csv") == [("x.png", "one, two", b"X")]
    rows = [{"file_name": "y/z.png", "text": "t", "key": "mine"}, {"image": "x.png"}]
    write(tmp_path, {"l.jsonl": "\n".join(map(json.dumps, rows))})
    assert listed(tmp_path / "l.jsonl") == [("mine", "t", b"Z"), ("x.png", None, b"X")]


def test_webdataset_tars(tmp_path: Path) -> None:
    members = {"0001.jpg": b"one", "0001.txt": b"caption one", "0002.png": b"two"}
    tar(tmp_path / "b.tar", members | {"0002.json": b'{"caption": "from json"}', "readme.md": b"x"})
    tar(tmp_path / "a.tar", {"dir/7.webp": b"seven"})
    expected = [("b/0001", "caption one", b"one"), ("b/0002", "from json", b"two")]
    assert listed(tmp_path / "b.tar") == expected
    assert listed(tmp_path) == [("a/dir/7", None, b"seven"), *expected]
    assert "b.tar:0001.jpg" in list_images(tmp_path / "b.tar")[0].location


def test_a_reference_is_small_and_travels(tmp_path: Path) -> None:
    write(tmp_path, {"a.png": "A"})
    ref = list_images(tmp_path)[0]
    assert pickle.loads(pickle.dumps(ref)).read() == b"A"
    assert not hasattr(ref, "__dict__")


REFUSED: dict[str, tuple[dict[str, bytes | str], str, str]] = {
    "nothing": ({}, "gone", "found nothing there"),
    "empty folder": ({"notes.md": "x"}, ".", "expected at least one picture, found none"),
    "mixed": ({"a.png": "x", "b.parquet": "x"}, ".", "one kind of source, found 1 tables, 1 pictures"),
    "compressed tar": ({"a.tar.gz": "x"}, "a.tar.gz", "not a whole tar: Not a gzipped file"),
    "damaged tar": (
        {"a.tar": "not a tar, but long enough to be read as a header" * 20},
        "a.tar",
        "not a whole tar",
    ),
    "unknown": ({"a.zip": "x"}, "a.zip", r"found a text file named \.zip"),
    "csv header": ({"a.csv": "foo,bar\n1,2\n"}, "a.csv", "line 1: expected a header"),
    "json line": ({"a.jsonl": '{"path": "x.png"}\n{\n'}, "a.jsonl", "not readable JSON: line 2"),
    "json kind": ({"a.jsonl": "[1]\n"}, "a.jsonl", "line 1: expected an object, found list"),
    "no path": ({"a.jsonl": '{"caption": "x"}\n'}, "a.jsonl", "no path: line 1"),
    "same key": (
        {"a.jsonl": '{"path": "x.png", "key": "k"}\n{"path": "y.png", "key": "k"}\n'},
        "a.jsonl",
        "line 2: key 'k' is on line 1 already",
    ),
    "not text": ({"a.txt": b"\xff\xfe\x00\x80"}, "a.txt", "found none; \u8000: No such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_understood_is_refused(name: str, tmp_path: Path) -> None:
    files, path, message = REFUSED[name]
    write(tmp_path, files)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        list_images(tmp_path / path)
    assert str(tmp_path) in str(caught.value)


def test_a_truncated_tar_is_refused_and_a_shrunken_file_noticed(tmp_path: Path) -> None:
    whole = tar(tmp_path / "a.tar", {"1.png": b"x" * 5000, "2.png": b"y" * 5000})
    ref = list_images(whole)[1]
    whole.write_bytes(whole.read_bytes()[:7000])
    with pytest.raises(ValueError, match="expected 5000 bytes"):
        ref.read()


def seven_rows() -> pyarrow.Table:
    images = [{"bytes": f"picture {i}".encode(), "path": None} for i in range(7)]
    return pyarrow.table({"image": images, "text": [f"t{i}" for i in range(7)]})


def test_a_saved_hugging_face_dataset(tmp_path: Path) -> None:
    write(tmp_path, {"dataset_info.json": "{}", "state.json": "{}"})
    table = seven_rows()
    file = str(tmp_path / "data.arrow")
    with pyarrow.OSFile(file, "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    assert listed(tmp_path) == [(f"data/{i}", f"t{i}", f"picture {i}".encode()) for i in range(7)]


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.parquet": "not parquet"})
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable table"):
        list_images(tmp_path)


def test_parquet(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(seven_rows(), tmp_path / "part.parquet", row_group_size=3)
    assert listed(tmp_path) == [(f"part/{i}", f"t{i}", f"picture {i}".encode()) for i in range(7)]
    with pytest.raises(ValueError, match=r"expected an image column \(photo\)"):
        list_images(tmp_path, ListingOptions(image_column="photo"))


def test_without_pyarrow_parquet_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    write(tmp_path, {"a.parquet": "x"})
    with pytest.raises(ValueError, match=r"pip install pyarrow$"):
        list_images(tmp_path)
