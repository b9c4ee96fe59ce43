"""Hugging Face datasets: folders by save_to_disk, splits, and the metadata files of an ImageFolder."""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise
from typing import Any

from blip3o_dit.extraction.sources.collector import Collector
from blip3o_dit.extraction.sources.lists import NoHeaderError, rows_of
from blip3o_dit.extraction.sources.tables import list_table, open_table
from blip3o_dit.extraction.sources.text import CAPTION_NAMES, LABEL_NAMES, first_value, text_or_none
from blip3o_dit.utils.json_files import printable, read_json_object, short_repr, show_names

STATE, SPLITS, INFO = "state.json", "dataset_dict.json", "dataset_info.json"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")

# Words in the names of files and folders that say which split they are.
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


# Folders by save_to_disk


def list_saved(found: Collector, folder: str, tables: Sequence[str]) -> None:
    """Add a dataset by the state it was saved with; other tables in its folder are caches of `map`."""
    state: dict[str, Any] = {}
    try:
        if os.path.exists(found.path(posixpath.join(folder, STATE))):
            state = read_json_object(found.root / folder / STATE)
    except (OSError, ValueError) as error:
        found.unreadable(posixpath.join(folder, STATE), error)
        return
    named = _file_names(found, folder, state.get("_data_files"))
    names = named or [name for name in tables if not posixpath.basename(name).startswith("cache-")]
    indices = _file_names(found, folder, state.get("_indices_files"))
    found.ignored[".arrow"] += len(set(tables) - {*names, *indices})
    if indices:
        _list_selected(found, names, indices)
    else:
        for name in names:
            if not found.is_full:
                list_table(found, name)


def _file_names(found: Collector, folder: str, entries: Any) -> list[str]:
    names = []
    for entry in entries if isinstance(entries, list) else []:
        name = entry.get("filename") if isinstance(entry, dict) else None
        if isinstance(name, str) and posixpath.basename(name) == name and "\0" not in name:
            names.append(posixpath.join(folder, name))
        else:
            found.skip(posixpath.join(folder, STATE), f"expected a file name, found {short_repr(name)}")
    return names


def _list_selected(found: Collector, names: Sequence[str], indices: Sequence[str]) -> None:
    """The rows that an indices file chooses among those of all tables, as after `select` and `shuffle`."""
    try:
        counts = [open_table(found.path(name)).num_rows for name in names]
        chosen = list(chain.from_iterable(open_table(found.path(i)).read("indices") for i in indices))
    except (OSError, ValueError, LookupError) as error:
        found.unreadable(indices[0], error)
        return
    for place, row in enumerate(chosen):
        if not isinstance(row, int) or not 0 <= row < sum(counts):
            found.skip(
                f"{indices[0]}:{place}",
                f"expected the number of a row below {sum(counts)}, found {short_repr(row)}",
            )
    rows = [row for row in chosen if isinstance(row, int)]
    for name, (start, stop) in zip(names, pairwise(accumulate(counts, initial=0)), strict=True):
        list_table(found, name, [row - start for row in rows if start <= row < stop])


# Splits


def refuse_splits(found: Collector, names: Sequence[str]) -> None:
    """Tables or tars of several splits are not one set: ValueError that says how to name one.

    A split stands in the name of a file or of a folder above it, as a word of its own.
    """
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for name in names:
        split, example = _split_of(name)
        if split:
            counts[split] += 1
            examples.setdefault(split, example)
    if len(counts) > 1:
        kinds = ", ".join(f"{count} of {split}" for split, count in sorted(counts.items()))
        places = " or ".join(f"'{printable(found.path(examples[split]))}'" for split in sorted(examples))
        raise ValueError(f"{found.root}: expected files of one split, found {kinds}: name one, as {places}")


def refuse_dict(found: Collector, folder: str, splits: Sequence[str]) -> None:
    """The same for a saved DatasetDict, whose splits may have any name."""
    splits = sorted(splits)
    if len(splits) > 1:
        example = printable(found.path(posixpath.join(folder, splits[0])))
        raise ValueError(
            f"{printable(found.path(folder))}: expected one split, found the splits {show_names(splits)}: "
            f"name one, as '{example}'"
        )


def split_named(part: str) -> str | None:
    """The split that a name says it is."""
    words = re.split(r"[-._ 0-9]+", part.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _split_of(name: str) -> tuple[str | None, str]:
    """The split, and what to write for its files."""
    parts = name.split("/")
    for depth, part in enumerate(parts):
        split = split_named(part)
        if split and depth < len(parts) - 1:
            return split, "/".join(parts[: depth + 1])
        if split:
            word = next(word for word in re.findall(r"[^-._ 0-9]+", part) if word.lower() in _SPLIT_WORDS)
            pattern = part[: part.index(word) + len(word)] + "*" + os.path.splitext(part)[1]
            return split, "/".join([*parts[:-1], pattern])
    return None, ""


# ImageFolder


@dataclass
class Metadata:
    """What the metadata files of a tree say of its pictures, by their name below the root."""

    rows: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    aside: set[str] = field(default_factory=set)  # named by other columns, as masks are
    files: list[str] = field(default_factory=list)

    def read(self, found: Collector, folder: str, files: Collection[str]) -> None:
        """Read those of one folder; a file without a `file_name` column is not one."""
        for base in METADATA:
            if base in files:
                name = posixpath.join(folder, base)
                try:
                    self._read_file(found, name)
                except NoHeaderError:
                    continue  # another table of that name
                except (OSError, ValueError) as error:
                    found.unreadable(name, error)
                    self.files.append(name)

    def _read_file(self, found: Collector, name: str) -> None:
        captions = (found.options.caption_column,) if found.options.caption_column else CAPTION_NAMES
        column: str | None = None
        unnamed: list[int] = []  # rows before the first that names a picture
        for number, row in _rows(found, name):
            if column is None:
                column = _file_column(found, name, row)
                if column is None:
                    unnamed.append(number)
                    continue
                self.files.append(name)
                for earlier in unnamed:
                    _skip_row(found, name, earlier, None)
            about = text_or_none(first_value(row, captions)), text_or_none(first_value(row, LABEL_NAMES))
            for path in _paths(found, name, number, row.get(column)):
                if self.rows.setdefault(path, about) is not about:
                    found.notes["rows of metadata files that name a picture again: the first is taken"] += 1
            for other in row:
                if other != column and _names_files(other) and row[other] not in (None, ""):
                    self.aside.update(_paths(found, name, number, row[other]))

    def of(self, name: str) -> tuple[str | None, str | None]:
        """Caption and label; each picture is asked for once."""
        found = self.rows.pop(name, (None, None))
        return found

    def skip_missing(self, found: Collector) -> None:
        for name in self.rows:
            found.skip(name, "named by a metadata file, but no picture in the folder")


def _rows(found: Collector, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if not name.endswith(".parquet"):
        yield from rows_of(found, name, _names_files)
        return
    table = open_table(found.path(name))
    wanted = [column for column in table.names if _names_files(column)]
    wanted += [found.options.caption_column] if found.options.caption_column else CAPTION_NAMES
    columns = {column: table.read(column) for column in (*wanted, *LABEL_NAMES) if column in table.names}
    for row in range(table.num_rows):
        yield row, {column: values[row] for column, values in columns.items()}


def _names_files(column: str) -> bool:
    return column in ("file_name", "file_names") or column.endswith(("_file_name", "_file_names"))


def _file_column(found: Collector, name: str, row: dict[str, Any]) -> str | None:
    """Which column names the pictures; None when none does."""
    columns = [column for column in row if _names_files(column)]
    wanted = found.options.image_column
    usual = (wanted, f"{wanted}_file_name") if wanted else ("file_name", "image_file_name", "file_names")
    column = next((column for column in usual if column in columns), None)
    if column is None and columns and (wanted or len(columns) > 1):
        raise ValueError(f"expected one of the columns {usual}, found {columns}: see --image_column")
    return column or (columns[0] if columns else None)


def _paths(found: Collector, name: str, number: int, values: Any) -> Iterator[str]:
    """Names below the root; a metadata file names what is beside or below it, nothing else."""
    folder = posixpath.dirname(name)
    for value in values if isinstance(values, list) else [values]:
        path = posixpath.normpath(posixpath.join(folder, value)) if isinstance(value, str) and value else ".."
        if (
            path.startswith("/")
            or path.split("/")[0] == ".."
            or (folder and not path.startswith(f"{folder}/"))
        ):
            _skip_row(found, name, number, value)
        else:
            yield path


def _skip_row(found: Collector, name: str, number: int, value: Any) -> None:
    reason = f"expected the name of a picture below it, found {short_repr(value)}: row {number}"
    found.skip(f"{name}:{number}", reason)
