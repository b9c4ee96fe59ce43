"""Hugging Face's conventions beside what its library writes today: selected rows, splits, metadata files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from blip3o_dit.extraction.sources.huggingface import split_named
from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.extraction.sources.options import ListingOptions
from tests.helpers.sources import keys, listed, reasons, write


def stream(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    if features:
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def state(folder: Path, data: list[str], indices: list[str] | None = None) -> None:
    files = {"_data_files": [{"filename": name} for name in data]}
    files["_indices_files"] = [{"filename": name} for name in indices or []]
    write(folder, {"state.json": json.dumps(files), "dataset_info.json": "{}"})


def test_the_state_says_which_tables_and_rows(tmp_path: Path) -> None:
    for name in ("a", "b", "cache-1", "tmpx"):
        stream(tmp_path / f"{name}.arrow", {"image": [name.encode() + bytes([n]) for n in range(3)]})
    stream(tmp_path / "indices.arrow", {"indices": [4, 0, 0, 3]})
    state(tmp_path, ["a.arrow", "b.arrow"])
    assert keys(tmp_path) == ["a/0", "a/1", "a/2", "b/0", "b/1", "b/2"]
    assert list_images(tmp_path).ignored == {".arrow": 3, ".json": 2}
    state(tmp_path, ["a.arrow", "b.arrow"], ["indices.arrow"])
    assert listed(tmp_path) == [
        ("a/0", None, b"a\0"),
        ("a/0#2", None, b"a\0"),
        ("b/1", None, b"b\1"),
        ("b/0", None, b"b\0"),
    ]


def test_a_state_that_names_what_is_not_there(tmp_path: Path) -> None:
    stream(tmp_path / "a.arrow", {"image": [b"x"]})
    state(tmp_path, ["a.arrow", "gone.arrow", "../a.arrow"])
    assert keys(tmp_path) == ["a/0"]
    assert reasons(tmp_path) == {
        "gone.arrow": "cannot be read: No such file or directory",
        "state.json": "expected a file name, found '../a.arrow'",
    }
    write(tmp_path, {"state.json": "{"})
    with pytest.raises(ValueError, match=r"none; state\.json: .*not readable JSON"):
        list_images(tmp_path)


def test_a_cached_data_set_without_state(tmp_path: Path) -> None:
    write(tmp_path, {"dataset_info.json": "{}"})
    stream(tmp_path / "cifar-train.arrow", {"img": [b"x"]})
    stream(tmp_path / "cache-0.arrow", {"img": [b"x"]})
    assert keys(tmp_path) == ["cifar-train/0"]
    stream(tmp_path / "cifar-test.arrow", {"img": [b"x"]})
    with pytest.raises(ValueError, match="expected files of one split, found 1 of test, 1 of train"):
        list_images(tmp_path)


def test_columns_by_their_features(tmp_path: Path) -> None:
    features = {"photo": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    stream(
        tmp_path / "a.arrow", {"photo": [b"x"] * 4, "label": [1, -1, None, 9], "image": ["u"] * 4}, features
    )
    assert [(image.column, image.label) for image in list_images(tmp_path)] == [
        ("photo", "dog"),
        ("photo", None),
        ("photo", None),
        ("photo", None),
    ]
    two = {"left": {"_type": "Image"}, "right": {"_type": "Image"}}
    stream(tmp_path / "a.arrow", {"left": [b"x"], "right": [b"y"]}, two)
    with pytest.raises(
        ValueError, match=r"expected one image column, found \['left', 'right'\]: see --image_c"
    ):
        list_images(tmp_path)
    assert listed(tmp_path, image_column="right") == [("a/0", None, b"y")]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("my_data.VAL.parquet", "validation"),
        ("imagenet-test-000.tar", "test"),
        ("trainers.tar", None),
        ("0000.parquet", None),
    ],
)
def test_which_names_say_a_split(name: str, split: str | None) -> None:
    assert split_named(name) == split


@pytest.mark.parametrize(
    ("files", "examples"),
    [
        (["data/train-0.parquet", "data/test-0.parquet"], ["data/test*.parquet", "data/train*.parquet"]),
        (
            ["default/train/0000.parquet", "default/validation/0000.parquet"],
            ["default/train", "default/validation"],
        ),
        (["x-train-1.tar", "x-val-1.tar"], ["x-train*.tar", "x-val*.tar"]),
    ],
)
def test_splits_are_refused_with_what_to_write(tmp_path: Path, files: list[str], examples: list[str]) -> None:
    write(tmp_path, dict.fromkeys(files, "x"))
    with pytest.raises(ValueError, match="expected files of one split, found") as caught:
        list_images(tmp_path)
    assert all(f"'{tmp_path}/{example}'" in str(caught.value) for example in examples)


ROWS = [
    {"file_name": "a.png", "text": "one", "label": 3, "mask_file_name": "m.png"},
    {"file_name": "sub/b.png", "text": ["two", "other"], "mask_file_name": "m.png"},
    {"file_name": "gone.png", "text": "x"},
    {"file_name": "../out.png", "text": "x"},
    {"file_name": "/etc/passwd", "text": "x"},
    {"file_name": "a.png", "text": "again"},
]


def test_metadata_of_an_image_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["a.png", "sub/b.png", "sub/c.png", "m.png"]
    write(tmp_path, dict.fromkeys(names, "x") | {"sub/c.txt": "three"})
    write(tmp_path, {"metadata.jsonl": "\n".join(map(json.dumps, ROWS))})
    with caplog.at_level("INFO"):
        images = list_images(tmp_path)
    found = [(image.key, image.caption, image.label) for image in images]
    assert found == [("a.png", "one", "3"), ("sub/b.png", "two", None), ("sub/c.png", "three", None)]
    assert images.ignored == {"named by another column of a metadata file": 1}
    assert [entry["key"] for entry in images.skipped] == [
        "gone.png",
        "metadata.jsonl:4",
        "metadata.jsonl:5",
    ]
    assert "1 rows of metadata files that name a picture again" in caplog.text
    assert keys(tmp_path, image_column="mask") == ["m.png", "sub/c.png"]
    with pytest.raises(ValueError, match=r"metadata\.jsonl: expected one of the columns"):
        list_images(tmp_path, ListingOptions(image_column="nothing", strict=True))


def test_metadata_of_sub_folders_and_strangers(tmp_path: Path) -> None:
    write(tmp_path, {"train/a.png": "x", "train/metadata.csv": "file_name;text\na.png;one\n"})
    write(tmp_path, {"test/a.png": "x", "metadata.csv": "id,price\n1,2\n"})
    found = [(image.key, image.caption, image.label) for image in list_images(tmp_path)]
    assert found == [("test/a.png", None, None), ("train/a.png", "one", None)]
    write(tmp_path, {"metadata.jsonl": "[1]\n"})
    assert keys(tmp_path) == ["test/a.png", "train/a.png"]


def test_rows_of_metadata_that_name_nothing_are_listed(tmp_path: Path) -> None:
    rows = [{"text": "x"}, {"file_name": "a.png", "mask_file_name": None}, {"file_name": ""}, {"text": "y"}]
    write(tmp_path, {"a.png": "x", "metadata.jsonl": "\n".join(map(json.dumps, rows))})
    assert keys(tmp_path) == ["a.png"]
    assert list(reasons(tmp_path)) == ["metadata.jsonl:1", "metadata.jsonl:3", "metadata.jsonl:4"]
    write(tmp_path, {"metadata.jsonl": '{"text": "about something else"}'})
    assert list_images(tmp_path).ignored == {".jsonl": 1} and not reasons(tmp_path)
    write(tmp_path, {"metadata.jsonl": "", "metadata.csv": "file_name,text\na.png,one\na.png\n"})
    assert [image.caption for image in list_images(tmp_path)] == ["one"]
    assert list(reasons(tmp_path)) == ["metadata.csv:3"]
    write(tmp_path, {"metadata.csv": "file_name,text,text\na.png,one,two\n"})
    assert "'text' more than once" in reasons(tmp_path)["metadata.csv"]


def test_selected_rows_that_are_not_there_are_listed(tmp_path: Path) -> None:
    stream(tmp_path / "a.arrow", {"image": [b"x", b"y"]})
    stream(tmp_path / "indices.arrow", {"indices": [1, 2, None, -1, 0]})
    state(tmp_path, ["a.arrow"], ["indices.arrow"])
    assert keys(tmp_path) == ["a/1", "a/0"]
    assert list(reasons(tmp_path)) == ["indices.arrow:1", "indices.arrow:2", "indices.arrow:3"]
