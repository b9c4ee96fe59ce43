"""Files of one vector a sample, read block by block, and translated vectors written in their place.

What goes in is the array or column of one embedding model's vectors, whatever else the file holds; what comes
out are the rows in the same order, with one number beside each. See `inference/translate.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blip3o_dit.data.array_files import load_npy, read_npz
from blip3o_dit.data.export import write_header
from blip3o_dit.data.table_files import as_tensor, open_table, pyarrow
from blip3o_dit.utils.atomic import files_aside
from blip3o_dit.utils.json_files import one_line, short_repr, show_names
from blip3o_dit.utils.recognise import EMBEDDINGS, recognise, refusal

BLOCK = 4096  # rows
NPY, PARQUET = ".npy", ".parquet"
SPREAD = "spread"

# Vectors [n, C] and the spread [n] of each, block by block.
Parts = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class VectorFile:
    """Vectors [count, C] of a file, read a block at a time.

    Args:
        name: of their array or column.
        array: where it can be indexed, [count, C] or a safetensors slice; None for a parquet table.
        beside: other arrays of one number or text a row, by name.
        columns: of a parquet table, all of them.
    """

    path: Path
    name: str
    count: int
    array: Any = None
    beside: Mapping[str, np.ndarray] = field(default_factory=dict)
    columns: tuple[str, ...] = ()

    def blocks(self) -> Iterator[tuple[int, Tensor, Any]]:
        """The first row's number, vectors [n, C] float32, and what stands beside them: arrays or a batch."""
        tables = self._parquet_blocks() if self.array is None else self._array_blocks()
        start = 0
        for vectors, beside in tables:
            bad = torch.nonzero(~torch.isfinite(vectors).all(dim=1)).flatten().tolist()
            if bad:
                raise ValueError(
                    f"{self.path}: {self.name}: expected finite numbers, found NaN or infinity in row "
                    f"{start + bad[0]}"
                )
            yield start, vectors, beside
            start += len(vectors)

    def _array_blocks(self) -> Iterator[tuple[Tensor, Any]]:
        for start in range(0, self.count, BLOCK):
            rows = slice(start, start + BLOCK)
            block = self.array[rows]
            if isinstance(block, np.ndarray):
                block = torch.from_numpy(block.astype(np.float32))
            yield block.float(), {name: values[rows] for name, values in self.beside.items()}

    def _parquet_blocks(self) -> Iterator[tuple[Tensor, Any]]:
        with open_table(self.path) as file:
            for batch in file.iter_batches(batch_size=BLOCK):
                vectors = as_tensor(self.path, self.name, batch.column(self.name))
                yield vectors.float(), batch


def open_vectors(path: Path, width: int, column: str | None = None) -> VectorFile:
    """The vectors of a .npy, .npz, safetensors or parquet file, known by its content.

    Args:
        width: C. column: the array or column; None takes the only one of that width.

    Raises:
        FileNotFoundError, ValueError: one line: no such file, no or several such vectors, other widths.
    """
    kind = recognise(path).kind
    if kind == "parquet":
        return _open_parquet(path, width, column)
    if kind == "npy":
        arrays: dict[str, Any] = {path.stem: load_npy(path)}
    elif kind == "npz":
        arrays = read_npz(path)
    elif kind == "safetensors":
        arrays = _tensors(path)
    else:
        raise refusal(path, EMBEDDINGS)
    shapes = {name: tuple(_shape(array)) for name, array in arrays.items()}
    floats = {name: shape for name, shape in shapes.items() if len(shape) == 2 and _is_float(arrays[name])}
    name = _chosen(path, {name: shape[1] for name, shape in floats.items()}, width, column, shapes)
    count = shapes[name][0]
    beside = {
        other: array
        for other, array in arrays.items()
        if shapes[other] == (count,) and isinstance(array, np.ndarray) and array.dtype.kind in "biufU"
    }
    return _some(VectorFile(path, name, count, array=arrays[name], beside=beside))


def write_vectors(path: Path, source: VectorFile, parts: Parts, width: int) -> None:
    """Write vectors [n, C] and the spread [n] of each, in blocks of the source's, whole or not at all.

    A .npy file holds the vectors [count, C] float32, and beside it NAME.spread.npy the spread [count]. A
    parquet file holds the source's rows, the new vectors in place of the old ones and a column `spread`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with files_aside(path) as folder:
        if path.suffix == NPY:
            _write_npy(folder / path.name, source.count, parts, width)
        else:
            _write_parquet(folder / path.name, source, parts, width)


def check_vector_output(path: Path, overwrite: bool) -> None:
    """Refuse (ValueError) what is no name of a .npy or parquet file, or is there and not to be replaced."""
    if path.suffix not in (NPY, PARQUET):
        raise ValueError(f"{path}: expected a name that ends in {NPY} or {PARQUET}, found {path.suffix!r}")
    if path.suffix == PARQUET:
        pyarrow()
    for file in (path, spread_file(path)) if path.suffix == NPY else (path,):
        if file.exists() and not (overwrite and file.is_file()):
            raise ValueError(f"{file}: expected no file there, found one (--overwrite replaces it)")


def check_columns(source: VectorFile, output: Path) -> None:
    """Refuse (ValueError) to write over the source, and a column of it that is to be written."""
    if output.resolve() == source.path.resolve():
        raise ValueError(f"{output}: expected another place than that of the vectors, found the same")
    if output.suffix == PARQUET and SPREAD in (*source.columns, *source.beside):
        raise ValueError(f"{source.path}: expected no column {SPREAD!r}, which is to be written, found one")


def spread_file(path: Path) -> Path:
    """Where the spread of vectors in a .npy file is."""
    return path.with_suffix(f".{SPREAD}{NPY}")


def _write_npy(path: Path, count: int, parts: Parts, width: int) -> None:
    with ExitStack() as files:
        vectors, spread = (files.enter_context(open(file, "wb")) for file in (path, spread_file(path)))
        write_header(vectors, (count, width), np.dtype(np.float32))
        write_header(spread, (count,), np.dtype(np.float32))
        for part in parts:
            for file, values in zip((vectors, spread), part, strict=True):
                file.write(values.numpy().astype(np.float32).tobytes())


def _write_parquet(path: Path, source: VectorFile, parts: Parts, width: int) -> None:
    arrow, writer = pyarrow(), None
    with ExitStack() as files:
        for (_, _, beside), (vectors, spread) in zip(source.blocks(), parts, strict=True):
            column = arrow.FixedSizeListArray.from_arrays(arrow.array(vectors.numpy().ravel()), width)
            table = _with_vectors(source.name, beside, column)
            table = table.append_column(SPREAD, arrow.array(spread.numpy()))
            if writer is None:
                writer = files.enter_context(arrow.parquet.ParquetWriter(path, table.schema))
            writer.write_table(table)


def _with_vectors(name: str, beside: Any, column: Any) -> Any:
    """A table of what stands beside the vectors, with other ones in their place."""
    arrow = pyarrow()
    if isinstance(beside, dict):
        return arrow.table({**{other: arrow.array(values) for other, values in beside.items()}, name: column})
    table = arrow.Table.from_batches([beside])
    return table.set_column(table.schema.get_field_index(name), name, column)


def _open_parquet(path: Path, width: int, column: str | None) -> VectorFile:
    with open_table(path) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
        first: Any = next(iter(file.iter_batches(batch_size=1)), None)
    found: dict[str, int] = {}
    for name in () if first is None else schema.names:
        kind = schema.field(name).type
        if hasattr(kind, "value_type") and pyarrow().types.is_floating(kind.value_type):
            found[name] = as_tensor(path, name, first.column(name)).shape[-1]
    name = _chosen(path, found, width, column, schema.names)
    return _some(VectorFile(path, name, count, columns=tuple(schema.names)))


def _chosen(
    path: Path, widths: Mapping[str, int], width: int, column: str | None, there: Iterable[str]
) -> str:
    """The name of the vectors: `widths` are those of all vectors of floats, `there` names everything."""
    if column is not None and widths.get(column) != width:
        other = f"{widths[column]}" if column in widths else f"no such vectors in {show_names(there)}"
        raise ValueError(f"{path}: {column}: expected vectors of {width} numbers, found {other}")
    if column is not None:
        return column
    fitting = [name for name in widths if widths[name] == width]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(f"{path}: expected --column, one of {fitting}, as all are {width} numbers wide")
    found = {name: widths[name] for name in list(widths)[:8]}
    raise ValueError(
        f"{path}: expected vectors [samples, {width}], found "
        + (f"other widths, {short_repr(found)}" if widths else f"none in {show_names(there)}")
    )


def _some(source: VectorFile) -> VectorFile:
    if not source.count:
        raise ValueError(f"{source.path}: expected at least one vector, found none")
    return source


def _tensors(path: Path) -> dict[str, Any]:
    """Slices of the tensors of rank 2, which read what is asked for; tensors of rank 1 as arrays."""
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        flat = [name for name, rows in slices.items() if len(rows.get_shape()) == 1]
        for name in flat:
            tensor = file.get_tensor(name)
            slices[name] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        return slices
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {one_line(error)}") from error


def _shape(array: Any) -> Iterable[int]:
    return array.shape if isinstance(array, np.ndarray) else array.get_shape()


def _is_float(array: Any) -> bool:
    if isinstance(array, np.ndarray):
        return array.dtype.kind == "f"
    return array.get_dtype() in ("F16", "BF16", "F32", "F64")
