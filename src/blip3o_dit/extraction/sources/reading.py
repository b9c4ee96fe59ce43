"""Reading one image: a file, a part of a tar, a cell of a table."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import stat
import zlib
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from typing import IO, Any

from blip3o_dit.data.table_files import pyarrow
from blip3o_dit.utils.json_files import one_line

# Largest image file that is read: an uncompressed one of as many pixels as are accepted has 0.7 GB.
MAX_IMAGE_BYTES = 2**30

# Rows of a parquet column in memory at a time.
ROWS_AT_ONCE = 16

# What a damaged compressed stream raises, beside an OSError without number.
STREAM_ERRORS = (EOFError, zlib.error, lzma.LZMAError)

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def stream_opener(name: str) -> Callable[[str], IO[bytes]] | None:
    """What opens this archive as a decompressed stream; None when it is not compressed."""
    return _OPENERS.get(os.path.splitext(name)[1].lower())


def check_size(size: int) -> None:
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"too large: {size} bytes, expected at most {MAX_IMAGE_BYTES}")


def read_file(file: str, offset: int = -1, size: int = -1) -> bytes:
    """A whole regular file, or `size` bytes of it from `offset` on."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would be waited for without end
    with open(descriptor, "rb") as opened:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        check_size(status.st_size if offset < 0 else size)
        opened.seek(max(offset, 0))
        data = opened.read(size)
    return _whole(data, size)


def read_stream(file: str, offset: int, size: int) -> bytes:
    """A part of a compressed archive. Images are read in order, so each is a little further in the stream."""
    check_size(size)
    stream = _stream(file, *_state(file))
    try:
        stream.seek(offset)
        return _whole(stream.read(size), size)
    except STREAM_ERRORS as error:
        raise ValueError(f"damaged archive: {error}") from error
    except OSError as error:
        raise content_error(error) from error


def _whole(data: bytes, size: int) -> bytes:
    if 0 <= size != len(data):
        raise ValueError(f"expected {size} bytes, found {len(data)}")
    return data


def _state(file: str) -> tuple[int, ...]:
    """What must be the same for what is open to be used again: this process, and this content of the file."""
    status = os.stat(file)
    return os.getpid(), status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1)
def _stream(file: str, *state: int) -> IO[bytes]:
    opener = stream_opener(file)
    assert opener is not None
    return opener(file)


def content_error(error: OSError) -> Exception:
    """gzip and pyarrow call damage an OSError too, but one without the system's number."""
    return ValueError(one_line(error)) if error.errno is None else error


# Tables


def read_cell(file: str, row: int, column: str) -> bytes:
    """One cell of an image column: bytes, a struct with bytes or path, or a path beside the file."""
    arrow = pyarrow()
    try:
        if file.lower().endswith(".arrow"):
            cell = _mapped_table(file, *_state(file)).column(column)[row].as_py()
        else:
            cell = _parquet_cursor(column, file, *_state(file)).cell(row)
    except (arrow.ArrowException, LookupError) as error:  # a lookup: the file is another one by now
        raise ValueError(f"row {row}: {one_line(error)}") from error
    except OSError as error:
        raise content_error(error) from error
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, str):
        return read_file(os.path.join(os.path.dirname(file), cell))
    if not isinstance(cell, bytes):
        raise ValueError(f"row {row}: expected image bytes, found {type(cell).__name__}")
    check_size(len(cell))
    return cell


class _ParquetCursor:
    """A column read row by row in a few rows' memory, in order; going back begins its row group again."""

    def __init__(self, file: str, column: str) -> None:
        # A buffer: else pyarrow holds the whole column of a row group
        self._parquet = pyarrow().parquet.ParquetFile(file, pre_buffer=False, buffer_size=2**20)
        self._column = column
        metadata = self._parquet.metadata
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = list(accumulate(counts, initial=0))
        self._group = -1
        self._first = 0
        self._rows: Any = ()

    def cell(self, row: int) -> Any:
        if row >= self._starts[-1]:
            raise ValueError(f"row {row}: expected fewer, found {self._starts[-1]} in the file")
        group = bisect_right(self._starts, row) - 1
        if group != self._group or row < self._first:
            self._batches = self._parquet.iter_batches(
                ROWS_AT_ONCE, row_groups=[group], columns=[self._column], use_threads=False
            )
            self._group, self._first, self._rows = group, self._starts[group], ()
        while row >= self._first + len(self._rows):
            self._first += len(self._rows)
            batch = next(self._batches, None)
            if batch is None:  # as after an error
                self._group, self._rows = -1, ()
                raise ValueError(f"row {row}: expected it in row group {group}, found its end")
            self._rows = batch.column(0)
        return self._rows[row - self._first].as_py()


@lru_cache(maxsize=1)
def _parquet_cursor(column: str, file: str, *state: int) -> _ParquetCursor:
    return _ParquetCursor(file, column)


@lru_cache(maxsize=4)
def _mapped_table(file: str, *state: int) -> Any:
    return arrow_table(file)


def arrow_table(file: str) -> Any:
    """A memory-mapped Arrow stream or file, as Hugging Face datasets writes them."""
    arrow = pyarrow()
    source = arrow.memory_map(file)
    try:
        return arrow.ipc.open_stream(source).read_all()
    except arrow.ArrowInvalid:
        return arrow.ipc.open_file(source).read_all()
