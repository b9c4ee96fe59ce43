"""Read a user's pickle without running it.

`pickle.load` calls whatever a file names, so opening a stranger's embeddings can run a stranger's
program. Here a file may name only what NumPy arrays and torch tensors are made of, and it never
gets the real thing: every name maps to a stand-in of ours that checks its arguments, that has no
attributes to write and that NumPy's and torch's own unpickling code never sees. One reader opens
`pickle.dump` files (protocols 2 to 5), `torch.save` zip files and the older `torch.save` stream,
which is also what a tensor inside a pickle is made of.

Not `torch.load(weights_only=True)`: it refuses every `pickle.dump` file and NumPy array, inflates
compressed zip records without bound, and returns uninitialised memory for a stream whose list of
storages is empty (torch 2.13).

Memory and time stay proportional to the file (`pickle_budget.py`): users really have pickles from strangers,
so a file that only exhausts the machine is refused like one that runs code.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from blip3o_dit.data.pickle_budget import GROWTH, MAX_HASH_STEPS, check_hash_steps, hash_steps, scan_opcodes
from blip3o_dit.data.pickle_values import (
    ALLOWED,
    ALLOWED_NAMES,
    BUILTINS,
    NUMPY_CORES,
    STORAGE_TYPES,
    Function,
    StandIns,
    Storage,
    StorageType,
    UnsafePickleError,
    Value,
    check_bools,
    check_sizes,
    dtype_of,
    make_array,
    refuse,
    show,
)

# What the pickle machine, NumPy, torch and zipfile raise on bytes that they cannot read.
_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    BufferError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)
_ZIP_MAGIC = b"PK\x03\x04"
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of torch.save's older format
_STREAM_VERSION = 1001
_CHUNK = 1 << 22


def load_pickle(path: str | Path) -> object:
    """Plain containers, NumPy arrays and torch tensors; nothing else, and nothing in the file runs.

    Arrays keep their shape, dtype and byte order and are read-only views of the bytes read: copy
    before writing. Arrays are of bool, integer, float (16, 32, 64) or str and bytes items;
    one-dimensional object arrays of str, int, float, bool or None become lists. Tensors keep their
    shape, stride and shared storage, on the CPU and without gradients, as do Parameters. An
    OrderedDict becomes a dict and a torch.Size a tuple.

    Raises FileNotFoundError for a missing file, UnsafePickleError for one that asks for any other
    global, and ValueError for one that is not a whole pickle or whose arrays do not fit their
    shapes. Each message is one line and names the file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if not path.is_file():
        found = "a directory" if path.is_dir() else "something else"
        raise ValueError(f"{path}: expected a pickle file, found {found}")
    try:
        with path.open("rb") as file:
            return _unwrap(_load(file), {})
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path}: refused: {_one_line(error)}") from None
    except _UNREADABLE as error:
        raise ValueError(f"{path}: not a readable pickle: {_one_line(error)}") from None


def _load(file: BinaryIO) -> object:
    size = _size_of(file)
    if size == 0:
        raise ValueError("the file is empty")
    builder = _Builder(GROWTH * size)
    magic = file.read(len(_ZIP_MAGIC))
    file.seek(0)
    if magic == _ZIP_MAGIC:
        return _load_torch_zip(file, size, builder)
    value = _unpickle(file, size, builder.names)
    if type(value) is int and value == _STREAM_MAGIC:
        file.seek(0)
        return _load_torch_stream(file, size, builder, builder.names)
    _expect_end(file, size)
    return value


def _load_torch_zip(file: BinaryIO, size: int, builder: _Builder) -> object:
    """`torch.save`: <root>data.pkl, and a record <root>data/<key> of raw numbers per storage."""
    with zipfile.ZipFile(file) as archive:
        records = {info.filename: info for info in archive.infolist()}
        _check_records(records.values(), size)
        roots = [name.removesuffix("data.pkl") for name in records if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("expected a zip file from torch.save (one data.pkl), found another")
        root = roots[0]
        mark = f"{root}byteorder"
        order = archive.read(mark) if mark in records else b"little"
        if order != sys.byteorder.encode():
            raise ValueError(f"expected {sys.byteorder}-endian tensors, found {order[:20]!r}")
        storages = _Storages(builder)
        data = io.BytesIO(archive.read(f"{root}data.pkl"))
        names = {**builder.names, **STORAGE_TYPES}
        value = _unpickle(data, _size_of(data), names, storages.open)
        for key, flat in storages.flat.items():
            with archive.open(f"{root}data/{key}") as record:
                _fill(record, flat)
                _expect_end(record, records[f"{root}data/{key}"].file_size)
        return value


def _check_records(records: Iterable[zipfile.ZipInfo], size: int) -> None:
    for info in records:
        name = show(info.filename)
        # torch.save stores records as they are; a compressed one could hold 1000 times as much
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"expected stored zip records, found {name} compressed or encrypted")
        # zipfile itself believes these numbers
        if not 0 <= info.header_offset <= size or not info.file_size == info.compress_size <= size:
            raise ValueError(f"expected zip records inside the file, found {name} outside")


def _load_torch_stream(file: BinaryIO, size: int, builder: _Builder, names: StandIns) -> object:
    """`torch.save`'s older format: five pickles, then each storage's length and its raw numbers."""
    magic, version, system = (_unpickle(file, size, {}) for _ in range(3))
    if magic != _STREAM_MAGIC or version != _STREAM_VERSION or type(system) is not dict:
        raise ValueError("expected bytes that torch.save wrote, found others")
    if system.get("little_endian") is not (sys.byteorder == "little"):
        raise ValueError(f"expected {sys.byteorder}-endian tensors, found the other byte order")
    storages = _Storages(builder)
    value = _unpickle(file, size, {**names, **STORAGE_TYPES}, storages.open)
    keys = _unpickle(file, size, {})
    # A storage that is missing from the list would keep whatever was in memory before.
    if type(keys) is not list or sorted(keys) != sorted(storages.flat):
        raise ValueError("the list of storages does not match the storages that the tensors use")
    for key in keys:
        flat = storages.flat[key]
        declared = int.from_bytes(file.read(8), "little", signed=True)
        if declared != flat.numel():
            raise ValueError(f"expected a storage of {flat.numel()} elements, found {declared}")
        _fill(file, flat)
    _expect_end(file, size)
    return value


def _fill(file: Any, flat: Tensor) -> None:
    raw: Any = flat.view(torch.uint8).numpy()
    buffer = memoryview(raw)
    for start in range(0, len(buffer), _CHUNK):
        piece = buffer[start : start + _CHUNK]
        if file.readinto(piece) != len(piece):
            raise ValueError(f"expected {len(buffer)} bytes in a storage, found fewer")
    if flat.dtype == torch.bool:
        check_bools(buffer)


def _size_of(file: BinaryIO) -> int:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size


def _expect_end(file: Any, size: int) -> None:
    # Several objects one after another: reading only the first would drop data without a word.
    if file.tell() != size:
        raise ValueError(f"expected the end of the file at byte {file.tell()}, found {size} bytes")


# The pickle machine


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, file: BinaryIO, names: StandIns, open_storage: Callable[[object], object] | None
    ) -> None:
        super().__init__(file)
        self._names = names
        self._open_storage = open_storage

    def find_class(self, module: str, name: str) -> object:
        stand_in = self._names.get((module, name))
        if stand_in is None:
            refuse(f"asks for {show(f'{module}.{name}')}; {ALLOWED}")
        return stand_in

    def persistent_load(self, pid: object) -> object:
        if self._open_storage is None:
            refuse(f"asks for a persistent id; {ALLOWED}")
        return self._open_storage(pid)


def _unpickle(
    file: BinaryIO, size: int, names: StandIns, open_storage: Callable[[object], object] | None = None
) -> object:
    start = file.tell()
    end = scan_opcodes(file, size, with_storages=open_storage is not None)
    file.seek(start)
    value = _Unpickler(file, names, open_storage).load()
    file.seek(end)
    return value


# What a file may call


class _Builder:
    """The allowed functions that copy or hash their arguments, and how much of that they may still do."""

    def __init__(self, budget: int) -> None:
        self._bytes_left = budget
        self._hash_steps_left = MAX_HASH_STEPS
        self.names = self._names()

    def _names(self) -> StandIns:
        calls: dict[tuple[str, str], Callable[..., object]] = {
            ("_codecs", "encode"): self.encode,
            ("torch.storage", "_load_from_bytes"): self.load_from_bytes,
        }
        for core in NUMPY_CORES:
            calls[f"{core}.multiarray", "scalar"] = self.scalar
        for builtins in BUILTINS:
            calls[builtins, "set"] = self.make_set
            calls[builtins, "frozenset"] = self.make_frozenset
        return ALLOWED_NAMES | {name: Function(call) for name, call in calls.items()}

    def spend(self, n: int) -> None:
        """Counts `n` bytes: one call repeated on one object must not fill the memory."""
        if n > self._bytes_left:
            raise ValueError(f"expected at most {self._bytes_left} more bytes of content, found {n}")
        self._bytes_left -= n

    def encode(self, text: Any, encoding: Any) -> bytes:
        """Protocol 2 has no bytes: it writes them as latin1 text."""
        if type(text) is not str or encoding != "latin1":
            raise ValueError(f"expected latin1 text to encode, found {show(encoding)}")
        self.spend(len(text))
        return text.encode("latin1")

    def make_set(self, items: Any) -> set[object]:
        if type(items) is not list:
            raise ValueError(f"expected a set's list of items, found {type(items).__name__}")
        self._hash(items)
        return set(items)

    def make_frozenset(self, items: Any) -> frozenset[object]:
        made = frozenset(self.make_set(items))
        self._hash_steps_left -= 1 + len(made)
        return made

    def _hash(self, items: list[object]) -> None:
        self.spend(len(items))
        done: dict[int, int] = {}
        self._hash_steps_left -= sum(hash_steps(item, done) for item in items)
        check_hash_steps(self._hash_steps_left)

    def scalar(self, dtype: Any, data: Any) -> Value:
        kind = dtype_of(dtype)
        if kind.itemsize == 0 and data == b"":  # np.str_(""): NumPy has no arrays of this dtype
            return Value(kind.type())
        if kind.hasobject:
            raise ValueError("expected a scalar of numbers or text, found an object")
        self.spend(kind.itemsize)
        return Value(make_array((), dtype, "C", data)[()])

    def load_from_bytes(self, data: Any) -> Storage:
        """A tensor's storage. torch's own function runs whatever these bytes ask for."""
        if type(data) is not bytes:
            raise ValueError(f"expected bytes of a torch storage, found {type(data).__name__}")
        storage = _load_torch_stream(io.BytesIO(data), len(data), self, {})
        if type(storage) is not Storage:
            raise ValueError(f"expected a torch storage, found {type(storage).__name__}")
        return storage


class _Storages:
    """Storages by key, made when the pickle mentions them and filled when it has been read."""

    def __init__(self, builder: _Builder) -> None:
        self.flat: dict[str, Tensor] = {}
        self._builder = builder

    def open(self, pid: Any) -> Storage:
        """The storage of a persistent id ('storage', type, key, location, numel[, None])."""
        # the location is ignored (everything goes to the CPU); old views of storages are not read
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage" or any(pid[5:]):
            refuse(f"asks for a persistent id that is not a whole torch storage; {ALLOWED}")
        _, kind, key, _, numel = pid[:5]
        if type(kind) is not StorageType or type(key) is not str:
            raise ValueError("expected a torch storage's type and key, found others")
        check_sizes("a storage's length", (numel,))
        if key not in self.flat:
            self._builder.spend(numel * kind.value.itemsize)
            self.flat[key] = torch.empty(numel, dtype=kind.value)
        flat = self.flat[key]
        if flat.dtype != kind.value or flat.numel() != numel:
            found = f"{numel} of {kind.value}"
            raise ValueError(f"expected {flat.numel()} elements of {flat.dtype}, found {found}")
        return Storage(flat)


# From stand-ins to the result


def _unwrap(node: Any, done: dict[int, object]) -> object:
    """`node` with every stand-in replaced by what it stands for; what is shared stays shared."""
    if type(node) in (str, bytes, bytearray, int, float, bool, type(None)):
        return node
    if isinstance(node, Value) and node.value is not None:
        return _unwrap(node.value, done) if type(node.value) is list else node.value
    if type(node) not in (dict, list, tuple, set, frozenset):
        refuse(f"holds a {type(node).__name__} that is no array or tensor; {ALLOWED}")
    if id(node) not in done:
        done[id(node)] = _OPEN
        done[id(node)] = _unwrap_container(node, done)
    if done[id(node)] is _OPEN:
        raise ValueError(f"expected a tree, found a {type(node).__name__} that contains itself")
    return done[id(node)]


_OPEN = object()


def _unwrap_container(node: Any, done: dict[int, object]) -> object:
    if type(node) is dict:
        return {_unwrap(key, done): _unwrap(value, done) for key, value in node.items()}
    return type(node)([_unwrap(item, done) for item in node])


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
