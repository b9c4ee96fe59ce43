"""Strict reading of JSON that anyone may have written, and showing untrusted content on one short line."""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any, NoReturn

# Largest JSON file that is read whole, in bytes, but for a store's manifest.
MAX_JSON_BYTES = 2**26

# What an empty list or object takes in memory, and how much of that a file may ask for beyond its own size:
# "[[],[]," holds twenty times its length.
_CONTAINER = 72
_GROWTH, _FREE = 8, 2**24


def read_json(file: Path, *, non_finite: bool = False, most: int = MAX_JSON_BYTES) -> Any:
    """The content of a JSON file: UTF-8, not too large or too deep, no name twice in an object.

    `non_finite` also takes NaN, Infinity and -Infinity, which Python writes and JSON does not have.

    Raises:
        ValueError: one line naming the file: not UTF-8, not JSON, too large or too deep, or an object that
            gives a name twice.
    """
    size = file.stat().st_size
    if size > most:
        raise ValueError(f"{file}: expected at most {most} bytes of JSON, found {size}")
    return parse_json(file, file.read_bytes(), non_finite=non_finite)


def read_json_object(file: Path, *, non_finite: bool = False) -> dict[str, Any]:
    """The object in a JSON file; see `read_json`. Raises ValueError, naming the file, for anything else."""
    values = read_json(file, non_finite=non_finite)
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected an object, found {short_repr(values)}")
    return values


def parse_json(where: str | Path, content: bytes, *, non_finite: bool = False) -> Any:
    """The same for bytes that were read; `where` names them in a message."""
    containers = content.count(b"[") + content.count(b"{")
    if _CONTAINER * containers > _GROWTH * len(content) + _FREE:
        raise ValueError(f"{where}: expected fewer lists and objects, found {containers} in the file")
    try:
        constant = float if non_finite else _no_constant
        return json.loads(content, object_pairs_hook=unique_names, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not readable JSON: {one_line(error)}") from error


def finite_or_none(value: Any) -> Any:
    """The value with None for every number in it that is NaN or infinite: JSON has no such numbers."""
    if isinstance(value, dict):
        return {name: finite_or_none(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these members, for `json.loads`. Raises ValueError for a name that comes twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in values if names.count(name) > 1)
        raise ValueError(f"expected each name once, found {short_repr(twice)} more than once")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"expected a number, found {name}")


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100
        self.maxlong = 60
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write very long integers in decimal, with an error of its own
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"<{x.bit_length()} bits>"


_SHORT = _Short()


def weight_files_of(index: Path) -> list[Path]:
    """The files that a checkpoint's index names, beside it. Raises ValueError for any other index."""
    values = read_json(index)
    names = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{index}: expected a weight_map of file names, found {short_repr(names)}")
    for name in names.values():
        if not is_plain_name(name):
            raise ValueError(f"{index}: expected plain file names, found {short_repr(name)}")
    return [index.parent / name for name in sorted(set(names.values()))]


def is_plain_name(name: str) -> bool:
    """Whether a name out of a file is one of a file beside it, and fit for a message."""
    plain = "/" not in name and name not in ("", ".", "..")
    return plain and name.isprintable() and len(name) <= 100


def one_line(error: BaseException, *, max_length: int = 200) -> str:
    """Another library's message, which may repeat a file's content, short and on one line."""
    text = " ".join(str(error).split())[:max_length] or type(error).__name__
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def short_repr(value: Any) -> str:
    """A value out of a file, as Python writes it, short enough for a message and on one line."""
    return _SHORT.repr(value)


def printable(value: Any) -> str:
    """Text out of a file for a terminal, where control characters would act."""
    text = str(value)[:200]
    return text if text.isprintable() else short_repr(text)


def escaped(text: str) -> str:
    """Text on one line that every terminal, page and plot shows: what does not print is written as Python
    escapes it, control characters, turned directions and half surrogates of file names among it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show_names(names: Any) -> str:
    """The first of these names, sorted, as a list."""
    listed = sorted(map(str, names))
    return short_repr(listed[:4])[:-1] + (f", ... {len(listed) - 4} more]" if len(listed) > 4 else "]")
