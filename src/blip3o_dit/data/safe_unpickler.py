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

Memory and time stay proportional to the file: what the objects and the hashing of keys would take is
added up from the opcodes before anything is built (`_Ledger`).
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import reprlib
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from torch import Tensor

Names = Mapping[tuple[str, str], "_StandIn"]

_ALLOWED = (
    "only NumPy arrays, torch tensors and plain containers (dict, list, tuple, set, str, bytes, "
    "numbers, None) are allowed"
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
# A legitimate file spends each of its bytes at most twice (text -> bytes -> storage).
_GROWTH = 4
_CHUNK = 1 << 22


class UnsafePickleError(ValueError):
    """The file asks for more than arrays, tensors and plain containers. Nothing in it ran."""


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
            return _plain(_load(file), {})
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path}: refused: {_one_line(error)}") from None
    except _UNREADABLE as error:
        raise ValueError(f"{path}: not a readable pickle: {_one_line(error)}") from None


def _load(file: BinaryIO) -> object:
    size = _size_of(file)
    if size == 0:
        raise ValueError("the file is empty")
    builder = _Builder(_GROWTH * size)
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
        names = {**builder.names, **_STORAGE_TYPES}
        value = _unpickle(data, _size_of(data), names, storages.open)
        for key, flat in storages.flat.items():
            with archive.open(f"{root}data/{key}") as record:
                _fill(record, flat)
                _expect_end(record, records[f"{root}data/{key}"].file_size)
        return value


def _check_records(records: Iterable[zipfile.ZipInfo], size: int) -> None:
    for info in records:
        name = _show(info.filename)
        # torch.save stores records as they are; a compressed one could hold 1000 times as much
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ValueError(f"expected stored zip records, found {name} compressed or encrypted")
        # zipfile itself believes these numbers
        if not 0 <= info.header_offset <= size or not info.file_size == info.compress_size <= size:
            raise ValueError(f"expected zip records inside the file, found {name} outside")


def _load_torch_stream(file: BinaryIO, size: int, builder: _Builder, names: Names) -> object:
    """`torch.save`'s older format: five pickles, then each storage's length and its raw numbers."""
    magic, version, system = (_unpickle(file, size, {}) for _ in range(3))
    if magic != _STREAM_MAGIC or version != _STREAM_VERSION or type(system) is not dict:
        raise ValueError("expected bytes that torch.save wrote, found others")
    if system.get("little_endian") is not (sys.byteorder == "little"):
        raise ValueError(f"expected {sys.byteorder}-endian tensors, found the other byte order")
    storages = _Storages(builder)
    value = _unpickle(file, size, {**names, **_STORAGE_TYPES}, storages.open)
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
        _check_bools(buffer)


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
    def __init__(self, file: BinaryIO, names: Names, open_storage: Callable[[object], object] | None) -> None:
        super().__init__(file)
        self._names = names
        self._open_storage = open_storage

    def find_class(self, module: str, name: str) -> object:
        stand_in = self._names.get((module, name))
        if stand_in is None:
            _refuse(f"asks for {_show(f'{module}.{name}')}; {_ALLOWED}")
        return stand_in

    def persistent_load(self, pid: object) -> object:
        if self._open_storage is None:
            _refuse(f"asks for a persistent id; {_ALLOWED}")
        return self._open_storage(pid)


def _unpickle(
    file: BinaryIO, size: int, names: Names, open_storage: Callable[[object], object] | None = None
) -> object:
    start = file.tell()
    end = _scan(file, size, with_storages=open_storage is not None)
    file.seek(start)
    value = _Unpickler(file, names, open_storage).load()
    file.seek(end)
    return value


_OPCODES = {op.code.encode("latin1"): op for op in pickletools.opcodes}
_LENGTH_WIDTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
# EXT codes are answered from a process-wide cache that find_class never sees; the others stand for
# objects outside the file.
_REFUSED_OPCODES = {"EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER"}


def _scan(file: BinaryIO, size: int, *, with_storages: bool) -> int:
    """Where the pickle that begins here ends, from its opcodes alone: nothing is built.

    The C unpickler allocates what a length or a memo index asks for before it looks at the file, so
    both are bounded here: a length by the bytes that are left, an index by the opcodes so far. The
    ledger bounds what opcodes that are there would take.
    """
    ledger = _Ledger(size)
    for seen in count(1):
        code = file.read(1)
        op = _OPCODES.get(code)
        if op is None:
            found = f"{code!r} at byte {file.tell() - 1}" if code else "the end of the file"
            raise ValueError(f"expected a pickle opcode, found {found}")
        if op.name == "STOP":
            return file.tell()
        if op.name in _REFUSED_OPCODES or (op.name == "BINPERSID" and not with_storages):
            _refuse(f"asks for an object outside the file (opcode {op.name}); {_ALLOWED}")
        argument = _skip_argument(file, size, op)
        if op.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > seen:
            raise ValueError(f"expected a memo index below {seen}, found {argument}")
        if op.name == "FRAME":
            _check_length(file, size, argument)
        ledger.note(op.name, argument)
    raise AssertionError("unreachable")


# Objects that hold others or are made by a call, and about how many bytes each takes.
_HELD = {
    **dict.fromkeys(("EMPTY_LIST", "LIST", "EMPTY_DICT", "DICT", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), 80),
    **dict.fromkeys(("EMPTY_SET", "FROZENSET"), 232),
    **dict.fromkeys(("REDUCE", "OBJ", "INST", "NEWOBJ", "NEWOBJ_EX"), 100),
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "BININT1", "DUP"), 16),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), 16),
    **dict.fromkeys(("MARK", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), 8),
}
_HELD_BY_OTHERS = 30  # a number or a short text, and its place in a list
_MEMORY_FACTOR, _MEMORY_FREE = 10, 1 << 26

# Text hashes at random, numbers of 64 bits hardly collide. A tuple can hold one other tuple twice, that one
# the next, and so take 2^50 steps to hash in 200 bytes; and tuples and long numbers can be chosen to collide.
_MOST_HASHED = 20_000


class _Ledger:
    """What a pickle would take to build: a stack of prices instead of objects.

    An object's price is how many steps its hash takes beyond that of a text or a number.
    """

    def __init__(self, size: int) -> None:
        self._stack: list[int] = []
        self._marks: list[int] = []
        self._memo: dict[int, int] = {}  # prices above 0 only
        self._indices = bytearray()  # 1 for each index that the memo has
        self._memoized = 0
        self._memory = _MEMORY_FACTOR * size + _MEMORY_FREE
        self._hashing = _MOST_HASHED

    def note(self, name: str, argument: int) -> None:
        """The next opcode. Raises ValueError when the sum is too high."""
        held, handle = _ENTRIES[name]
        self._memory -= held
        if self._memory < 0:
            raise ValueError("expected objects in proportion to the file, found many more")
        if handle is None:  # most opcodes: one more text or number, or an empty container
            self._stack.append(0)
        else:
            handle(self, name, argument)

    def _exchange(self, name: str, argument: int) -> None:
        """Takes objects off the stack, and puts what it makes of them there."""
        to_mark, count, pushes = _EFFECTS[name]
        if to_mark:
            at = self._marks.pop() if self._marks else 0
            items = self._stack[at:]
            del self._stack[max(0, at - count) :]
        else:
            items = self._stack[-count:] if count else []
            del self._stack[len(self._stack) - len(items) :]
        self._stack += [self._price(name, argument, items)] * pushes

    def _price(self, name: str, argument: int, items: list[int]) -> int:
        """Of what this opcode makes; counts the keys that it hashes."""
        if name.startswith("TUPLE"):
            return min(1 + len(items) + sum(items), 2 * _MOST_HASHED)
        if name in ("LONG", "INT") or (name in ("LONG1", "LONG4") and argument > 8):
            return 1
        if name in ("SETITEMS", "DICT"):
            self._hash(sum(items[::2]))
        elif name == "SETITEM":
            self._hash(sum(items[1:2]))
        elif name in ("ADDITEMS", "FROZENSET"):
            self._hash(sum(items) + (len(items) if name == "FROZENSET" else 0))
            return int(name == "FROZENSET")
        return 0

    def _hash(self, price: int) -> None:
        self._hashing -= price
        if self._hashing < 0:
            raise ValueError(f"expected at most {_MOST_HASHED} steps to hash tuples and long numbers")

    def _mark(self, _: str, __: int) -> None:
        self._marks.append(len(self._stack))

    def _pop(self, _: str, __: int) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        elif self._stack:
            self._stack.pop()

    def _duplicate(self, _: str, __: int) -> None:
        self._stack += self._stack[-1:]

    def _get(self, _: str, index: int) -> None:
        self._stack.append(self._memo.get(index, 0))

    def _put(self, _: str, index: int) -> None:
        if index >= len(self._indices):
            self._indices += bytes(index + 1 - len(self._indices))
        self._memoized += not self._indices[index]
        self._indices[index] = 1
        price = self._stack[-1] if self._stack else 0
        if price:
            self._memo[index] = price
        elif self._memo:
            self._memo.pop(index, None)

    def _memoize(self, name: str, _: int) -> None:
        self._put(name, self._memoized)


_SPECIAL = {
    "MARK": _Ledger._mark,
    "POP": _Ledger._pop,
    "DUP": _Ledger._duplicate,
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Ledger._get),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Ledger._put),
    "MEMOIZE": _Ledger._memoize,
}


def _effect(op: pickletools.OpcodeInfo) -> tuple[bool, int, int]:
    """(whether it takes all down to the mark, how many it takes below or without that, how many it adds)."""
    before = op.stack_before
    if pickletools.markobject in before:
        return True, before.index(pickletools.markobject), len(op.stack_after)
    return False, len(before), len(op.stack_after)


_EFFECTS = {op.name: _effect(op) for op in pickletools.opcodes}


def _entry(name: str) -> tuple[int, Callable[[_Ledger, str, int], None] | None]:
    """(bytes held, what the ledger does; None: push an object of price 0)."""
    pushes = _EFFECTS[name][2]
    plain = _EFFECTS[name] == (False, 0, 1) and not name.startswith(("LONG", "INT"))
    handle = _SPECIAL.get(name, None if plain else _Ledger._exchange)
    return _HELD.get(name, _HELD_BY_OTHERS if pushes else 0), handle


_ENTRIES = {name: _entry(name) for name in _EFFECTS}


def _steps_to_hash(value: Any, done: dict[int, int]) -> int:
    """The ledger's price of an object that is there already."""
    if type(value) is int:
        return int(value.bit_length() > 64)
    if type(value) is frozenset:
        return 1
    if type(value) is not tuple:
        return 0
    if id(value) not in done:
        inner = sum(_steps_to_hash(item, done) for item in value)
        done[id(value)] = min(1 + len(value) + inner, 2 * _MOST_HASHED)
    return done[id(value)]


def _skip_argument(file: BinaryIO, size: int, op: pickletools.OpcodeInfo) -> int:
    """Moves past the argument; the number in it where it is one."""
    if op.arg is None:
        return 0
    if op.arg.n == pickletools.UP_TO_NEWLINE:
        lines = [file.readline() for _ in range(2 if op.name in ("GLOBAL", "INST") else 1)]
        return int(lines[0]) if op.name in ("PUT", "GET") else 0
    if op.arg.n >= 0:
        return int.from_bytes(file.read(op.arg.n), "little")
    length = int.from_bytes(file.read(_LENGTH_WIDTHS[op.arg.n]), "little")
    _check_length(file, size, length)
    file.seek(length, io.SEEK_CUR)
    return length


def _check_length(file: BinaryIO, size: int, length: int) -> None:
    left = size - file.tell()
    if length > left:
        raise ValueError(f"expected {length} more bytes, found {left}")


# Stand-ins: what the pickle machine holds instead of arrays, tensors, and the names it asked for


class _StandIn:
    """An opaque value. BUILD calls `__setstate__` or writes attributes: both are closed here."""

    __slots__ = ("value",)
    value: Any

    def __init__(self, value: Any = None) -> None:
        object.__setattr__(self, "value", value)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        _refuse(f"tries to set {_show(name)} on a {type(self).__name__.strip('_')}")

    def __setstate__(self, state: object) -> None:
        _refuse(f"tries to alter a {type(self).__name__.strip('_')}")


class _Name(_StandIn):
    """A name that is only passed on: numpy.ndarray."""

    __slots__ = ()


class _Function(_StandIn):
    """A name that the file may call."""

    __slots__ = ()

    def __call__(self, *arguments: object) -> object:
        return self.value(*arguments)


class _StorageType(_StandIn):
    """torch.FloatStorage and its like; the value is the torch.dtype."""

    __slots__ = ()


class _Storage(_StandIn):
    """The value is the whole storage as a flat tensor."""

    __slots__ = ()


class _Value(_StandIn):
    """A finished array, scalar, tensor or torch.dtype: a stand-in that a result may contain."""

    __slots__ = ()


class _TensorValue(_Value):
    __slots__ = ()


class _DTypeValue(_Value):
    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """(version 3, byte order, subarray, names, fields, item size or -1, alignment, flags)."""
        if type(state) is not tuple or len(state) != 8 or state[0] != 3:
            raise ValueError(f"expected a NumPy dtype's state of version 3, found {_show(state)}")
        _, order, *parts, itemsize, _, _ = state
        if parts != [None, None, None]:
            raise ValueError("expected a NumPy dtype without fields, found one with fields")
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"expected a NumPy byte order (<, >, |, =), found {_show(order)}")
        if itemsize not in (-1, self.value.itemsize):
            raise ValueError(f"expected items of {self.value.itemsize} bytes, found {_show(itemsize)}")
        object.__setattr__(self, "value", self.value.newbyteorder(order))


class _ArrayValue(_Value):
    """None until BUILD brings the state, as NumPy writes an array before protocol 5."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """(version 1, shape, dtype, Fortran order, bytes or list of objects)."""
        if type(state) is not tuple or len(state) != 5 or state[0] != 1 or self.value is not None:
            raise ValueError("expected one NumPy array state of version 1, found another")
        _, shape, dtype, fortran, data = state
        if type(fortran) not in (bool, int):
            raise ValueError(f"expected True or False as Fortran order, found {_show(fortran)}")
        object.__setattr__(self, "value", _array(shape, dtype, "F" if fortran else "C", data))


# What a file may call


class _Builder:
    """The functions behind the allowed names, and how many bytes they may still make together."""

    def __init__(self, budget: int) -> None:
        self._left = budget
        self._hashing = _MOST_HASHED
        self.names = self._names()

    def _names(self) -> Names:
        calls: dict[tuple[str, str], Callable[..., object]] = {
            ("numpy", "dtype"): _dtype,
            ("_codecs", "encode"): self.encode,
            ("collections", "OrderedDict"): _empty_dict,
            ("torch", "Size"): _size,
            ("torch.storage", "_load_from_bytes"): self.load_from_bytes,
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        }
        for core in ("numpy.core", "numpy._core"):  # NumPy 1.x and 2.x
            calls[f"{core}.multiarray", "_reconstruct"] = _reconstruct
            calls[f"{core}.multiarray", "scalar"] = self.scalar
            calls[f"{core}.numeric", "_frombuffer"] = _frombuffer
        for builtins in ("builtins", "__builtin__"):  # protocols 2 and 3 have no opcodes for these
            calls[builtins, "bytes"] = _empty_bytes
            calls[builtins, "set"] = self.make_set
            calls[builtins, "frozenset"] = self.make_frozenset
        names: dict[tuple[str, str], _StandIn] = {}
        names.update((name, _Function(call)) for name, call in calls.items())
        names.update((("torch", str(d).removeprefix("torch.")), _Value(d)) for d in _TORCH_DTYPES)
        return {**names, ("numpy", "ndarray"): _NDARRAY}

    def spend(self, n: int) -> None:
        """Counts `n` bytes: one call repeated on one object must not fill the memory."""
        if n > self._left:
            raise ValueError(f"expected at most {self._left} more bytes of content, found {n}")
        self._left -= n

    def encode(self, text: Any, encoding: Any) -> bytes:
        """Protocol 2 has no bytes: it writes them as latin1 text."""
        if type(text) is not str or encoding != "latin1":
            raise ValueError(f"expected latin1 text to encode, found {_show(encoding)}")
        self.spend(len(text))
        return text.encode("latin1")

    def make_set(self, items: Any) -> set[object]:
        if type(items) is not list:
            raise ValueError(f"expected a set's list of items, found {type(items).__name__}")
        self._hash(items)
        return set(items)

    def make_frozenset(self, items: Any) -> frozenset[object]:
        made = frozenset(self.make_set(items))
        self._hashing -= 1 + len(made)
        return made

    def _hash(self, items: list[object]) -> None:
        self.spend(len(items))
        done: dict[int, int] = {}
        self._hashing -= sum(_steps_to_hash(item, done) for item in items)
        if self._hashing < 0:
            raise ValueError(f"expected at most {_MOST_HASHED} steps to hash tuples and long numbers")

    def scalar(self, dtype: Any, data: Any) -> _Value:
        kind = _plain_dtype(dtype)
        if kind.itemsize == 0 and data == b"":  # np.str_(""): NumPy has no arrays of this dtype
            return _Value(kind.type())
        if kind.hasobject:
            raise ValueError("expected a scalar of numbers or text, found an object")
        self.spend(kind.itemsize)
        return _Value(_array((), dtype, "C", data)[()])

    def load_from_bytes(self, data: Any) -> _Storage:
        """A tensor's storage. torch's own function runs whatever these bytes ask for."""
        if type(data) is not bytes:
            raise ValueError(f"expected bytes of a torch storage, found {type(data).__name__}")
        storage = _load_torch_stream(io.BytesIO(data), len(data), self, {})
        if type(storage) is not _Storage:
            raise ValueError(f"expected a torch storage, found {type(storage).__name__}")
        return storage


_NDARRAY = _Name(np.ndarray)
_TORCH_DTYPES = {
    torch.bool: "Bool",
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.float32: "Float",
    torch.float64: "Double",
}
_STORAGE_TYPES = {("torch", f"{n}Storage"): _StorageType(d) for d, n in _TORCH_DTYPES.items()}
_DTYPE_CODE = re.compile(r"b1|[iu][1248]|f[248]|[SU]\d{1,9}|O[48]")


def _empty_dict() -> dict[object, object]:
    return {}


def _empty_bytes() -> bytes:
    return b""


def _size(sizes: Any) -> tuple[int, ...]:
    _check_sizes("a torch.Size", sizes)
    return sizes


def _dtype(code: Any, align: Any = False, copy: Any = False) -> _DTypeValue:
    # align and copy change nothing in a dtype without fields
    if type(code) is not str or not _DTYPE_CODE.fullmatch(code):
        raise ValueError(f"expected a bool, integer, float or text dtype, found {_show(code)}")
    return _DTypeValue(np.dtype(object if code.startswith("O") else code))


def _reconstruct(kind: Any, shape: Any, code: Any) -> _ArrayValue:
    if kind is not _NDARRAY or shape != (0,) or code != b"b":
        raise ValueError("expected an empty numpy.ndarray to fill, found another")
    return _ArrayValue()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Value:
    if _plain_dtype(dtype).hasobject:
        raise ValueError("expected a buffer of numbers or text, found objects")
    if order == "K" and type(axes) is tuple:
        return _Value(_array(shape, dtype, "C", data).transpose(axes))
    if order not in ("C", "F"):
        raise ValueError(f"expected an array in C or F order, found {_show(order)}")
    return _Value(_array(shape, dtype, order, data))


def _array(shape: Any, dtype: Any, order: Any, data: Any) -> Any:
    """A read-only view of `data` as [*shape], or the list that an object array holds."""
    _check_sizes("an array's shape", shape)
    kind = _plain_dtype(dtype)
    if kind.hasobject:
        return _object_list(shape, data)
    if type(data) not in (bytes, bytearray):
        raise ValueError(f"expected an array's bytes, found {type(data).__name__}")
    expected = math.prod(shape) * kind.itemsize
    if kind.itemsize == 0 or len(data) != expected:
        raise ValueError(f"expected {expected} bytes for shape {_show(shape)} of {kind}, found {len(data)}")
    if kind.kind == "b":
        _check_bools(data)
    if kind.kind == "U":
        _check_text(data, kind)
    # frombuffer locks a bytearray against resizing, which would free the memory; np.ndarray does not
    flat = np.frombuffer(data, kind)
    flat.flags.writeable = False
    return flat.reshape(shape, order=order)


def _plain_dtype(dtype: Any) -> np.dtype:
    if type(dtype) is not _DTypeValue:
        raise ValueError(f"expected a NumPy dtype, found {type(dtype).__name__}")
    return dtype.value


def _object_list(shape: tuple[int, ...], data: Any) -> list[object]:
    if type(data) is not list or shape != (len(data),):
        raise ValueError(f"expected a one-dimensional object array, found shape {_show(shape)}")
    wrong = {type(item) for item in data} - {str, int, float, bool, type(None)}
    if wrong:
        allowed = "str, int, float, bool or None"
        names = sorted(kind.__name__.strip("_") for kind in wrong)
        raise ValueError(f"expected an object array of {allowed}, found {names}")
    return data


def _check_bools(data: Any) -> None:
    # NumPy and torch take any other byte for both true and false, depending on the operation.
    if np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise ValueError("expected bools of 0 and 1, found another byte")


def _check_text(data: Any, kind: np.dtype) -> None:
    codes = np.frombuffer(data, np.dtype("u4").newbyteorder(kind.byteorder))
    if codes.max(initial=0) > sys.maxunicode:
        raise ValueError("expected text, found a number that is no Unicode character")


def _check_sizes(what: str, sizes: Any) -> None:
    """A tuple of at most 64 integers from 0 to the largest size of this machine."""
    if type(sizes) is not tuple or len(sizes) > 64:
        raise ValueError(f"expected {what} as a tuple of up to 64 integers, found {_show(sizes)}")
    if any(type(n) is not int or not 0 <= n <= sys.maxsize for n in sizes):
        raise ValueError(f"expected {what} of integers >= 0, found {_show(sizes)}")


class _Storages:
    """Storages by key, made when the pickle mentions them and filled when it has been read."""

    def __init__(self, builder: _Builder) -> None:
        self.flat: dict[str, Tensor] = {}
        self._builder = builder

    def open(self, pid: Any) -> _Storage:
        """The storage of a persistent id ('storage', type, key, location, numel[, None])."""
        # the location is ignored (everything goes to the CPU); old views of storages are not read
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[0] != "storage" or any(pid[5:]):
            _refuse(f"asks for a persistent id that is not a whole torch storage; {_ALLOWED}")
        _, kind, key, _, numel = pid[:5]
        if type(kind) is not _StorageType or type(key) is not str:
            raise ValueError("expected a torch storage's type and key, found others")
        _check_sizes("a storage's length", (numel,))
        if key not in self.flat:
            self._builder.spend(numel * kind.value.itemsize)
            self.flat[key] = torch.empty(numel, dtype=kind.value)
        flat = self.flat[key]
        if flat.dtype != kind.value or flat.numel() != numel:
            found = f"{numel} of {kind.value}"
            raise ValueError(f"expected {flat.numel()} elements of {flat.dtype}, found {found}")
        return _Storage(flat)


def _rebuild_tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> _TensorValue:
    # requires_grad is read and dropped: data has no gradient
    if type(storage) is not _Storage:
        raise ValueError(f"expected a torch storage, found {type(storage).__name__}")
    if hooks != {} or metadata not in (None, {}):
        raise ValueError("expected a tensor without hooks or flags, found one with")
    flat = storage.value
    _check_view(offset, size, stride, flat.numel())
    tensor = torch.empty(0, dtype=flat.dtype)
    return _TensorValue(tensor.set_(flat.untyped_storage(), offset, size, stride))


def _check_view(offset: Any, size: Any, stride: Any, available: int) -> None:
    """Every index inside the storage, and no more elements than it holds."""
    _check_sizes("a tensor's size", size)
    _check_sizes("a tensor's stride", stride)
    _check_sizes("a tensor's offset", (offset,))
    if len(size) != len(stride):
        raise ValueError(f"expected as many strides as sizes, {len(size)}, found {len(stride)}")
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if numel > available or offset > available or (numel and last >= available):
        raise ValueError(
            f"expected a tensor inside its storage of {available} elements (save an expanded one "
            f"as .contiguous()), found size {_show(size)}, stride {_show(stride)}, offset {offset}"
        )


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any) -> _TensorValue:
    if type(data) is not _TensorValue or hooks != {}:
        raise ValueError("expected a Parameter's tensor without hooks, found another")
    return data


# From stand-ins to the result


def _plain(node: Any, done: dict[int, object]) -> object:
    """`node` with every stand-in replaced by what it stands for; what is shared stays shared."""
    if type(node) in (str, bytes, bytearray, int, float, bool, type(None)):
        return node
    if isinstance(node, _Value) and node.value is not None:
        return _plain(node.value, done) if type(node.value) is list else node.value
    if type(node) not in (dict, list, tuple, set, frozenset):
        _refuse(f"holds a {type(node).__name__.strip('_')} that is no array or tensor; {_ALLOWED}")
    if id(node) not in done:
        done[id(node)] = _OPEN
        done[id(node)] = _plain_container(node, done)
    if done[id(node)] is _OPEN:
        raise ValueError(f"expected a tree, found a {type(node).__name__} that contains itself")
    return done[id(node)]


_OPEN = object()


def _plain_container(node: Any, done: dict[int, object]) -> object:
    if type(node) is dict:
        return {_plain(key, done): _plain(value, done) for key, value in node.items()}
    return type(node)([_plain(item, done) for item in node])


def _refuse(reason: str) -> NoReturn:
    raise UnsafePickleError(reason)


def _show(value: object) -> str:
    """A file's own content, short and safe for one line of a message."""
    text = value if type(value) is str else reprlib.repr(value)
    return text[:200].encode("unicode_escape").decode()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__
