"""Embeddings in tables: parquet files, and datasets that Hugging Face datasets saved to disk.

A column of tokens is a list of lists of floats, an array of a tensor type, or a flat list: one vector. A
piece of a table (a row group, a record batch) is in memory at a time, beside keys and captions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.array_embeddings import (
    CAPTION_NAMES,
    CLIP_NAMES,
    EVA_NAMES,
    GENERATED,
    KEY_NAMES,
    LABEL_NAMES,
    Arrangement,
    ArrayEmbeddings,
    RawEmbeddings,
    find_name,
    read_records,
)
from blip3o_dit.utils.json_files import is_plain_name, one_line, parse_json, read_json, short_repr
from blip3o_dit.utils.validation import package_missing

MOST_INFLATED, INFLATED_FREE, VALUE_BYTES = 8, 2**26, 4
RECORD = "record"  # a whole record as JSON, beside the columns that say parts of it


def open_parquet(path: Path, files: Sequence[Path], arrangement: Arrangement) -> ArrayEmbeddings:
    """Parquet files of the same columns, in this order. Raises ValueError for what cannot be read."""
    arrow = pyarrow()
    pieces = []
    for file in files:
        with readable(file):
            metadata = arrow.parquet.read_metadata(file)
            _refuse_inflated(file, metadata)
            groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        pieces += [(partial(_row_group, file, group), count) for group, count in enumerate(groups) if count]
    return _open(path, files, pieces, arrangement)


def _refuse_inflated(file: Path, metadata: Any) -> None:
    """Refuse (ValueError) row groups of far more values than the file has bytes for: equal ones take none."""
    for group in range(metadata.num_row_groups):
        about = metadata.row_group(group)
        values = sum(about.column(number).num_values for number in range(about.num_columns))
        if VALUE_BYTES * values > MOST_INFLATED * file.stat().st_size + INFLATED_FREE:
            raise ValueError(
                f"{file}: row group {group}: expected at most {MOST_INFLATED} times the size of the file, "
                f"found {values} values in a file of {file.stat().st_size} bytes"
            )


def open_saved_dataset(path: Path, arrangement: Arrangement) -> ArrayEmbeddings:
    """A folder of `Dataset.save_to_disk`: the files that its state names, and no others that lie there."""
    state = read_json(path / "state.json")
    listed = state.get("_data_files") if isinstance(state, dict) else None
    entries = listed if isinstance(listed, list) else []
    names = [str(entry.get("filename")) for entry in entries if isinstance(entry, dict)]
    if not names or not all(is_plain_name(name) for name in names):
        raise ValueError(
            f"{path / 'state.json'}: expected the names of data files, found {short_repr(listed)}"
        )
    if state.get("_indices_files"):
        raise ValueError(
            f"{path}: expected a dataset without an indices mapping, found one: save it after "
            ".flatten_indices()"
        )
    files, pieces = [path / name for name in names], []
    for file in files:
        counts = [batch.num_rows for batch in _batches(file)]
        pieces += [(partial(_batch, file, number), count) for number, count in enumerate(counts) if count]
    return _open(path, files, pieces, arrangement)


def holds_tokens(path: Path) -> bool:
    """Whether a table, or the first of a folder's, has columns of tokens; False for what is no such table."""
    tables = [path] if path.is_file() else sorted(path.glob("*.parquet")) or sorted(path.glob("*.arrow"))
    if not tables or tables[0].suffix not in (".parquet", ".arrow"):
        return False
    file = tables[0]
    with readable(file):
        is_parquet = file.suffix == ".parquet"
        schema = pyarrow().parquet.read_schema(file) if is_parquet else _batches(file)[0].schema
    return not {*EVA_NAMES, *CLIP_NAMES}.isdisjoint(schema.names)


def _open(
    path: Path, files: Sequence[Path], pieces: Sequence[tuple[Any, int]], arrangement: Arrangement
) -> ArrayEmbeddings:
    if not pieces:
        raise ValueError(f"{path}: expected at least one sample, found none")
    names = pieces[0][0](None)
    known = dict.fromkeys(names)
    reader = TableReader(
        path,
        [read for read, _ in pieces],
        list(accumulate((count for _, count in pieces), initial=0)),
        (find_name(path, known, EVA_NAMES), find_name(path, known, CLIP_NAMES)),
    )
    eva, clip = reader(np.array([0]))
    count = reader.starts[-1]
    columns = reader.columns([n for n in (*KEY_NAMES, *CAPTION_NAMES, *LABEL_NAMES, RECORD) if n in known])
    whole = columns.pop(RECORD, None)
    records, has_keys = read_records(path, columns, count)
    if whole is not None:
        records = [parse_json(f"{path}: record {row}", str(line).encode()) for row, line in enumerate(whole)]
    raw = RawEmbeddings(
        path,
        files,
        reader,
        (count, *eva.shape[1:]),
        (count, *clip.shape[1:]),
        records,
        has_keys=has_keys,
        generated_by={} if reader.names[1] == GENERATED else None,
        shard_starts=reader.starts,
    )
    return ArrayEmbeddings(raw, arrangement)


class TableReader:
    """Reads rows of two columns; the last piece that was read is kept."""

    def __init__(
        self,
        path: Path,
        pieces: Sequence[Any],
        starts: list[int],
        names: tuple[str, str],
    ) -> None:
        self.path, self.pieces, self.starts, self.names = path, pieces, starts, names
        self._kept: tuple[int, list[Tensor]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def __call__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        found: list[list[Tensor]] = [[], []]
        order = np.argsort(rows, kind="stable")
        for number in np.unique(numbers):
            here = order[numbers[order] == number]
            inside = torch.from_numpy(rows[here] - self.starts[number])
            for side, tokens in zip(found, self._piece(int(number)), strict=True):
                side.append(tokens[inside])
        back = torch.from_numpy(np.argsort(order, kind="stable"))
        try:
            eva, clip = (torch.cat(side)[back] if side else torch.empty(0) for side in found)
        except RuntimeError as error:
            raise ValueError(f"{self.path}: expected tokens of one shape: {one_line(error)}") from error
        return eva, clip

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Small columns, whole."""
        values: dict[str, list[Any]] = {name: [] for name in names}
        for piece in self.pieces if names else []:
            table = piece(list(names))
            for name in names:
                with readable(self.path):
                    values[name] += table.column(name).to_pylist()
        return values

    def _piece(self, number: int) -> list[Tensor]:
        if self._kept is None or self._kept[0] != number:
            table = self.pieces[number](list(self.names))
            tensors = [as_tensor(self.path, name, table.column(name)) for name in self.names]
            self._kept = (number, tensors)
        return self._kept[1]


def as_tensor(path: Path, name: str, column: Any) -> Tensor:
    """A column of nested or flat lists of floats, or of a tensor type, as [n, N, C] or [n, C]."""
    arrow = pyarrow()
    array, count = column, len(column)
    if isinstance(array, arrow.ChunkedArray):
        array = arrow.concat_arrays(_plain_storage(chunk) for chunk in array.chunks)
    shape = getattr(column.type, "shape", None)
    array = _plain_storage(array)
    sizes: list[int] = []
    while (
        arrow.types.is_list(array.type)
        or arrow.types.is_large_list(array.type)
        or (arrow.types.is_fixed_size_list(array.type))
    ):
        _refuse_nulls(path, name, array)
        sizes.append(_list_size(path, name, array))
        array = _plain_storage(array.flatten())
    _refuse_nulls(path, name, array)
    if not arrow.types.is_floating(array.type):
        raise ValueError(f"{path}: {name}: expected lists of floats, found {short_repr(str(column.type))}")
    if shape is not None and len(sizes) == 1:
        sizes = list(shape)
    values = array.to_numpy(zero_copy_only=False)
    return torch.from_numpy(np.array(values).reshape(count, *sizes))


def _plain_storage(array: Any) -> Any:
    """Without its extension type; Hugging Face's and Arrow's tensors are lists underneath."""
    return getattr(array, "storage", array)


def _refuse_nulls(path: Path, name: str, array: Any) -> None:
    if array.null_count:
        raise ValueError(
            f"{path}: {name}: expected tokens for every sample, found {array.null_count} missing"
        )


def _list_size(path: Path, name: str, array: Any) -> int:
    lengths = np.unique(pyarrow().compute.list_value_length(array).to_numpy(zero_copy_only=False))
    if len(lengths) != 1:
        raise ValueError(
            f"{path}: {name}: expected lists of one length, found {short_repr(lengths[:4].tolist())}"
        )
    return int(lengths[0])


def _row_group(file: Path, group: int, columns: list[str] | None) -> Any:
    """These columns of a row group; the names of all without any."""
    with readable(file):
        parquet = pyarrow().parquet.ParquetFile(file)
        return parquet.schema_arrow.names if columns is None else parquet.read_row_group(group, columns)


def _batch(file: Path, number: int, columns: list[str] | None) -> Any:
    batches = _batches(file)
    return batches[number].schema.names if columns is None else batches[number]


@lru_cache(maxsize=2)
def _batches(file: Path) -> list[Any]:
    """The record batches of a file, mapped."""
    arrow = pyarrow()
    with readable(file):
        source = arrow.memory_map(str(file))
        try:
            return list(arrow.ipc.open_stream(source))
        except arrow.ArrowInvalid:  # not a stream
            opened = arrow.ipc.open_file(source)
            return [opened.get_batch(number) for number in range(opened.num_record_batches)]


@contextmanager
def open_table(file: Path) -> Iterator[Any]:
    """A parquet file, to read in pieces. Raises ValueError for what cannot be read."""
    with readable(file), pyarrow().parquet.ParquetFile(file) as opened:
        _refuse_inflated(file, opened.metadata)
        yield opened


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Whatever a table's reader makes of a damaged file, as one line that names it."""
    arrow = pyarrow()
    try:
        yield
    except (arrow.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a readable table: {one_line(error)}") from error


def pyarrow() -> Any:
    """The package, with the parts that are used. Raises ValueError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise package_missing("parquet and Hugging Face datasets", "pyarrow") from None
    return pyarrow
