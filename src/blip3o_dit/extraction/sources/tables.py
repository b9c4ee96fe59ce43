"""Tables of images: parquet and Arrow files with bytes, structs of bytes and path, or paths in a column."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from blip3o_dit.data.table_files import pyarrow
from blip3o_dit.extraction.sources.collector import Collector
from blip3o_dit.extraction.sources.image_ref import ImageRef
from blip3o_dit.extraction.sources.lists import add_named_file
from blip3o_dit.extraction.sources.reading import arrow_table, content_error
from blip3o_dit.extraction.sources.text import (
    CAPTION_NAMES,
    LABEL_NAMES,
    column_named,
    text_or_none,
    valid_text,
)
from blip3o_dit.utils.json_files import one_line, short_repr

IMAGE_COLUMNS = (
    "image",
    "img",
    "picture",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "avif",
    "path",
    "filepath",
    "file_name",
)

# What img2dataset writes into `status` of a row whose picture it has.
DOWNLOADED = "success"


@dataclass(frozen=True)
class Table:
    """An open table: what is known of it without its pictures."""

    names: Sequence[str]
    num_rows: int
    schema: Any
    read: Callable[[str], list[Any]]

    def features(self) -> dict[str, Any]:
        """Hugging Face's description of the columns, where it wrote one."""
        try:
            info = json.loads((self.schema.metadata or {}).get(b"huggingface", b"{}"))
            features = info["info"]["features"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return {}
        return {name: kind for name, kind in features.items() if isinstance(kind, dict)}


def is_table(name: str) -> bool:
    return name.lower().endswith((".parquet", ".arrow"))


def open_table(file: str) -> Table:
    """Raises ValueError for what is no table or names a column twice, OSError when it cannot be read."""
    arrow = pyarrow()
    try:
        table = _open_parquet(file) if file.lower().endswith(".parquet") else _open_arrow(file)
    except arrow.ArrowException as error:
        raise ValueError(f"not a readable table: {one_line(error)}") from error
    except OSError as error:
        raise content_error(error) from error
    twice = next((name for name, count in Counter(table.names).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"expected each column once, found {short_repr(twice)} more than once")
    return table


def _open_parquet(file: str) -> Table:
    parquet = pyarrow().parquet.ParquetFile(file)
    schema = parquet.schema_arrow
    return Table(
        schema.names,
        parquet.metadata.num_rows,
        schema,
        lambda column: parquet.read([column]).column(0).to_pylist(),
    )


def _open_arrow(file: str) -> Table:
    table = arrow_table(file)
    return Table(
        table.schema.names,
        table.num_rows,
        table.schema,
        lambda column: table.column(column).to_pylist(),
    )


def list_table(found: Collector, name: str, rows: Iterable[int] | None = None) -> None:
    """Add the rows of one table, or these of them; one that cannot be read is skipped as a whole."""
    try:
        table = open_table(found.path(name))
        image = _image_column(table, found.options.image_column)
        columns = _Columns(table, found.options.caption_column)
    except _WrongColumnError as error:
        raise ValueError(f"{found.path(name)}: {error}") from None
    except (ValueError, OSError) as error:
        found.unreadable(name, error)
        return
    if not table.num_rows:
        found.ignored["tables without a row"] += 1
    stem = os.path.splitext(name)[0]
    size = os.stat(found.path(name)).st_size
    paths = table.read(image) if _holds_text(table, image) else None
    taken: dict[int, int] = {}
    for row in range(table.num_rows) if rows is None else rows:
        found.bar.update()
        taken[row] = taken.get(row, 0) + 1 if rows is not None else 1
        key = valid_text(f"{stem}/{row}" + (f"#{taken[row]}" if taken[row] > 1 else ""))
        if columns.statuses is not None and columns.statuses[row] != DOWNLOADED:
            found.ignored["failed downloads"] += 1
            continue
        caption, label = text_or_none(columns.captions[row]), columns.label(row)
        if paths is not None:
            add_named_file(found, paths[row], os.path.dirname(name), key, caption, label)
            continue
        found.refs.append(ImageRef(key, caption, label, found.folder, name, size, row=row, column=image))


class _WrongColumnError(ValueError):
    """A column that was asked for by name and is not there: the user's mistake, not the table's."""


class _Columns:
    """What is read of every row beside its image."""

    def __init__(self, table: Table, caption_column: str | None) -> None:
        if caption_column and caption_column not in table.names:
            raise _WrongColumnError(f"expected a caption column {caption_column}, found {_shown(table)}")
        caption = caption_column or column_named(table.names, CAPTION_NAMES)
        label = column_named(table.names, LABEL_NAMES)
        nothing = [None] * table.num_rows
        self.captions = table.read(caption) if caption else nothing
        self._labels = table.read(label) if label else nothing
        classes = table.features().get(label or "", {}).get("names")
        self._classes: list[Any] = classes if isinstance(classes, list) else []
        img2dataset = {"key", "status", "url"} <= set(table.names)
        self.statuses = table.read("status") if img2dataset else None

    def label(self, row: int) -> str | None:
        """A class by its name where the table knows it; Hugging Face writes -1 for none."""
        label = self._labels[row]
        if self._classes and isinstance(label, int):
            return text_or_none(self._classes[label]) if 0 <= label < len(self._classes) else None
        return text_or_none(label)


def _image_column(table: Table, wanted: str | None) -> str:
    if wanted:
        if wanted not in table.names:
            raise _WrongColumnError(f"expected an image column ({wanted}), found {_shown(table)}")
        name: str | None = wanted
    else:
        declared = [name for name, kind in table.features().items() if kind.get("_type") == "Image"]
        name = column_named(declared, IMAGE_COLUMNS) or column_named(table.names, IMAGE_COLUMNS)
        if len(declared) > 1 and name not in declared:
            raise ValueError(f"expected one image column, found {short_repr(declared)}: see --image_column")
        name = declared[0] if declared and name not in declared else name
    if name is None or name not in table.names:
        raise ValueError(f"expected an image column (one of {IMAGE_COLUMNS}), found {_shown(table)}")
    types = pyarrow().types
    kind = table.schema.field(name).type
    if types.is_struct(kind) and {kind.field(i).name for i in range(kind.num_fields)} & {"bytes", "path"}:
        return name
    if _holds_text(table, name) or types.is_binary(kind) or types.is_large_binary(kind):
        return name
    raise ValueError(f"column {name}: expected bytes, a struct of bytes and path, or paths, found {kind}")


def _holds_text(table: Table, name: str) -> bool:
    kind = table.schema.field(name).type
    return pyarrow().types.is_string(kind) or pyarrow().types.is_large_string(kind)


def _shown(table: Table) -> str:
    return short_repr(list(table.names))
