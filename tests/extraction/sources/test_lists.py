"""List files: headers, separators, encodings, and rows that name nothing."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.extraction.sources.options import ListingOptions
from tests.helpers.sources import keys, listed, reasons, write, write_raw


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write(tmp_path, {"x.png": "X", "y/z.png": "Z", "é.png": "E"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("open_clip.csv", "filepath\ttitle\nx.png\tone, two\n"),
        ("comma.csv", 'filepath,title\nx.png,"one, two"\n'),
        ("semicolon.csv", "image;caption\nx.png;one, two\n"),
        ("bar.csv", "path|text\nx.png|one, two\n"),
        ("quoted.csv", '"id","path","caption"\n1,"x.png","one, two"\n'),
        ("upper.csv", 'ID,Image,TEXT\n1,x.png,"one, two"\n'),
        ("spaces.csv", 'path, caption\nx.png,"one, two"\n'),
        ("header.tsv", "title\tfilepath\none, two\tx.png\n"),
        ("plain.tsv", "x.png\tone, two\n"),
        ("header.txt", 'path,caption\nx.png,"one, two"\n'),
        ("returns.csv", 'path,caption\r\rx.png,"one, two"\r'),
        ("crlf.txt", "\r\nx.png\tone, two\r\n"),
        ("json.jsonl", '\n{"Image": "x.png", "captions": ["one, two", "other"]}\n'),
    ],
)
def test_headers_and_separators(pictures: Path, name: str, text: str) -> None:
    (pictures / name).write_bytes(text.encode())
    assert listed(pictures / name) == [("x.png", "one, two", b"X")]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252"]
)
@pytest.mark.parametrize("name", ["l.csv", "l.txt", "l.jsonl"])
def test_encodings(pictures: Path, name: str, encoding: str, caplog: pytest.LogCaptureFixture) -> None:
    rows = {
        "l.csv": "path,caption\nx.png,ascii\né.png,ü\n",
        "l.txt": "x.png\tascii\né.png\tü\n",
        "l.jsonl": '{"path": "x.png", "caption": "ascii"}\n{"path": "é.png", "caption": "ü"}\n',
    }
    (pictures / name).write_bytes(rows[name].encode(encoding))
    with caplog.at_level("INFO"):
        assert listed(pictures / name) == [("x.png", "ascii", b"X"), ("é.png", "ü", b"E")]
    said = "1 lines that are no UTF-8, read as Windows-1252" in caplog.text
    assert said == (encoding in ("latin-1", "cp1252"))


def test_names_as_another_system_writes_them(tmp_path: Path) -> None:
    write_raw(tmp_path, b"caf\xe9.png", b"latin")
    write(tmp_path, {"u\u0308.png": "apart", "l.txt": "café.png\nü.png\n"})
    assert listed(tmp_path / "l.txt") == [("café.png", None, b"latin"), ("ü.png", None, b"apart")]


def test_where_paths_lead(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(pictures / "y"))
    write(pictures, {"lists/l.txt": f"../x.png\n{pictures}/y/z.png\n~/z.png\n"})
    assert [data for _, _, data in listed(pictures / "lists" / "l.txt")] == [b"X", b"Z", b"Z"]


def test_rows_that_name_nothing_are_skipped(pictures: Path) -> None:
    write(
        pictures,
        {"notes.md": "x", "l.csv": "path,caption\ngone.png,a\n,b\nx.png,c\ny,d\n" + "n" * 300 + ",e\n"},
    )
    assert keys(pictures / "l.csv") == ["x.png"]
    found = reasons(pictures / "l.csv")
    assert found.pop("n" * 300) == "File name too long"
    assert found == {
        "gone.png": "No such file or directory",
        "l.csv:3": found["l.csv:3"],
        "y": "not a regular file",
    }
    assert found["l.csv:3"].startswith("no path: line 3")
    write(pictures, {"nul.jsonl": '{"path": "x.png"}\n{"path": "a\\u0000"}\n{"path": "~b\\u0000"}\n'})
    assert reasons(pictures / "nul.jsonl") == {
        "a\\x00": "embedded null byte",
        "~b\\x00": "embedded null byte",
    }
    with pytest.raises(ValueError, match=r"gone\.png: No such file or directory \(--strict\)"):
        list_images(pictures / "l.csv", ListingOptions(strict=True))


def test_damaged_json_lines_are_skipped(pictures: Path) -> None:
    write(pictures, {"l.jsonl": '{"path": "x.png"}\n{"path": "y/z.png", "cap\n[1]\n{"path": 5}\n'})
    assert keys(pictures / "l.jsonl") == ["x.png"]
    assert list(reasons(pictures / "l.jsonl")) == ["l.jsonl:2", "l.jsonl:3", "l.jsonl:4"]


@pytest.mark.parametrize(
    "text",
    ["path\nhttps://example.com/a.jpg\n", "path\ns3://bucket/a.jpg\nx.png\n", "image,t\nhttp://x/y,z\n"],
)
def test_addresses_are_one_line(pictures: Path, text: str) -> None:
    write(pictures, {"l.csv": text})
    with pytest.raises(
        ValueError, match=r"l\.csv: line 2: expected a file, found the address '.*: download fir"
    ):
        list_images(pictures / "l.csv")
    with pytest.raises(ValueError, match=r"^https://example.com/a: expected a path, found an address"):
        list_images("https://example.com/a")


def test_columns_by_name(pictures: Path) -> None:
    write(pictures, {"l.csv": "image;second;words\nx.png;y/z.png;one|two\n"})
    named = dict(image_column="second", caption_column="words")
    assert listed(pictures / "l.csv", **named) == [("y/z.png", "one|two", b"Z")]
    with pytest.raises(ValueError, match=r"expected a column nothing, found \['image', 'second', 'words'\]"):
        list_images(pictures / "l.csv", ListingOptions(caption_column="nothing"))
    write(pictures, {"l.txt": "path a^caption\nx.png^one\n"})
    assert listed(pictures / "l.txt", csv_separator="^", image_column="path a", caption_column="caption") == [
        ("x.png", "one", b"X")
    ]
    with pytest.raises(ValueError, match="csv_separator: expected one character or tab"):
        ListingOptions(csv_separator="||")
    assert ListingOptions(csv_separator="tab").csv_separator == "\t"


def test_a_picture_may_come_twice_and_a_key_may_not(pictures: Path) -> None:
    write(pictures, {"l.txt": "x.png\nx.png\nx.png\n", "l.jsonl": '{"path": "x.png", "key": "\\ud800"}\n'})
    assert keys(pictures / "l.txt") == ["x.png", "x.png#2", "x.png#3"]
    assert keys(pictures / "l.jsonl") == ["\\ud800"]


ROWS = "path,caption\n"


@pytest.mark.parametrize(
    ("text", "captions", "skipped"),
    [
        ("x.png,one,two\nx.png,one\n", ["one"], {2: "expected 2 cells, found 3"}),
        ("x.png\nx.png,one\n", ["one"], {2: "expected 2 cells, found 1"}),
        ("x.png,one,,  \n", ["one"], {}),  # nothing is lost with empty cells
        ("\n   \nx.png,one\n\n", ["one"], {}),
        (",\n,,,\nx.png,one\n", ["one"], {2: "no path", 3: "no path"}),
        ('x.png,"two\nlines"\nx.png,one\n', ["two\nlines", "one"], {}),
        ('x.png,"open\nx.png,one\nx.png,two\n', ["one", "two"], {2: "unexpected end of data (a quote"}),
        ('x.png,"open\nx.png,"one"\nx.png,"two"\n', ["one", "two"], {2: "expected after"}),
        ('x.png,"one"\nx.png,"open', ["one", "open"], {}),  # the last row is whole
        ("x.png,one\n\ufeffx.png,two\n", ["one"], {}),  # files joined by cat: no such file
        ("x.png,a,b\n" * 2 + "x.png,one\n", ["one"], {2: "found 3", 3: "found 3"}),
    ],
)
def test_no_row_is_lost(pictures: Path, text: str, captions: list[str], skipped: dict[int, str]) -> None:
    write(pictures, {"l.csv": ROWS + text})
    assert [caption for _, caption, _ in listed(pictures / "l.csv")] == captions
    found = reasons(pictures / "l.csv")
    assert [key for key in found if "\ufeff" not in key] == [f"l.csv:{line}" for line in skipped]
    assert ("\ufeff" in text) == (found.pop("\ufeffx.png", None) is not None)
    for line, reason in skipped.items():
        assert reason in found[f"l.csv:{line}"] and f"line {line}:" in found[f"l.csv:{line}"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.csv", "path,caption,caption\nx.png,a,b\n", "line 1: expected each column once, found 'caption'"),
        ("l.tsv", "path\tpath\nx.png\tx.png\n", "found 'path' more than once"),
        ("l.jsonl", '{"path": "x.png", "path": "y/z.png"}\n', "line 1: expected each name once"),
        ("l.csv", '"path,caption\nx.png,a\n', "line 1: no readable header: unexpected end"),
    ],
)
def test_a_name_that_comes_twice_is_not_chosen_from(
    pictures: Path, name: str, text: str, message: str
) -> None:
    write(pictures, {name: text})
    with pytest.raises(ValueError, match=message):
        list_images(pictures / name)


def test_columns_without_a_name_may_be_several(pictures: Path) -> None:
    write(pictures, {"l.csv": ",,path\n0,a,x.png\n"})
    assert keys(pictures / "l.csv") == ["x.png"]


def test_any_key_that_is_given_is_taken(pictures: Path) -> None:
    write(pictures, {"l.jsonl": '{"path": "x.png", "key": 0}\n{"path": "x.png", "key": null}\n'})
    assert keys(pictures / "l.jsonl") == ["0", "x.png"]


def test_a_long_list_with_one_open_quote_is_read_once(pictures: Path) -> None:
    write(pictures, {"l.csv": ROWS + 'x.png,"open\n' + "x.png,one\n" * 20_000})
    started = time.monotonic()
    assert len(keys(pictures / "l.csv")) == 20_000 and time.monotonic() - started < 10
