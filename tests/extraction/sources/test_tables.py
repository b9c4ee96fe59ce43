"""Tables of images: which column, which cells, and what a worker reads of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.extraction.sources.options import ListingOptions
from tests.helpers.sources import keys, listed, reasons, write


def save(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_bytes_structs_and_paths(tmp_path: Path) -> None:
    write(tmp_path, {"x.png": "X", "d/y.png": "Y"})
    structs = [
        {"bytes": b"A", "path": "a.png"},
        {"bytes": None, "path": "x.png"},
        {"bytes": None, "path": None},
        None,
    ]
    images = list_images(save(tmp_path / "s.parquet", {"image": structs}))
    assert [image.read() for image in images[:2]] == [b"A", b"X"]
    for image in images[2:]:
        with pytest.raises(ValueError, match="expected image bytes, found NoneType"):
            image.read()
    assert listed(save(tmp_path / "b.parquet", {"jpg": [b"A", b"B"]})) == [
        ("b/0", None, b"A"),
        ("b/1", None, b"B"),
    ]
    paths = ["x.png", "d/y.png", "gone.png", None, str(tmp_path / "x.png"), "https://example.com/a.png"]
    save(tmp_path / "p.parquet", {"file_name": paths, "text": list("abcdef")})
    assert listed(tmp_path / "p.parquet") == [("p/0", "a", b"X"), ("p/1", "b", b"Y"), ("p/4", "e", b"X")]
    assert reasons(tmp_path / "p.parquet") == {
        "p/2": "No such file or directory",
        "p/3": "expected a path, found none",
        "p/5": "expected a file, found the address 'https://example.com/a.png': download first, "
        "as with img2dataset",
    }


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"x": [b"A"]}, {}, r"expected an image column \(one of .*found \['x'\]"),
        ({"x": [b"A"]}, {"image_column": "y"}, r"expected an image column \(y\), found \['x'\]"),
        ({"image": [b"A"]}, {"caption_column": "y"}, r"expected a caption column y, found \['image'\]"),
        (
            {"image": [5]},
            {},
            "column image: expected bytes, a struct of bytes and path, or paths, found int64",
        ),
        ({"image": [{"url": "a"}]}, {}, "column image: expected bytes, .* found struct<url: string>"),
        ({"image": [[b"A"]]}, {}, "column image: expected bytes, .* found list<"),
    ],
)
def test_columns_that_hold_no_images(tmp_path: Path, columns: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list_images(save(tmp_path / "a.parquet", columns), ListingOptions(**options))


def test_an_unreadable_table_is_one_skipped_entry(tmp_path: Path) -> None:
    save(tmp_path / "en" / "train.parquet", {"image": [b"A"], "Title": [["one", "two"]]})
    save(tmp_path / "de" / "train.parquet", {"image": [b"B"], "Title": [[]]})
    write(tmp_path, {"cut.parquet": (tmp_path / "en" / "train.parquet").read_bytes()[:-9], "empty.arrow": ""})
    assert listed(tmp_path) == [("de/train/0", None, b"B"), ("en/train/0", "one", b"A")]
    assert set(reasons(tmp_path)) == {"cut.parquet", "empty.arrow"}
    with pytest.raises(ValueError, match=r"cut\.parquet: not a readable table"):
        list_images(tmp_path, ListingOptions(strict=True))


def test_rows_are_read_in_any_order_and_in_little_memory(tmp_path: Path) -> None:
    pictures = [bytes([row]) * 100_000 for row in range(200)]
    save(tmp_path / "a.parquet", {"image": pictures}, row_group_size=100, compression="none")
    images = list_images(tmp_path)
    images[0].read()
    before = pyarrow.total_allocated_bytes()
    for row in range(200):
        assert images[row].read() == pictures[row]
        assert pyarrow.total_allocated_bytes() - before < 4e6  # a row group has 10 MB
    for row in (150, 3, 99, 100, 199, 0):
        assert images[row].read() == pictures[row]


def test_a_damaged_cell_is_content_trouble(tmp_path: Path) -> None:
    file = save(tmp_path / "a.parquet", {"image": [b"picture" * 900] * 9}, compression="gzip")
    images = list_images(file)
    data = bytearray(file.read_bytes())
    data[60:90] = b"?" * 30
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"\w"):
        images[8].read()
    save(file, {"image": [b"x"]})
    with pytest.raises(ValueError, match="row 8: expected fewer, found 1"):
        images[8].read()
    file.unlink()
    with pytest.raises(FileNotFoundError):
        list_images(tmp_path / "nothing.parquet")


def test_img2dataset_columns(tmp_path: Path) -> None:
    columns = {
        "key": ["0", "1", "2"],
        "url": ["u"] * 3,
        "status": ["success", "failed_to_download", "success"],
        "jpg": [b"A", None, b"C"],
        "txt": ["a", None, "c"],
    }
    save(tmp_path / "a.parquet", columns)
    assert listed(tmp_path) == [("a/0", "a", b"A"), ("a/2", "c", b"C")]
    assert list_images(tmp_path).ignored == {"failed downloads": 1}
    assert keys(tmp_path, image_column="jpg", caption_column="key") == ["a/0", "a/2"]


@pytest.mark.parametrize("names", [["image", "image", "text"], ["image", "text", "text"]])
def test_a_column_that_comes_twice_is_not_chosen_from(tmp_path: Path, names: list[str]) -> None:
    arrays = [pyarrow.array([b"x"]), pyarrow.array([b"y"]), pyarrow.array(["z"])]
    pyarrow.parquet.write_table(pyarrow.table(arrays, names=names), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"x"]}), tmp_path / "b.parquet")
    assert keys(tmp_path) == ["b/0"]
    assert "expected each column once" in reasons(tmp_path)["a.parquet"]


def test_a_table_without_rows_is_counted(tmp_path: Path) -> None:
    table = pyarrow.table({"image": [b"x"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "b.parquet")
    assert list_images(tmp_path).ignored == {"tables without a row": 1}
