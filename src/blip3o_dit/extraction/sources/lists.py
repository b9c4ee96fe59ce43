"""List files: a path a line, csv and tsv with a header (open_clip's filepath and title), JSON lines."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import re
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from typing import Any

from blip3o_dit.extraction.sources.collector import Collector
from blip3o_dit.extraction.sources.image_ref import is_fault_of_file
from blip3o_dit.extraction.sources.text import (
    CAPTION_NAMES,
    LABEL_NAMES,
    PATH_NAMES,
    column_named,
    decode,
    encoding_of,
    first_value,
    text_or_none,
    valid_text,
)
from blip3o_dit.utils.json_files import one_line, short_repr, unique_names

LIST_SUFFIXES = (".txt", ".tsv", ".csv", ".jsonl")
SEPARATORS = ("\t", ",", ";", "|")

# Longest cell of a csv file; Python's own limit is 128 KiB.
MAX_CELL = 2**24

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")

Row = tuple[int, dict[str, Any]]


class NoHeaderError(ValueError):
    """A table without a column that names pictures."""


def list_file(found: Collector, name: str) -> None:
    """Add what a list file names, relative to its own folder. Raises ValueError for what is no list."""
    file, options = found.path(name), found.options
    image_names = (options.image_column,) if options.image_column else PATH_NAMES
    caption_names = (options.caption_column,) if options.caption_column else CAPTION_NAMES
    seen: dict[str, int] = {}
    given: dict[str, int] = {}
    rows = rows_of(found, name, lambda column: column_named([column], image_names) is not None)
    for number, row in rows:
        if found.is_full:
            return
        found.bar.update()
        path = first_value(row, image_names)
        if not isinstance(path, str) or not path.strip():
            found.skip(f"{name}:{number}", f"no path: line {number}: expected one under one of {image_names}")
            continue
        if is_url(path) and not found.refs:
            raise ValueError(f"{file}: line {number}: {_url_reason(path)}")
        if row.get("key") not in (None, ""):
            key = str(row["key"])
            if key in given:
                raise ValueError(
                    f"{file}: line {number}: key {short_repr(key)} is on line {given[key]} already"
                )
            given[key] = number
        else:
            seen[path] = seen.get(path, 0) + 1
            key = path if seen[path] == 1 else f"{path}#{seen[path]}"
        caption, label = first_value(row, caption_names), first_value(row, LABEL_NAMES)
        add_named_file(found, path, "", valid_text(key), text_or_none(caption), text_or_none(label))


def is_url(path: str) -> bool:
    return _URL.match(path) is not None


def _url_reason(path: str) -> str:
    return f"expected a file, found the address {short_repr(path)}: download first, as with img2dataset"


def add_named_file(
    found: Collector, path: Any, folder: str, key: str, caption: str | None, label: str | None
) -> None:
    """A picture that a list or table names, relative to `folder` below the root; skipped if not there."""
    if not isinstance(path, str) or not path or is_url(path):
        reason = _url_reason(path) if isinstance(path, str) and path else "expected a path, found none"
        found.skip(str(path), reason, key=key, location=valid_text(str(path)))
        return
    name = os.path.join(folder, path)
    try:
        name = os.path.join(folder, os.path.expanduser(path))
        name = next((other for other in _spellings(name) if os.path.exists(found.path(other))), name)
        status = os.stat(found.path(name))
    except OSError as error:
        if not is_fault_of_file(error, found.root):
            raise
        found.skip(name, str(error.strerror), key=key)
    except ValueError as error:  # NUL in it
        found.skip(name, one_line(error), key=key)
    else:
        found.add_file(name, status, key=key, caption=caption, label=label)


def _spellings(name: str) -> Iterator[str]:
    """How the disk may write a name that was typed elsewhere: accents apart or not, or in Windows-1252."""
    if name.isascii():
        return
    yield name
    yield from (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    with contextlib.suppress(UnicodeEncodeError):
        yield os.fsdecode(name.encode("cp1252"))


# Rows of each kind of list


def rows_of(found: Collector, name: str, names_image: Callable[[str], bool]) -> Iterator[Row]:
    """Line numbers and columns of a list file, whose header is one where a column names images."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".jsonl":
        return _json_rows(found, name)
    return _text_rows(found, name, suffix, names_image)


def _text_rows(found: Collector, name: str, suffix: str, names_image: Callable[[str], bool]) -> Iterator[Row]:
    """By a header's columns; without one `path<TAB>caption` lines, but for a .csv, which always has it."""
    lines: Iterator[tuple[int, str]] = enumerate(_lines(found, name), start=1)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    number, header = first
    lines = itertools.chain([first], lines)
    separator = _separator(header, names_image, found.options.csv_separator)
    if separator is not None:
        yield from _csv_rows(found, name, lines, separator)
    elif suffix == ".csv" or found.options.image_column:
        raise NoHeaderError(
            f"{found.path(name)}: line {number}: expected a header that names the picture's column "
            f"(one of {found.options.image_column or PATH_NAMES}), found {short_repr(header.strip())}"
        )
    else:
        for number, line in lines:
            path, _, caption = line.strip("\r\n").partition("\t")
            if line.strip():
                yield number, {"path": path.strip(), "caption": caption.strip()}


def _separator(header: str, names_image: Callable[[str], bool], given: str | None) -> str | None:
    """The one with which the line is a header that names the images; None when it is none."""
    for separator in (given,) if given else SEPARATORS:
        names = [name.strip().strip('"') for name in header.strip("\r\n").split(separator)]
        if any(map(names_image, names)):
            return separator
    return None


class _CsvLines:
    """The lines of a csv file, numbered; those of the row being read can be given back."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines = lines
        self._again: deque[tuple[int, str]] = deque()
        self.row: list[tuple[int, str]] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.row.append(line)
        return line[1]

    def give_back(self) -> None:
        """Read the lines of the row again, but for its first."""
        self._again.extendleft(reversed(self.row[1:]))


def _csv_rows(found: Collector, name: str, lines: Iterator[tuple[int, str]], separator: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_CELL)
    numbered = _CsvLines(lines)
    reader = csv.reader(numbered, delimiter=separator)
    header: list[str] = []
    while True:
        numbered.row.clear()
        try:
            cells = next(reader, None)
            if len(numbered.row) > 1:  # a quote that nobody closed would swallow the lines behind it
                list(csv.reader([line for _, line in numbered.row], delimiter=separator, strict=True))
                found.notes["rows of several lines, in quotes"] += 1
        except csv.Error as error:
            number = numbered.row[0][0]
            reason = f"{one_line(error)} (a quote that is not closed?)"
            if not header:
                where = f"{found.path(name)}: line {number}"
                raise ValueError(f"{where}: no readable header: {reason}") from error
            _skip_row(found, name, number, reason)
            numbered.give_back()
            continue
        if cells is None:
            return
        number = numbered.row[0][0]
        if not header:
            header = _checked_header(found, name, number, cells)
            continue
        cells = [*cells[: len(header)], *filter(str.strip, cells[len(header) :])]
        if len(cells) == len(header):
            yield number, dict(zip(header, cells, strict=True))
        elif len(cells) > 1 or any(map(str.strip, cells)):
            _skip_row(found, name, number, f"expected {len(header)} cells, found {len(cells)}")


def _checked_header(found: Collector, name: str, number: int, cells: list[str]) -> list[str]:
    """The columns. Raises ValueError when one that was asked for is missing, or one is there twice."""
    header = [column.strip() for column in cells]
    where = f"{found.path(name)}: line {number}"
    for wanted in (found.options.image_column, found.options.caption_column):
        if wanted and wanted not in header:
            raise ValueError(f"{where}: expected a column {wanted}, found {short_repr(header)}")
    twice = next((column for column in header if column and header.count(column) > 1), None)
    if twice is not None:
        raise ValueError(f"{where}: expected each column once, found {short_repr(twice)} more than once")
    return header


def _skip_row(found: Collector, name: str, number: int, reason: str) -> None:
    found.skip(f"{name}:{number}", f"not a readable row: line {number}: {reason}")


def _json_rows(found: Collector, name: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(found, name), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_names)
        except (ValueError, RecursionError) as error:
            found.skip(f"{name}:{number}", f"not readable JSON: line {number}: {one_line(error)}")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            reason = f"not readable JSON: line {number}: expected an object, found {type(row).__name__}"
            found.skip(f"{name}:{number}", reason)


def _lines(found: Collector, name: str) -> Iterator[str]:
    """Lines with their ends, in the encoding that the file shows, else UTF-8 or Windows-1252 by line."""
    with open(found.path(name), "rb") as file:
        encoding, mark = encoding_of(file.read(4))
        file.seek(mark)
        if encoding != "utf-8":
            yield from TextIOWrapper(file, encoding, errors="replace", newline="")
            return
        for data in file:
            text, fallback = decode(data)
            if fallback:
                found.notes["lines that are no UTF-8, read as Windows-1252"] += 1
            yield from filter(None, re.split(r"(?<=\r)(?!\n)", text))  # \r alone ends a line too
