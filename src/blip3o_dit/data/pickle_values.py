"""Stand-ins for what a pickle names, and the checks that turn raw bytes into arrays and tensors.

Everything here takes arguments out of a file, so each function refuses (ValueError) what does not fit.
"""

from __future__ import annotations

import math
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
import torch

ALLOWED = (
    "only NumPy arrays, torch tensors and plain containers (dict, list, tuple, set, str, bytes, "
    "numbers, None) are allowed"
)
# Module names of NumPy 1.x and 2.x, and of Python 3 and 2: protocols 2 and 3 write the latter
NUMPY_CORES = ("numpy.core", "numpy._core")
BUILTINS = ("builtins", "__builtin__")


class UnsafePickleError(ValueError):
    """The file asks for more than arrays, tensors and plain containers. Nothing in it ran."""


class StandIn:
    """An opaque value. BUILD calls `__setstate__` or writes attributes: both are closed here."""

    __slots__ = ("value",)
    value: Any

    def __init__(self, value: Any = None) -> None:
        object.__setattr__(self, "value", value)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        refuse(f"tries to set {show(name)} on a {type(self).__name__}")

    def __setstate__(self, state: object) -> None:
        refuse(f"tries to alter a {type(self).__name__}")


# What a file may name, as (module, name)
StandIns = Mapping[tuple[str, str], StandIn]


class Name(StandIn):
    """A name that is only passed on: numpy.ndarray."""

    __slots__ = ()


class Function(StandIn):
    """A name that the file may call."""

    __slots__ = ()

    def __call__(self, *arguments: object) -> object:
        return self.value(*arguments)


class StorageType(StandIn):
    """torch.FloatStorage and its like; the value is the torch.dtype."""

    __slots__ = ()


class Storage(StandIn):
    """The value is the whole storage as a flat tensor."""

    __slots__ = ()


class Value(StandIn):
    """A finished array, scalar, tensor or torch.dtype: a stand-in that a result may contain."""

    __slots__ = ()


class TensorValue(Value):
    __slots__ = ()


class DTypeValue(Value):
    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """(version 3, byte order, subarray, names, fields, item size or -1, alignment, flags)."""
        if type(state) is not tuple or len(state) != 8 or state[0] != 3:
            raise ValueError(f"expected a NumPy dtype's state of version 3, found {show(state)}")
        _, order, *parts, itemsize, _, _ = state
        if parts != [None, None, None]:
            raise ValueError("expected a NumPy dtype without fields, found one with fields")
        if order not in ("<", ">", "|", "="):
            raise ValueError(f"expected a NumPy byte order (<, >, |, =), found {show(order)}")
        if itemsize not in (-1, self.value.itemsize):
            raise ValueError(f"expected items of {self.value.itemsize} bytes, found {show(itemsize)}")
        object.__setattr__(self, "value", self.value.newbyteorder(order))


class ArrayValue(Value):
    """None until BUILD brings the state, as NumPy writes an array before protocol 5."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        """(version 1, shape, dtype, Fortran order, bytes or list of objects)."""
        if type(state) is not tuple or len(state) != 5 or state[0] != 1 or self.value is not None:
            raise ValueError("expected one NumPy array state of version 1, found another")
        _, shape, dtype, fortran, data = state
        if type(fortran) not in (bool, int):
            raise ValueError(f"expected True or False as Fortran order, found {show(fortran)}")
        object.__setattr__(self, "value", make_array(shape, dtype, "F" if fortran else "C", data))


_NDARRAY = Name(np.ndarray)
# A pickle of a memory map carries its numbers, as that of an array does; it names no file.
_MEMMAPS: dict[tuple[str, str], StandIn] = {
    (module, "memmap"): _NDARRAY for module in ("numpy", *(f"{core}.memmap" for core in NUMPY_CORES))
}
TORCH_DTYPES = {
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
STORAGE_TYPES = {("torch", f"{n}Storage"): StorageType(d) for d, n in TORCH_DTYPES.items()}
_DTYPE_CODE = re.compile(r"b1|[iu][1248]|f[248]|[SU]\d{1,9}|O[48]")


def _torch_size(sizes: Any) -> tuple[int, ...]:
    check_sizes("a torch.Size", sizes)
    return sizes


def _numpy_dtype(code: Any, align: Any = False, copy: Any = False) -> DTypeValue:
    # align and copy change nothing in a dtype without fields
    if type(code) is not str or not _DTYPE_CODE.fullmatch(code):
        raise ValueError(f"expected a bool, integer, float or text dtype, found {show(code)}")
    return DTypeValue(np.dtype(object if code.startswith("O") else code))


def _numpy_reconstruct(kind: Any, shape: Any, code: Any) -> ArrayValue:
    if kind is not _NDARRAY or shape != (0,) or code != b"b":
        raise ValueError("expected an empty numpy.ndarray to fill, found another")
    return ArrayValue()


def _numpy_frombuffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Value:
    if dtype_of(dtype).hasobject:
        raise ValueError("expected a buffer of numbers or text, found objects")
    if order == "K" and type(axes) is tuple:
        return Value(make_array(shape, dtype, "C", data).transpose(axes))
    if order not in ("C", "F"):
        raise ValueError(f"expected an array in C or F order, found {show(order)}")
    return Value(make_array(shape, dtype, order, data))


def make_array(shape: Any, dtype: Any, order: Any, data: Any) -> Any:
    """A read-only view of `data` as [*shape], or the list that an object array holds."""
    check_sizes("an array's shape", shape)
    kind = dtype_of(dtype)
    if kind.hasobject:
        return _object_list(shape, data)
    if type(data) not in (bytes, bytearray):
        raise ValueError(f"expected an array's bytes, found {type(data).__name__}")
    expected = math.prod(shape) * kind.itemsize
    if kind.itemsize == 0 or len(data) != expected:
        raise ValueError(f"expected {expected} bytes for shape {show(shape)} of {kind}, found {len(data)}")
    if kind.kind == "b":
        check_bools(data)
    if kind.kind == "U":
        _check_text(data, kind)
    # frombuffer locks a bytearray against resizing, which would free the memory; np.ndarray does not
    flat = np.frombuffer(data, kind)
    flat.flags.writeable = False
    return flat.reshape(shape, order=order)


def dtype_of(dtype: Any) -> np.dtype:
    if type(dtype) is not DTypeValue:
        raise ValueError(f"expected a NumPy dtype, found {type(dtype).__name__}")
    return dtype.value


def _object_list(shape: tuple[int, ...], data: Any) -> list[object]:
    if type(data) is not list or shape != (len(data),):
        raise ValueError(f"expected a one-dimensional object array, found shape {show(shape)}")
    wrong = {type(item) for item in data} - {str, int, float, bool, type(None)}
    if wrong:
        allowed = "str, int, float, bool or None"
        found = sorted(kind.__name__ for kind in wrong)
        raise ValueError(f"expected an object array of {allowed}, found {found}")
    return data


def check_bools(data: Any) -> None:
    # NumPy and torch take any other byte for both true and false, depending on the operation.
    if np.frombuffer(data, np.uint8).max(initial=0) > 1:
        raise ValueError("expected bools of 0 and 1, found another byte")


def _check_text(data: Any, kind: np.dtype) -> None:
    codes = np.frombuffer(data, np.dtype("u4").newbyteorder(kind.byteorder))
    if codes.max(initial=0) > sys.maxunicode:
        raise ValueError("expected text, found a number that is no Unicode character")


def check_sizes(what: str, sizes: Any) -> None:
    """A tuple of at most 64 integers from 0 to the largest size of this machine."""
    if type(sizes) is not tuple or len(sizes) > 64:
        raise ValueError(f"expected {what} as a tuple of up to 64 integers, found {show(sizes)}")
    if any(type(n) is not int or not 0 <= n <= sys.maxsize for n in sizes):
        raise ValueError(f"expected {what} of integers >= 0, found {show(sizes)}")


def _rebuild_tensor(
    storage: Any,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> TensorValue:
    # requires_grad is read and dropped: data has no gradient
    if type(storage) is not Storage:
        raise ValueError(f"expected a torch storage, found {type(storage).__name__}")
    if hooks != {} or metadata not in (None, {}):
        raise ValueError("expected a tensor without hooks or flags, found one with")
    flat = storage.value
    _check_view(offset, size, stride, flat.numel())
    tensor = torch.empty(0, dtype=flat.dtype)
    return TensorValue(tensor.set_(flat.untyped_storage(), offset, size, stride))


def _check_view(offset: Any, size: Any, stride: Any, available: int) -> None:
    """Every index inside the storage, and no more elements than it holds."""
    check_sizes("a tensor's size", size)
    check_sizes("a tensor's stride", stride)
    check_sizes("a tensor's offset", (offset,))
    if len(size) != len(stride):
        raise ValueError(f"expected as many strides as sizes, {len(size)}, found {len(stride)}")
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if numel > available or offset > available or (numel and last >= available):
        raise ValueError(
            f"expected a tensor inside its storage of {available} elements (save an expanded one "
            f"as .contiguous()), found size {show(size)}, stride {show(stride)}, offset {offset}"
        )


def _rebuild_parameter(data: Any, requires_grad: Any, hooks: Any) -> TensorValue:
    if type(data) is not TensorValue or hooks != {}:
        raise ValueError("expected a Parameter's tensor without hooks, found another")
    return data


def _names() -> dict[tuple[str, str], StandIn]:
    calls: dict[tuple[str, str], Callable[..., object]] = {
        ("numpy", "dtype"): _numpy_dtype,
        ("collections", "OrderedDict"): lambda: {},
        ("torch", "Size"): _torch_size,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    }
    for core in NUMPY_CORES:
        calls[f"{core}.multiarray", "_reconstruct"] = _numpy_reconstruct
        calls[f"{core}.numeric", "_frombuffer"] = _numpy_frombuffer
    for builtins in BUILTINS:
        calls[builtins, "bytes"] = lambda: b""
    dtypes = {("torch", str(dtype).removeprefix("torch.")): Value(dtype) for dtype in TORCH_DTYPES}
    return (
        {name: Function(call) for name, call in calls.items()}
        | dtypes
        | _MEMMAPS
        | {("numpy", "ndarray"): _NDARRAY}
    )


# What a file may name of NumPy and torch; the names that cost memory or time are `safe_unpickler`'s.
ALLOWED_NAMES = _names()


def refuse(reason: str) -> NoReturn:
    raise UnsafePickleError(reason)


def show(value: object) -> str:
    """A file's own content, short and safe for one line of a message."""
    text = value if type(value) is str else reprlib.repr(value)
    return text[:200].encode("unicode_escape").decode()
