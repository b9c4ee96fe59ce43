"""JSON that anyone may have written, and what is shown of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip3o_dit.utils.json_files import printable, read_json, short_repr, show_names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"\xff{}", "decode"),
        (b'{"a": NaN}', "expected a number, found NaN"),
        (b"[-Infinity]", "expected a number, found -Infinity"),
        (b'{"a": 1, "b": {"a": 2, "a": 3}}', "expected each name once, found 'a' more than once"),
        (b"[" * 5000, "recursion"),
        (b"9" * 5000, "4300 digits"),
        (b"[" + b"[]," * 1_000_000 + b"1]", "expected fewer lists and objects, found 1000001"),
    ],
)
def test_what_is_no_json_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/x.json: ") as caught:
        read_json(tmp_path / "x.json")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(ValueError, match="expected at most 67108864 bytes of JSON, found 67108865"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000, "a\nb\x1b[2J\ud800", 10**5000, [[[[[[1]]]]]], list(range(999)), {"k" * 999: 1}],
    ids=range(6),
)
def test_what_is_shown_is_short_and_on_one_line(value: object) -> None:
    for text in (short_repr(value), short_repr([value]), printable("a\x1b[2J")):
        assert len(text) < 200 and text.isprintable()


def test_names_are_counted_beyond_the_first() -> None:
    assert show_names({"b", "a"}) == "['a', 'b']"
    assert show_names("fedcba") == "['a', 'b', 'c', 'd', ... 2 more]"
