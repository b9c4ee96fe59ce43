"""Text of others: encodings, names of columns, and what no writer takes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from blip3o_dit.extraction.sources.text import (
    column_named,
    decode_text,
    first_value,
    text_or_none,
    valid_text,
)


def back(text: str) -> str:
    """What valid_text promises to be undone by."""

    def one(match: re.Match[str]) -> str:
        code = int(match[2], 16)
        return chr(code + 0xDC00 if match[1] == "x" and code > 0x7F else code)

    return re.sub(r"\\(x)(5c|00|[89a-f][0-9a-f])|\\(u)(d[89a-f]..)", lambda m: one(_groups(m)), text)


def _groups(match: re.Match[str]) -> Any:
    return {1: match[1] or match[3], 2: match[2] or match[4]}


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("plain/é/\U0001f600 \n\x1b.png", "plain/é/\U0001f600 \n\x1b.png"),
        ("a\\b\\x1\\xyz\\u0041", "a\\b\\x1\\xyz\\u0041"),
        ("caf\udce9", "caf\\xe9"),
        ("caf\\xe9", "caf\\x5cxe9"),
        ("\\x5c", "\\x5cx5c"),
        ("half \ud83d", "half \\ud83d"),
        ("\\ud83d", "\\x5cud83d"),
        ("nul\0", "nul\\x00"),
        ("\\\udce9", "\\\\xe9"),
    ],
)
def test_text_that_every_writer_takes(text: str, valid: str) -> None:
    assert valid_text(text) == valid
    assert valid.encode()
    assert back(valid) == text


def test_valid_text_tells_names_apart() -> None:
    pieces = ["\\", "x", "5", "c", "e", "9", "\udce9", "\ud83d", "u", "d", "8", "\0"]
    names = {a + b + c + d for a in pieces for b in pieces for c in pieces for d in pieces}
    names |= {"\\x5c" + name for name in names} | {"\\ud8" + name for name in names}
    assert len({valid_text(name) for name in names}) == len(names)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a", "a"),
        ("", None),
        (None, None),
        (5, "5"),
        (1.5, "1.5"),
        (["a", "b"], "a"),
        ([None, "", ["b"]], "b"),
        ([], None),
        ({"a": 1}, None),
        (b"bytes", None),
    ],
)
def test_captions_and_labels(value: Any, text: str | None) -> None:
    assert text_or_none(value) == text


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings_that_show_themselves(encoding: str) -> None:
    assert decode_text("a cat, é, \U0001f600".encode(encoding)) == ("a cat, é, \U0001f600", False)


def test_encodings_that_do_not() -> None:
    assert decode_text("“é”".encode("cp1252")) == ("“é”", True)
    assert decode_text(b"\x81\xe9") == ("\x81é", True)
    assert decode_text(b"") == ("", False)


def test_names_of_columns() -> None:
    assert column_named(["TITLE", "Caption", "x"], ("caption", "title")) == "Caption"
    assert column_named(["TITLE", "title"], ("title",)) == "title"
    assert column_named([], ("title",)) is None
    assert first_value({"caption": "", "Title": "t"}, ("caption", "title")) == "t"
    assert first_value({"caption": [1]}, ("caption",)) == [1]
    assert first_value({}, ("caption",)) is None
