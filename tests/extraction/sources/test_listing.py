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
from blip3o_dit.extraction.sources.webdataset import list_tar
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


def sources(root: Path) -> dict[str, Path | str]:
    """Seven pictures in each kind of source."""
    (root / "tars").mkdir()
    pictures = {f"{name}.png": f"picture {name}" for name in "abcdefg"}
    write(root / "tree" / "sub", pictures)
    write(root / "tree", {"readme.md": "x", "z/readme.md": "x"})
    (root / "tree" / "z" / "z.png").symlink_to("nothing")
    write(root, {"l.txt": "".join(f"tree/sub/{name}\n" for name in [*pictures, "gone.png"])})
    write(root, {"l.csv": 'path\ntree/sub/a.png\n""\n' + "".join(f"tree/sub/{n}\n" for n in pictures)})
    for first, some in (("0", "abc"), ("1", "defg")):
        tar(root / "tars" / f"{first}.tar", {f"{name}.png": name.encode() for name in some})
    write(root / "tars", {"2.tar": "damaged"})
    for part, table in enumerate((seven_rows().slice(0, 3), seven_rows().slice(3))):
        (root / "tables").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, root / "tables" / f"{part}.parquet")
    places = {name: root / name for name in ("tree", "l.txt", "l.csv", "tars", "tables")}
    return places | {"pattern": f"{root}/tars/{{0,1,2}}.tar"}


@pytest.mark.parametrize("kind", ["tree", "l.txt", "l.csv", "tars", "tables", "pattern"])
def test_a_limit_takes_the_first_of_the_list(kind: str, tmp_path: Path) -> None:
    where = sources(tmp_path)[kind]
    whole = list_images(where)
    for limit in (1, 3, 4, 6):
        some = list_images(where, ListingOptions(limit=limit))
        assert some.refs == whole.refs[:limit]
        assert not [entry for entry in some.skipped if entry["key"] != "l.csv:3"]  # what comes later
    assert list_images(where, ListingOptions(limit=99)).refs == whole.refs
    assert list_images(where, ListingOptions(limit=99)).skipped == whole.skipped
    with pytest.raises(ValueError, match="limit: expected a number of pictures from 1 on, found 0"):
        ListingOptions(limit=0)


def test_a_limit_reads_no_further_than_it_must(tmp_path: Path, monkeypatch: Any) -> None:
    sources(tmp_path)
    module = "blip3o_dit.extraction.sources"
    for name in (f"{module}.folders.list_tar", f"{module}.listing.list_tar"):
        monkeypatch.setattr(name, spy := Spy(list_tar))
        places = [tmp_path / "tars" / f"{number}.tar" for number in range(3)]
        where = tmp_path / "tars" if "folders" in name else places
        assert len(list_images(where, ListingOptions(limit=2))) == 2
        assert spy.names == ["0.tar"]


class Spy:
    def __init__(self, list_tar: Any) -> None:
        self.list_tar, self.names = list_tar, []  # type: ignore[var-annotated]

    def __call__(self, found: Any, name: str) -> None:
        self.names.append(name)
        self.list_tar(found, name)


class TestSeveralPlaces:
    def test_tars_as_the_shell_expands_them(self, tmp_path: Path) -> None:
        sources(tmp_path)
        places = sorted((tmp_path / "tars").glob("*.tar"))
        together, folder = list_images(places), list_images(tmp_path / "tars")
        assert (
            [ref.key for ref in together]
            == [ref.key for ref in folder]
            == [
                *(f"0/{name}" for name in "abc"),
                *(f"1/{name}" for name in "defg"),
            ]
        )
        assert together.digest() == folder.digest() and together.skipped == folder.skipped
        assert [entry["key"] for entry in together.skipped] == ["2.tar"]
        backwards = list_images(places[::-1])
        assert [ref.key for ref in backwards][:4] == [f"1/{name}" for name in "defg"]  # as given
        assert [ref.read() for ref in backwards][:1] == [b"d"]

    def test_folders_keep_their_names_in_the_keys(self, tmp_path: Path) -> None:
        write(tmp_path, {"cats/1.png": "c", "cats/1.txt": "a cat", "more/dogs/1.png": "d"})
        write(tmp_path, {"more/dogs/gone.txt": "x", "more/dogs/.hidden.png": "x"})
        images = list_images([tmp_path / "cats", tmp_path / "more" / "dogs"])
        assert [(ref.key, ref.caption) for ref in images] == [
            ("cats/1.png", "a cat"),
            ("more/dogs/1.png", None),
        ]
        assert images.ignored == {".txt": 1, "hidden .png": 1} and images.root == tmp_path

    def test_lists_and_pictures(self, tmp_path: Path) -> None:
        write(tmp_path, {"x.png": "X", "y.png": "Y", "a.txt": "x.png\nno.png\n", "b.txt": "y.png\n"})
        images = list_images([tmp_path / "a.txt", tmp_path / "b.txt"])
        assert [ref.key for ref in images] == ["x.png", "y.png"]
        assert [entry["key"] for entry in images.skipped] == ["no.png"]
        pictures = list_images([tmp_path / "y.png", tmp_path / "x.png"])
        assert [ref.key for ref in pictures] == ["y.png", "x.png"]

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["x.png", "x.txt"], "x.png and 1 more: expected places of one kind, found 1 pictures, 1 lists"),
            (["sub", "x.png", "notes.md"], "found 1 folders, 1 pictures, 1 other files: name those of one"),
            (["x.png", "x.png"], "key 'x.png' belongs to both"),
            (["x.png", "gone.png"], "gone.png: expected pictures, found nothing there"),
            ([], "nothing: expected places of one kind, found none"),
        ],
    )
    def test_what_does_not_go_together(self, tmp_path: Path, names: list[str], message: str) -> None:
        write(tmp_path, {"sub/0.png": "x", "x.png": "x", "x.txt": "x.png", "notes.md": "x"})
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            list_images([tmp_path / name for name in names])
