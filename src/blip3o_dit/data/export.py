"""A store's samples in other formats: .npz, safetensors, parquet, and the documented pickle.

All but the pickle are written batch by batch, in memory that does not grow with the store.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from blip3o_dit.data.array_embeddings import CLIP_NAMES, EVA_NAMES, RECORDS
from blip3o_dit.data.checks import Record
from blip3o_dit.data.embeddings import Embeddings, batches, fetch_stored
from blip3o_dit.data.pickle_format import write_pickle
from blip3o_dit.data.table_files import RECORD, pyarrow
from blip3o_dit.utils.addresses import refuse_address
from blip3o_dit.utils.atomic import atomic_file

BATCH = 256
# The dtypes of stores as others name them; NumPy has no bfloat16.
SAFETENSORS_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def export_embeddings(source: Embeddings, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a store, or other embeddings, as the file that the suffix of `path` says.

    Values are those of the store, of bfloat16 stores as float32 where the format has no bfloat16. Records
    come back whole from each format, but from a pickle only keys, captions and labels.

    Raises:
        ValueError: for another suffix, or a file that is there without `overwrite`.
    """
    path = Path(path)
    refuse_address(path)
    writers: dict[str, Callable[[Embeddings, Path], None]] = {
        ".npz": _write_npz,
        ".safetensors": _write_safetensors,
        ".parquet": _write_parquet,
        ".pkl": write_pickle,
    }
    if path.suffix not in writers:
        raise ValueError(f"{path}: expected a suffix of {list(writers)}, found {path.suffix!r}")
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: expected no file there, found one (overwrite=True replaces it)")
    path.parent.mkdir(parents=True, exist_ok=True)
    writers[path.suffix](source, path)


def _write_npz(source: Embeddings, path: Path) -> None:
    """Arrays under the documented names, and the records as lines of JSON, in uint8."""
    dtype = np.dtype(np.float16 if _dtype_of(source) == "float16" else np.float32)
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for side, name in enumerate((EVA_NAMES[0], CLIP_NAMES[0])):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                write_header(member, _shapes(source)[side], dtype)
                for tokens in _tokens(source, side):
                    member.write(tokens.float().numpy().astype(dtype).tobytes())
        with archive.open(f"{RECORDS}.npy", "w", force_zip64=True) as member:
            write_header(member, (sum(map(len, _lines(source))),), np.dtype(np.uint8))
            for line in _lines(source):
                member.write(line)


def _write_safetensors(source: Embeddings, path: Path) -> None:
    """The same as safetensors: a header with the places of all tensors, then the bytes of each."""
    dtype = _dtype_of(source)
    itemsize = 4 if dtype == "float32" else 2
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    shapes = [*_shapes(source), (sum(map(len, _lines(source))),)]
    for name, shape in zip((EVA_NAMES[0], CLIP_NAMES[0], RECORDS), shapes, strict=True):
        kind, size = ("U8", 1) if name == RECORDS else (SAFETENSORS_DTYPES[dtype], itemsize)
        start, end = end, end + size * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for side in (0, 1):
            for tokens in _tokens(source, side):
                file.write(_as(tokens, dtype))
        for line in _lines(source):
            file.write(line)


def _write_parquet(source: Embeddings, path: Path) -> None:
    """Columns key, caption, label (if all are whole numbers, or text), record (JSON), and the tokens.

    Tokens are lists of fixed size in one another, [tokens][width], which Hugging Face datasets read; Arrow's
    tensors they refuse.
    """
    arrow = pyarrow()
    kind = arrow.float16() if _dtype_of(source) == "float16" else arrow.float32()
    types = [arrow.list_(arrow.list_(kind, width), tokens) for _, tokens, width in _shapes(source)]
    columns = [("key", arrow.string()), ("caption", arrow.string()), ("label", _label_type(source))]
    columns += [(RECORD, arrow.string()), *zip((EVA_NAMES[0], CLIP_NAMES[0]), types, strict=True)]
    schema = arrow.schema([(name, type_) for name, type_ in columns if type_ is not None])
    with atomic_file(path) as file, arrow.parquet.ParquetWriter(file, schema) as writer:
        for rows in batches(range(source.num_samples), BATCH):
            writer.write_table(_table_of(source, rows, schema))


def _table_of(source: Embeddings, rows: range, schema: Any) -> Any:
    arrow, records = pyarrow(), source.records(rows)
    values: dict[str, Any] = {
        "key": [_utf8(record["key"]) for record in records],
        "caption": [_utf8(record.get("caption")) for record in records],
        "label": [record.get("label") for record in records],
        RECORD: [json.dumps(record) for record in records],
    }
    arrays = [arrow.array(values[n], schema.field(n).type) for n in schema.names if n in values]
    for name, tokens in zip(schema.names[-2:], source.fetch(rows), strict=True):
        outer = schema.field(name).type
        inner = outer.value_type
        numbers = arrow.array(tokens.numpy().astype(inner.value_type.to_pandas_dtype()).ravel())
        each = arrow.FixedSizeListArray.from_arrays(numbers, type=inner)
        arrays.append(arrow.FixedSizeListArray.from_arrays(each, type=outer))
    return arrow.Table.from_arrays(arrays, schema=schema)


def _label_type(source: Embeddings) -> Any:
    """int64 or text if all known labels are; None otherwise, and when there are none."""
    kinds = {type(record["label"]) for record in _records(source) if record.get("label") is not None}
    return {int: pyarrow().int64(), str: pyarrow().string()}.get(kinds.pop()) if len(kinds) == 1 else None


def _utf8(text: str | None) -> str | None:
    """Text that UTF-8 can hold; `record` has it as it is."""
    return None if text is None else text.encode("utf-8", "replace").decode()


def _tokens(source: Embeddings, side: int) -> Iterator[Any]:
    for rows in batches(range(source.num_samples), BATCH):
        yield fetch_stored(source, rows)[side]


def _records(source: Embeddings) -> Iterator[Record]:
    for rows in batches(range(source.num_samples), 64 * BATCH):
        yield from source.records(rows)


def _lines(source: Embeddings) -> Iterator[bytes]:
    for record in _records(source):
        yield json.dumps(record).encode() + b"\n"


def _shapes(source: Embeddings) -> tuple[tuple[int, ...], tuple[int, ...]]:
    tokens = source.num_samples, source.num_tokens
    return (*tokens, source.condition_dim), (*tokens, source.target_dim)


def _dtype_of(source: Embeddings) -> str:
    eva, clip = fetch_stored(source, [0])
    return str(eva.dtype).removeprefix("torch.") if eva.dtype == clip.dtype else "float32"


def _as(tokens: Any, dtype: str) -> bytes:
    return tokens.to(getattr(torch, dtype)).contiguous().view(torch.uint8).numpy().tobytes()


def write_header(member: IO[bytes], shape: tuple[int, ...], dtype: np.dtype) -> None:
    """What a .npy file begins with; the array's bytes follow, row by row."""
    about = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, about)
