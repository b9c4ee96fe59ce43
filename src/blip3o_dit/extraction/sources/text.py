"""Text that others wrote: in any common encoding, under any of the usual names."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

PATH_NAMES = (
    *("path", "image", "file_name", "file", "filename"),
    *("filepath", "file_path", "image_path", "img_path", "image_file", "img"),
)
CAPTION_NAMES = ("caption", "text", "title", "txt", "captions")
LABEL_NAMES = ("label", "cls", "class")

# A caption file is text of a sentence or a page; only as much of one is read.
MAX_TEXT_BYTES = 2**20
# A note of the listing
NO_OBJECT = "JSON texts that hold no object: no caption or label from them"

_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

_NOT_TEXT = re.compile(r"[\ud800-\udfff\0]|\\(?=x5c|x00|x[89a-f][0-9a-f]|ud[89a-f][0-9a-f]{2})")


def encoding_of(head: bytes) -> tuple[str, int]:
    """The encoding that the first bytes of a text show, and how many of them are its mark; else UTF-8."""
    for mark, name in _BYTE_ORDER_MARKS:
        if head.startswith(mark):
            return name, len(mark)
    if len(head) > 3 and 0 in head[:4]:  # Latin letters in UTF-16 without a mark
        return ("utf-16-be" if head[0] == 0 else "utf-16-le"), 0
    return "utf-8", 0


def decode(data: bytes, encoding: str = "utf-8") -> tuple[str, bool]:
    """The text, and whether it had to be read as Windows-1252 (Latin-1 with quotation marks)."""
    try:
        return data.decode(encoding), False
    except UnicodeDecodeError:
        pass
    try:
        return data.decode("cp1252"), True
    except UnicodeDecodeError:
        return data.decode("latin-1"), True


def decode_text(data: bytes) -> tuple[str, bool]:
    """The same for a whole text, which may begin with a byte order mark."""
    encoding, mark = encoding_of(data[:4])
    return decode(data[mark:], encoding)


def valid_text(text: str) -> str:
    """Text that every encoder takes: bytes that are no UTF-8 and NUL as \\xNN, half surrogates as \\uNNNN.

    Reversible: a backslash that begins such a sequence already becomes \\x5c. All other text is itself.
    """
    return _NOT_TEXT.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # Python's stand-in for a byte that is no UTF-8
        code -= 0xDC00
    return f"\\u{code:04x}" if code > 0xFF else f"\\x{code:02x}"


def text_or_none(value: Any) -> str | None:
    """A caption or label as text: the first of a list, numbers as they are written; else None."""
    while isinstance(value, list | tuple):
        value = next((item for item in value if item not in (None, "")), None)
    if not isinstance(value, str | int | float):
        return None
    return valid_text(str(value)) or None


def column_named(names: Iterable[str], wanted: Iterable[str]) -> str | None:
    """The first of the wanted names that is there, else that in another case ("Title", "TEXT")."""
    names = list(names)
    lower = {name.lower(): name for name in reversed(names) if isinstance(name, str)}
    exact = next((name for name in wanted if name in names), None)
    return exact or next((lower[name] for name in wanted if name in lower), None)


def first_value(row: Mapping[str, Any], wanted: Iterable[str]) -> Any:
    """The first of these that a row has with a value."""
    found = next((row[name] for name in wanted if row.get(name) not in (None, "")), None)
    if found is None and row:
        name = column_named((name for name in row if row[name] not in (None, "")), wanted)
        return row[name] if name else None
    return found


def parse_object(text: str) -> dict[str, Any] | None:
    """A JSON object; None for anything else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
