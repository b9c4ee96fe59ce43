"""Benign files load as pickle.load does; hostile ones are refused and leave no trace.

Each hostile payload is first given to the ordinary loader, which must make its marker: a payload
that does nothing would prove nothing.
"""

from __future__ import annotations

import contextlib
import copyreg
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blip3o_dit.data import pickle_values, safe_unpickler
from blip3o_dit.data.safe_unpickler import UnsafePickleError, load_pickle

PROTOCOLS = (2, 3, 4, 5)


def assert_same(found: object, expected: object) -> None:
    """Same values, dtypes, byte orders, memory layouts and containers."""
    if isinstance(expected, torch.Tensor):
        assert type(found) is torch.Tensor
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.stride() == expected.stride()
        assert found.storage_offset() == expected.storage_offset()
        assert not found.requires_grad
        assert torch.equal(found, expected)
    elif isinstance(expected, np.ndarray) and expected.dtype.hasobject:
        assert_same(found, expected.tolist())
    elif isinstance(expected, np.ndarray | np.generic):
        assert type(found) is type(expected)
        assert (found.dtype.str, found.shape) == (expected.dtype.str, expected.shape)
        assert found.strides == expected.strides
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert type(found) is dict
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert type(found) is (tuple if isinstance(expected, tuple) else list)
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    else:
        assert type(found) is type(expected)
        assert found == expected


def write(folder: Path, data: bytes, name: str = "file.pkl") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def error_of(path: Path) -> ValueError:
    """The refusal of `path`: exactly our types, one line, naming the file."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is what callers look at)
        load_pickle(path)
    assert type(caught.value) in (ValueError, UnsafePickleError)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    assert len(message) < 1000
    return caught.value


def reason_of(path: Path) -> str:
    """The refusal's message after the file's name, which would match too much."""
    return str(error_of(path)).removeprefix(f"{path}: ")


# Benign files

RNG = np.random.default_rng(0)
STRING_KEYS = {
    "a": 1,
    "b": [1.5, None, True, "é", b"\xff\x00"],
    "c": (1, (2, 10**30)),
    "d": {"e": {}},
}
BASE = torch.arange(24.0).reshape(4, 6)
BENIGN = {
    "containers": STRING_KEYS,
    "sets": {"s": {1, 2, "x"}, "f": frozenset({(1, 2)}), "empty": set()},
    "ordered": OrderedDict([("z", 1), ("a", OrderedDict())]),
    "float32": RNG.standard_normal((3, 4, 5)).astype(np.float32),
    "float16": RNG.standard_normal((3, 4)).astype(np.float16),
    "float64": np.array([np.nan, np.inf, -0.0]),
    "big-endian": np.arange(6, dtype=">f4").reshape(2, 3),
    "big-endian ints": np.arange(6, dtype=">i8"),
    "fortran": np.asfortranarray(RNG.standard_normal((3, 4))),
    "transposed": RNG.standard_normal((2, 3, 4)).transpose(1, 0, 2),
    "strided": np.arange(20)[::3],
    "read-only": np.frombuffer(b"abcd", np.uint8),
    "ints": [np.arange(4, dtype=kind) for kind in ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")],
    "bools": np.array([[True, False], [False, True]]),
    "one byte": np.array([7], dtype=np.uint8),
    "empty": np.zeros((0, 64, 3), np.float32),
    "empty strings": np.zeros((0,), "U5"),
    "zero-dimensional": np.array(2.5),
    "scalars": [
        np.float32(1.5),
        np.float16(2),
        np.int64(3),
        np.bool_(True),
        np.str_("é"),
        np.bytes_(b"x"),
    ],
    "big-endian scalar": np.array([1.5], ">f8")[0],
    "empty string scalar": [np.str_(""), np.bytes_(b"")],
    "scalar keys": {np.str_("a"): 1, np.int64(3): 2, ("t", np.float32(1)): 3},
    "text": np.array(["one", "zwölf", "\U0001f600"]),
    "big-endian text": np.array(["one", "zwölf"]).astype(">U5"),
    "bytes text": np.array([b"ab", b"c"]),
    "objects": np.array(["a caption", "b", None, 1, 2.5, True], dtype=object),
    "no objects": np.array([], dtype=object),
    "dtypes": [np.dtype("f4"), torch.float16],
    "tensors": [torch.arange(4).to(kind) for kind in pickle_values.TORCH_DTYPES],
    "tensor views": [BASE[1:, 2:], BASE.t(), BASE[0, 0], BASE[:, ::2], BASE[4:]],
    "parameter": torch.nn.Parameter(torch.ones(2, 3)),
    "gradient": torch.ones(2, requires_grad=True),
    "empty tensors": [torch.zeros(0, 64, 3), torch.zeros(64, 0, 3)],
    "size": torch.zeros(2, 3).shape,
    "documented": {
        "eva_blip3o_embeddings": RNG.standard_normal((5, 4, 8)).astype(np.float16),
        "clip_blip3o_embeddings": torch.randn(5, 4, 6),
        "captions": [f"caption {i}" for i in range(5)],
        "keys": [f"{i:05d}" for i in range(5)],
        "config": {"dtype": torch.bfloat16, "mean": np.float64(0.25), "grid": (2, 2)},
    },
}


BIG_ENDIAN = [case for case in BENIGN if case.startswith("big-endian")]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", [case for case in BENIGN if case not in BIG_ENDIAN])
def test_loads_what_pickle_loads(tmp_path: Path, case: str, protocol: int) -> None:
    data = pickle.dumps(BENIGN[case], protocol)
    assert_same(load_pickle(write(tmp_path, data)), pickle.loads(data))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", BIG_ENDIAN)
def test_keeps_the_byte_order(tmp_path: Path, case: str, protocol: int) -> None:
    """As protocol 5 does; before it, pickle.load swaps the bytes into a copy."""
    data = pickle.dumps(BENIGN[case], protocol)
    assert_same(load_pickle(write(tmp_path, data)), BENIGN[case])


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", [case for case in BENIGN if case not in BIG_ENDIAN])
def test_loads_what_torch_loads(tmp_path: Path, case: str, protocol: int, zipped: bool) -> None:
    path = tmp_path / "file.pt"
    torch.save(BENIGN[case], path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert_same(load_pickle(path), torch.load(path, weights_only=False))


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_saved_with_one_storage_share_it(tmp_path: Path, zipped: bool) -> None:
    base = torch.arange(10.0)
    torch.save([base, base[2:5]], tmp_path / "f.pt", _use_new_zipfile_serialization=zipped)
    whole, part = load_pickle(tmp_path / "f.pt")
    whole[2] = -1
    assert part.tolist() == [-1, 3, 4]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shared_objects_stay_shared(tmp_path: Path, protocol: int) -> None:
    array, row = np.arange(3), ["x"]
    found = load_pickle(write(tmp_path, pickle.dumps([array, row, array, row], protocol)))
    assert found[0] is found[2]
    assert found[1] is found[3]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_are_read_only(tmp_path: Path, protocol: int) -> None:
    found = load_pickle(write(tmp_path, pickle.dumps(np.zeros(3), protocol)))
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def with_numpy_1_names(data: bytes) -> bytes:
    """The same pickle with `numpy.core` in place of `numpy._core`, without frames."""
    if data[2:3] == pickle.FRAME:
        data = data[:2] + data[11:]
    for module in (b"multiarray", b"numeric"):
        old, new = b"numpy._core." + module, b"numpy.core." + module
        data = data.replace(bytes([len(old)]) + old, bytes([len(new)]) + new).replace(old, new)
    return data


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_1_names(tmp_path: Path, protocol: int) -> None:
    expected = {"a": np.arange(6.0).reshape(2, 3), "s": np.float32(1.5), "t": np.array(["x", "yy"])}
    data = with_numpy_1_names(pickle.dumps(expected, protocol))
    assert b"numpy._core" not in data
    assert b"numpy.core.multiarray" in data
    assert_same(load_pickle(write(tmp_path, data)), expected)


def test_accepts_a_str_path(tmp_path: Path) -> None:
    assert load_pickle(str(write(tmp_path, pickle.dumps([1])))) == [1]


# Hostile files: the payload makes the folder `marker`


class Reduced:
    """Pickles as a call of os.mkdir."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.marker,)


class Nested:
    """Pickles as a tensor's storage does, around any bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple[object, ...]:
        return torch.storage._load_from_bytes, (self.data,)


class Made:
    """Acts when an instance is made, with or without keywords, or when its state is set."""

    def __new__(cls, folder: str = "") -> Made:
        if folder:
            os.mkdir(folder)
        return super().__new__(cls)

    def __setstate__(self, folder: str) -> None:
        os.mkdir(folder)


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def stack_name(module: str, attribute: str) -> bytes:
    return text(module) + text(attribute) + b"\x93"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def program(*opcodes: bytes) -> bytes:
    return b"\x80\x04" + b"".join(opcodes) + b"."


def python(marker: Path) -> bytes:
    return text(f"__import__('os').mkdir({str(marker)!r})")


MADE = name(__name__, "Made")
HOSTILE = {
    "os.system by GLOBAL": lambda m: program(call(name("posix", "system"), text(f"mkdir {m}"))),
    "os.system by STACK_GLOBAL": lambda m: program(call(stack_name("os", "system"), text(f"mkdir {m}"))),
    "protocol 0": lambda m: f"cposix\nmkdir\n(S'{m}'\ntR.".encode(),
    "eval": lambda m: program(call(name("builtins", "eval"), python(m))),
    "exec": lambda m: b"\x80\x02" + call(name("__builtin__", "exec"), python(m)) + b".",
    "getattr": lambda m: program(
        call(
            call(
                name("builtins", "getattr"),
                call(name("builtins", "__import__"), text("os")),
                text("mkdir"),
            ),
            text(str(m)),
        )
    ),
    "__import__": lambda m: program(
        call(name("builtins", "__import__"), text("os")),
        b"0",
        call(name("os", "mkdir"), text(str(m))),
    ),
    "subprocess.check_call": lambda m: program(
        call(name("subprocess", "check_call"), b"](" + text("mkdir") + text(str(m)) + b"e")
    ),
    "dotted": lambda m: program(call(stack_name("os", "path.os.mkdir"), text(str(m)))),
    "dotted in an allowed module": lambda m: program(call(stack_name("torch", "os.mkdir"), text(str(m)))),
    "dotted after an allowed name": lambda m: program(
        call(stack_name("torch._utils", "_rebuild_tensor_v2.__globals__.__class__.__base__"), b""),
        b"0",
        call(name("os", "mkdir"), text(str(m))),
    ),
    "INST": lambda m: program(b"(" + text(str(m)) + b"iposix\nmkdir\n"),
    "OBJ": lambda m: program(b"(" + MADE + text(str(m)) + b"o"),
    "NEWOBJ": lambda m: program(MADE + text(str(m)) + b"\x85\x81"),
    "NEWOBJ_EX": lambda m: program(MADE + b")}" + text("folder") + text(str(m)) + b"s\x92"),
    "BUILD": lambda m: program(MADE + b")\x81" + text(str(m)) + b"b"),
    "after POP": lambda m: program(call(name("posix", "mkdir"), text(str(m))), b"0N"),
    "as a dict key": lambda m: program(b"}", call(name("posix", "mkdir"), text(str(m))), b"Ns"),
    "in a list": lambda m: pickle.dumps([1, [2, [Reduced(m)]]]),
    "in a dict value": lambda m: pickle.dumps({"captions": ["a"], "config": {"x": Reduced(m)}}),
    "in an object array": lambda m: pickle.dumps(np.array(["a", Reduced(m)], dtype=object)),
    "in an object array, protocol 2": lambda m: pickle.dumps(np.array([Reduced(m)], dtype=object), 2),
    "in a tensor's storage": lambda m: storage_bytes(torch_stream(Reduced(m))),
    "in a tensor's storage, as a zip": lambda m: storage_bytes(torch_zip(Reduced(m))),
    "in a storage in a storage": lambda m: storage_bytes(torch_stream(Nested(torch_stream(Reduced(m))))),
    "in a tensor's storage, plain": lambda m: storage_bytes(pickle.dumps(Reduced(m), 2)),
}


def torch_stream(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def torch_zip(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def storage_bytes(data: bytes) -> bytes:
    load = name("torch.storage", "_load_from_bytes")
    return program(call(load, b"B" + struct.pack("<I", len(data)) + data))


def run_unprotected(data: bytes) -> None:
    # the payload runs, and then the rest of the file may make no sense
    with contextlib.suppress(pickle.UnpicklingError, RuntimeError, TypeError):
        pickle.loads(data)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path: Path, case: str) -> None:
    marker = tmp_path / "marker"
    data = HOSTILE[case](marker)
    run_unprotected(data)
    assert marker.exists(), "the payload does nothing, so this test proves nothing"
    marker.rmdir()

    error = error_of(write(tmp_path, data))
    assert not marker.exists()
    if case != "in a tensor's storage, as a zip":  # a storage is never a zip file
        assert type(error) is UnsafePickleError


@pytest.mark.parametrize("make", [torch_zip, torch_stream])
@pytest.mark.parametrize("around", [lambda x: x, lambda x: {"a": torch.ones(2), "b": [x]}])
def test_a_hostile_torch_file_is_refused_and_does_nothing(tmp_path, make, around) -> None:
    marker = tmp_path / "marker"
    path = write(tmp_path, make(around(Reduced(marker))))
    torch.load(path, weights_only=False)
    assert marker.exists()
    marker.rmdir()

    error = error_of(path)
    assert not marker.exists()
    assert type(error) is UnsafePickleError
    assert "posix.mkdir" in str(error)


@pytest.mark.parametrize(
    "asked",
    [
        "posix.system", "os.system", "nt.system", "builtins.eval", "builtins.exec",
        "builtins.getattr", "builtins.__import__", "builtins.open", "builtins.bytearray",
        "subprocess.Popen", "importlib.import_module", "functools.partial", "operator.attrgetter",
        "types.FunctionType", "pickle.loads", "copyreg._reconstructor", "codecs.encode",
        "_codecs.decode", "numpy.load", "numpy.fromfile", "numpy.savez", "numpy.ndarray.tofile",
        "numpy._core.multiarray.frombuffer", "numpy._core.multiarray.ndarray", "torch.load",
        "torch.serialization.load", "torch.hub.load", "torch.Tensor",
        "torch.storage.UntypedStorage", "torch._utils._rebuild_tensor", "torch.FloatStorage",
        "torch._tensor._rebuild_from_type_v2", "collections.Counter",
    ],
)  # fmt: skip
@pytest.mark.parametrize("make", [name, stack_name])
def test_the_refusal_names_the_global_and_what_is_allowed(tmp_path: Path, asked: str, make) -> None:
    module, _, attribute = asked.rpartition(".")
    error = error_of(write(tmp_path, program(make(module, attribute))))
    assert type(error) is UnsafePickleError
    assert f"asks for {asked};" in str(error)
    assert "NumPy arrays, torch tensors and plain containers" in str(error)


def test_a_name_with_line_breaks_stays_on_one_line(tmp_path: Path) -> None:
    reason = reason_of(write(tmp_path, program(stack_name("os\nsystem", "x" * 5000 + "\x1b[0m"))))
    assert "os\\nsystem" in reason


@pytest.mark.parametrize("opcode", [b"\x82\xf0", b"\x83\xf0\x00", b"\x84\xf0\x00\x00\x00"])
def test_extension_codes_are_refused(tmp_path: Path, opcode: bytes) -> None:
    marker = tmp_path / "marker"
    data = program(call(opcode, text(str(marker))))
    copyreg.add_extension("posix", "mkdir", 0xF0)
    try:
        pickle.loads(data)  # and now the function sits in the cache that find_class is not asked about
        assert marker.exists()
        marker.rmdir()
        error = error_of(write(tmp_path, data))
    finally:
        copyreg.remove_extension("posix", "mkdir", 0xF0)
        copyreg._extension_cache.pop(0xF0, None)
    assert type(error) is UnsafePickleError
    assert not marker.exists()


@pytest.mark.parametrize("opcodes", [b"Pname\n", b"X\x01\x00\x00\x00aQ", b"\x97"])
def test_objects_outside_the_file_are_refused(tmp_path: Path, opcodes: bytes) -> None:
    error = error_of(write(tmp_path, program(opcodes)))
    assert type(error) is UnsafePickleError
    assert "outside the file" in str(error)


ALLOWED = safe_unpickler._Builder(0).names


@pytest.mark.parametrize("state", [b"}" + text("value") + b"Ns", b"N}" + text("value") + b"Ns\x86", b"N"])
@pytest.mark.parametrize("allowed", ALLOWED, ids=".".join)
def test_build_cannot_alter_an_allowed_name(tmp_path: Path, allowed, state: bytes) -> None:
    error = error_of(write(tmp_path, program(name(*allowed), state, b"b0N")))
    assert type(error) is UnsafePickleError
    assert "tries to alter" in str(error)


def all_subclasses(kind: type) -> list[type]:
    return [kind, *(sub for direct in kind.__subclasses__() for sub in all_subclasses(direct))]


@pytest.mark.parametrize("kind", all_subclasses(pickle_values.StandIn))
def test_a_stand_in_has_nothing_to_write_to(kind: type) -> None:
    stand_in = kind(1)
    assert not hasattr(stand_in, "__dict__")
    for attribute in ("value", "__class__", "other"):
        with pytest.raises(UnsafePickleError):
            setattr(stand_in, attribute, 2)
    assert stand_in.value == 1


@pytest.mark.parametrize(
    "opcodes",
    [
        name("numpy", "ndarray"),
        name("numpy", "dtype"),
        b"]" + name("collections", "OrderedDict") + b"a",
        b"}" + name("torch", "Size") + b"Ns",
        storage_bytes(torch_stream(torch.ones(3)._typed_storage()))[2:-1],
    ],
)
def test_a_bare_name_is_no_result(tmp_path: Path, opcodes: bytes) -> None:
    assert "is no array or tensor" in reason_of(write(tmp_path, program(opcodes)))


# Arrays and tensors that do not fit

MULTIARRAY, NUMERIC = "numpy.core.multiarray", "numpy.core.numeric"
RECONSTRUCT = call(name(MULTIARRAY, "_reconstruct"), name("numpy", "ndarray"), b"K\x00\x85", b"C\x01b")


def dtype(code: str, order: str = "<", parts: bytes = b"NNN", itemsize: int = -1) -> bytes:
    size = struct.pack("<i", itemsize)
    state = b"(K\x03" + text(order) + parts + b"J" + size + b"J\xff\xff\xff\xffK\x00t"
    return call(name("numpy", "dtype"), text(code), b"\x89", b"\x88") + state + b"b"


def array(shape: bytes, kind: bytes, data: bytes, version: bytes = b"K\x01") -> bytes:
    return RECONSTRUCT + array_state(shape, kind, data, version)


def array_state(shape: bytes, kind: bytes, data: bytes, version: bytes = b"K\x01") -> bytes:
    return b"(" + version + shape + kind + b"\x89" + data + b"tb"


def short_bytes(data: bytes) -> bytes:
    return b"C" + bytes([len(data)]) + data


def buffer(*arguments: bytes) -> bytes:
    return call(name(NUMERIC, "_frombuffer"), *arguments)


TWO_FLOATS = short_bytes(struct.pack("<2f", 1, 2))
STATE = array_state(b"K\x02\x85", dtype("f4"), TWO_FLOATS)


def test_the_hand_made_array_is_sound(tmp_path: Path) -> None:
    data = program(array(b"K\x02\x85", dtype("f4"), TWO_FLOATS))
    assert_same(pickle.loads(data), np.array([1, 2], np.float32))
    assert_same(load_pickle(write(tmp_path, data)), np.array([1, 2], np.float32))


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (array(b"K\x03\x85", dtype("f4"), TWO_FLOATS), "for shape (3,) of float32, found 8"),
        (array(b"K\x01\x85", dtype("f4"), TWO_FLOATS), "expected 4 bytes"),
        (array(b"(J\xff\xff\xff\xffJ\xfe\xff\xff\xfft", dtype("f4"), TWO_FLOATS), ">= 0"),
        (array(b"G@\x00\x00\x00\x00\x00\x00\x00\x85", dtype("f4"), TWO_FLOATS), "integers >= 0"),
        (array(b"\x88K\x02\x86", dtype("f4"), TWO_FLOATS), "integers >= 0"),
        (array(b"K\x02", dtype("f4"), TWO_FLOATS), "as a tuple"),
        (array(b"K\x02\x85", dtype("f4"), text("12345678")), "found str"),
        (array(b"K\x02\x85", dtype("f4"), TWO_FLOATS, b"K\x02"), "version 1"),
        (array(b"K\x02\x85", text("f4"), TWO_FLOATS), "expected a NumPy dtype"),
        (array(b"K\x02\x85", dtype("f4"), TWO_FLOATS) + STATE, "one NumPy array state"),
        (array(b"K\x02\x85", dtype("f4", itemsize=1), TWO_FLOATS), "items of 4 bytes, found 1"),
        (array(b"K\x02\x85", dtype("f4", parts=b"N(t}"), TWO_FLOATS), "without fields"),
        (array(b"K\x02\x85", dtype("f4", order="?"), TWO_FLOATS), "byte order"),
        (array(b"K\x01\x85", dtype("c8"), TWO_FLOATS), "found c8"),
        (array(b"K\x01\x85", dtype("M8"), TWO_FLOATS), "found M8"),
        (array(b"K\x01\x85", dtype("V8"), TWO_FLOATS), "found V8"),
        (array(b"K\x01\x85", dtype("f4,f4"), TWO_FLOATS), "found f4,f4"),
        (array(b"K\x04\x85", dtype("U0"), b"C\x00"), "found 0"),
        (array(b"K\x01\x85", dtype("b1", "|"), b"C\x01\x02"), "bools of 0 and 1"),
        (array(b"K\x01\x85", dtype("U1"), b"C\x04\xff\xff\xff\xff"), "no Unicode character"),
        (array(b"K\x01\x85", dtype("O8", "|"), b"C\x08abcdefgh"), "object array"),
        (array(b"K\x02\x85", dtype("O8", "|"), b"]Na"), "shape (2,)"),
        (array(b"K\x01K\x01\x86", dtype("O8", "|"), b"]Na"), "shape (1, 1)"),
        (array(b"K\x01\x85", dtype("O8", "|"), b"]]a"), "found ['list']"),
        (array(b")", dtype("O8", "|"), b"]Na"), "shape ()"),
        (RECONSTRUCT, "is no array"),
        (call(name(MULTIARRAY, "_reconstruct"), b"NK\x00\x85C\x01b"), "empty numpy.ndarray"),
        (call(name(MULTIARRAY, "scalar"), dtype("O8", "|"), b"N"), "found an object"),
        (call(name(MULTIARRAY, "scalar"), dtype("f4"), TWO_FLOATS), "expected 4 bytes"),
        (buffer(TWO_FLOATS, dtype("f4"), b"K\x03\x85", text("C")), "expected 12 bytes"),
        (buffer(TWO_FLOATS, dtype("f4"), b"K\x02\x85", text("A")), "C or F order"),
        (buffer(TWO_FLOATS, dtype("f4"), b"K\x02\x85", text("K"), b"K\x05\x85"), "axis"),
        (buffer(b"]", dtype("O8"), b"K\x00\x85", text("C")), "found objects"),
        (call(name("_codecs", "encode"), text("x"), text("rot13")), "found rot13"),
        (call(name("_codecs", "encode"), text("x"), text("zip")), "found zip"),
        (call(name("builtins", "bytes"), b"J\xff\xff\xff\x7f"), "argument"),
    ],
)  # fmt: skip
def test_an_array_that_does_not_fit_is_refused(tmp_path: Path, opcodes: bytes, message: str) -> None:
    assert message in reason_of(write(tmp_path, program(opcodes)))


def tensor(offset: int, size: tuple[int, ...], stride: tuple[int, ...], tail: bytes = b"") -> bytes:
    """A hand-made view of a storage of six floats."""
    storage = storage_bytes(torch_stream(torch.arange(6.0)._typed_storage()))[2:-1]
    parts = [pickle.dumps(x, 2)[2:-1] for x in (offset, size, stride)]
    hooks = tail or b"\x89" + call(name("collections", "OrderedDict"))
    return call(name("torch._utils", "_rebuild_tensor_v2"), storage, *parts, hooks)


def test_the_hand_made_tensor_is_sound(tmp_path: Path) -> None:
    data = program(tensor(1, (2, 2), (3, 1)))
    expected = torch.arange(6.0).as_strided((2, 2), (3, 1), 1)
    assert_same(pickle.loads(data), expected)
    assert_same(load_pickle(write(tmp_path, data)), expected)


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (tensor(0, (7,), (1,)), "storage of 6 elements"),
        (tensor(0, (7,), (0,)), "storage of 6 elements"),
        (tensor(0, (1 << 40,), (0,)), "storage of 6 elements"),
        (tensor(0, (3, 3), (1, 1)), "storage of 6 elements"),
        (tensor(5, (2,), (1,)), "offset 5"),
        (tensor(0, (2, 2), (5, 1)), "storage of 6 elements"),
        (tensor(7, (0,), (1,)), "offset 7"),
        (tensor(-1, (2,), (1,)), "offset of integers >= 0"),
        (tensor(0, (-2,), (1,)), "size of integers >= 0"),
        (tensor(0, (2,), (-1,)), "stride of integers >= 0"),
        (tensor(0, (2,), (1, 1)), "as many strides"),
        (tensor(0, (1,) * 65, (1,) * 65), "up to 64"),
        (tensor(0, (1 << 70,), (0,)), "integers >= 0"),
        (tensor(0, (2,), (1,), b"\x89}K\x01Ns"), "without hooks"),
        (tensor(0, (2,), (1,), b"\x89}}" + text("conj") + b"\x88s"), "without hooks or flags"),
        (call(name("torch._utils", "_rebuild_tensor_v2"), b"NK\x00))\x89}"), "torch storage"),
        (call(name("torch._utils", "_rebuild_parameter"), b"]\x89}"), "Parameter's tensor"),
        (call(name("torch", "Size"), b"K\x02"), "torch.Size as a tuple"),
    ],
)  # fmt: skip
def test_a_tensor_outside_its_storage_is_refused(tmp_path: Path, opcodes: bytes, message: str) -> None:
    assert message in reason_of(write(tmp_path, program(opcodes)))


def test_an_expanded_tensor_is_refused_with_the_remedy(tmp_path: Path) -> None:
    data = pickle.dumps(torch.ones(1).expand(1000))
    assert ".contiguous()" in reason_of(write(tmp_path, data))


def test_a_storage_that_is_never_filled_is_refused(tmp_path: Path) -> None:
    """torch.load returns uninitialised memory for this file."""
    whole = torch_stream(torch.arange(100.0))
    at = whole.rindex(b"\x80\x02]")  # the list of keys
    data = whole[:at] + b"\x80\x02]."
    assert torch.load(io.BytesIO(data), weights_only=True).shape == (100,)
    assert "list of storages" in reason_of(write(tmp_path, data))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89", "byte order"),
        (b"\x06" + b"\0" * 7, b"\x05" + b"\0" * 7, "storage of 6 elements, found 5"),
        (struct.pack("<f", 5), b"", "found fewer"),
        (struct.pack("<f", 5), b"12345678", "expected the end"),
        (b"\x80\x02M\xe9\x03.", b"\x80\x02M\xe8\x03.", "torch.save wrote"),
        (b"FloatStorage", b"torch.Storage", "asks for torch.torch.Storage"),
        (b"Ntq\x04Q.", b"X\x01\0\0\0aNN\x87tQ.", "whole torch storage"),
    ],
)
def test_an_altered_storage_is_refused(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    stream = torch_stream(torch.arange(6.0)._typed_storage())
    assert stream.count(old) == 1
    reason = reason_of(write(tmp_path, storage_bytes(stream.replace(old, new))))
    assert message in reason


def test_bools_in_a_tensor_are_0_and_1(tmp_path: Path) -> None:
    data = pickle.dumps(torch.tensor([True, True, False]))
    assert data.count(b"\x01\x01\x00") == 1
    error = reason_of(write(tmp_path, data.replace(b"\x01\x01\x00", b"\x01\x02\x00")))
    assert "bools of 0 and 1" in error


def test_a_storage_holds_nothing_but_numbers(tmp_path: Path) -> None:
    inner = torch_stream(Nested(torch_stream(torch.ones(2)._typed_storage())))
    reason = reason_of(write(tmp_path, storage_bytes(inner)))
    assert "asks for torch.storage._load_from_bytes" in reason
    reason = reason_of(write(tmp_path, storage_bytes(torch_stream([1, 2]))))
    assert "expected a torch storage, found list" in reason


def rezip(data: bytes, edit=lambda name, content: content, method=zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for info in old.infolist():
            new.writestr(info.filename, edit(info.filename, old.read(info)))
    return buffer.getvalue()


def test_compressed_zip_records_are_refused(tmp_path: Path) -> None:
    stored = torch_zip(torch.zeros(1 << 20))
    assert_same(load_pickle(write(tmp_path, rezip(stored))), torch.zeros(1 << 20))
    small = rezip(stored, method=zipfile.ZIP_DEFLATED)
    assert len(small) < len(stored) / 100
    assert "compressed" in reason_of(write(tmp_path, small))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda name, x: x[:-4] if name.endswith("data/0") else x, "found fewer"),
        (lambda name, x: x + b"1234" if name.endswith("data/0") else x, "expected the end"),
        (lambda name, x: b"big" if name.endswith("byteorder") else x, "little-endian"),
        (lambda name, x: x.replace(b"FloatStorage", b"LongStorage"), "found fewer"),
        (lambda name, x: x.replace(b"FloatStorage", b"TextStorage"), "asks for torch.TextStorage"),
        (lambda name, x: x.replace(b"storage", b"modulee"), "persistent id"),
    ],
)
def test_an_altered_torch_zip_is_refused(tmp_path: Path, edit, message: str) -> None:
    data = rezip(torch_zip(torch.arange(8.0)), edit)
    assert message in reason_of(write(tmp_path, data))


def storage_id(kind: str, numel: int) -> bytes:
    numbers = b"K" + bytes([numel])
    return b"(" + text("storage") + name("torch", kind) + text("0") + text("cpu") + numbers + b"tQ"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("IntStorage", 8), "expected 8 elements of torch.float32, found 8 of torch.int32"),
        (("FloatStorage", 7), "expected 8 elements of torch.float32, found 7"),
        (("float32", 8), "expected a torch storage's type and key"),
    ],
)
def test_one_storage_has_one_type_and_length(tmp_path: Path, other, message: str) -> None:
    ids = storage_id("FloatStorage", 8) + storage_id(*other)
    data = rezip(
        torch_zip(torch.arange(8.0)),
        lambda name, x: program(ids, b"\x86") if name.endswith("data.pkl") else x,
    )
    assert message in reason_of(write(tmp_path, data))


@pytest.mark.parametrize("field", [20, 24, 42])  # compressed size, size, position
def test_a_zip_record_outside_the_file_is_refused(tmp_path: Path, field: int) -> None:
    data = bytearray(rezip(torch_zip(torch.arange(8.0))))
    at = data.index(b"PK\x01\x02") + field  # the first record of the central directory
    data[at : at + 4] = struct.pack("<I", 0x7FFFFFFF)
    assert "inside the file" in reason_of(write(tmp_path, bytes(data)))


def test_a_flipped_bit_in_a_torch_zip_is_found(tmp_path: Path) -> None:
    data = torch_zip(torch.full((8,), 3.0))
    at = data.index(struct.pack("<f", 3.0) * 8)
    data = data[:at] + b"\x01" + data[at + 1 :]
    assert "CRC" in reason_of(write(tmp_path, data))


def test_another_zip_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    assert "torch.save" in reason_of(tmp_path / "a.npz")


# Broken files

WHOLE = pickle.dumps(BENIGN["documented"], 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello world", "found b' ' at byte 5"),
        (b"\x89PNG\r\n\x1a\n", "outside the file"),
        (b"PK\x03\x04 not a zip", "zip"),
        (WHOLE[:-1], "more bytes"),
        (b"\x80\x04N", "end of the file"),
        (WHOLE[: len(WHOLE) // 2], "more bytes"),
        (WHOLE + WHOLE, "expected the end"),
        (b"\x80\x04.", "stack"),
        (b"\x80\x04h\x05.", "emo"),
        (b"\x80\x04(.", "not a readable pickle"),
        (b"\x80\x04R.", "stack"),
        (b"\x80\x04K\x01K\x02s.", "stack"),
        (b"\x80\x04}]Ns.", "unhashable"),
        (b"\x80\x04NK\x01\x85R.", "callable"),
        (b"\x80\x04NK\x01b.", "not a readable pickle"),
        (b"\x80\x04N)\x81.", "type"),
        (b"\x80\x04X\x01\x00\x00\x00\xff.", "decode"),
        (b"\x80\x63N.", "protocol"),
        (b"I12x\n.", "could not convert"),
        (b"L" + b"9" * 5000 + b"L\n.", "4300"),
        (b"\x80\x04]" + b"]" * 100_000 + b"a" * 100_000 + b".", "recursion"),
        (b"\x80\x04]\x94h\x00a.", "contains itself"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.", "expected 1099511627776 more bytes"),
        (b"\x80\x04\x8d" + struct.pack("<Q", 1 << 63) + b"x.", "more bytes"),
        (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.", "more bytes"),
        (b"\x80\x04B" + struct.pack("<I", 1 << 31) + b"x.", "more bytes"),
        (b"\x80\x04T" + struct.pack("<i", -1) + b"x.", "more bytes"),
        (b"\x80\x04\x8b" + struct.pack("<i", -1) + b"x.", "more bytes"),
        (b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"N.", "more bytes"),
        (b"\x80\x04Nr" + struct.pack("<I", 1 << 28) + b".", "memo index"),
        (b"Np268435456\n.", "memo index"),
    ],
)  # fmt: skip
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    tracemalloc.start()
    error = error_of(write(tmp_path, data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in str(error)
    assert peak < 32 << 20


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pkl: no such file"):
        load_pickle(tmp_path / "none.pkl")
    assert "found a directory" in reason_of(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "found something else" in reason_of(tmp_path / "pipe")


@pytest.mark.parametrize(
    "kind",
    [
        AttributeError, BufferError, EOFError, IndexError, KeyError, MemoryError, NotImplementedError,
        OverflowError, RecursionError, RuntimeError, TypeError, UnicodeError, ZeroDivisionError,
        pickle.UnpicklingError, struct.error, zipfile.BadZipFile,
    ],
)  # fmt: skip
def test_reading_raises_no_other_error(tmp_path: Path, monkeypatch, kind: type) -> None:
    def fail(*_: object) -> None:
        raise kind

    path = write(tmp_path, WHOLE)
    monkeypatch.setattr(safe_unpickler, "_load", fail)
    assert reason_of(path) == f"not a readable pickle: {kind.__name__}"


def test_a_failing_disk_is_not_called_a_bad_pickle(tmp_path: Path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "input/output error")

    path = write(tmp_path, WHOLE)
    monkeypatch.setattr(safe_unpickler, "_load", fail)
    with pytest.raises(OSError, match="input/output"):
        load_pickle(path)


def test_bytes_under_an_array_cannot_be_resized(tmp_path: Path) -> None:
    held = b"\x96" + struct.pack("<Q", 8) + b"12345678\x940"
    view = buffer(b"h\x00", dtype("f4"), b"K\x02\x85", text("C"))
    data = b"\x80\x05" + held + b"(" + view + b"h\x00(K\x01et."
    assert "Existing exports" in reason_of(write(tmp_path, data))


@pytest.mark.parametrize(
    "repeat",
    [
        call(name("_codecs", "encode"), b"h\x00", text("latin1")),
        call(name(MULTIARRAY, "scalar"), dtype("S100000", "|", itemsize=100_000), b"h\x01"),
        call(name("torch.storage", "_load_from_bytes"), b"h\x02"),
        call(name("builtins", "set"), b"h\x03"),
    ],
)  # fmt: skip
def test_repeating_one_object_does_not_multiply_memory(tmp_path: Path, repeat: bytes) -> None:
    big = b"x" * 100_000
    stream = torch_stream(torch.zeros(25_000)._typed_storage())
    remembered = [
        text(big.decode()),
        b"B" + struct.pack("<I", len(big)) + big,
        b"B" + struct.pack("<I", len(stream)) + stream,
        b"](" + b"".join(b"M" + struct.pack("<H", i) for i in range(50_000)) + b"e",
    ]
    head = b"".join(item + b"\x940" for item in remembered)
    assert load_pickle(write(tmp_path, program(head, repeat, b"0N"), "once.pkl")) is None
    reason = reason_of(write(tmp_path, program(head, b"](", repeat * 60, b"e")))
    assert "more bytes of content" in reason


@pytest.mark.parametrize("protocol", [4, 5])
def test_a_large_array_is_held_once(tmp_path: Path, protocol: int) -> None:
    path = write(tmp_path, pickle.dumps({"a": np.ones(4 << 20, np.float32)}, protocol))
    tracemalloc.start()
    found = load_pickle(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["a"].nbytes == 16 << 20
    assert peak < 1.2 * found["a"].nbytes


# Fuzzing: whatever the bytes, a result or one of our two errors

SAMPLE = {
    "eva": np.arange(6, dtype=np.float16).reshape(2, 3),
    "clip": torch.arange(6.0).reshape(2, 3),
    "captions": np.array(["a", "b"], dtype=object),
    "keys": np.array(["k0", "k1"]),
    "config": OrderedDict(x=np.float32(1), y=(1, None, {2})),
}
SEEDS = [
    *(pickle.dumps(SAMPLE, protocol) for protocol in PROTOCOLS),
    torch_zip(SAMPLE),
    torch_stream(SAMPLE),
]
EDIT = st.tuples(
    st.sampled_from(["set", "cut", "insert", "copy"]),
    st.integers(0, 1 << 20),
    st.integers(0, 1 << 20),
    st.binary(min_size=1, max_size=4),
)


def load_or_refuse(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    refusal = None
    try:
        load_pickle(path)
    except ValueError as error:
        refusal = error
    if refusal is not None:
        assert type(refusal) in (ValueError, UnsafePickleError)
        assert str(refusal).startswith(f"{path}: ")
        assert "\n" not in str(refusal)


def edited(data: bytes, edits: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, a, b, content in edits:
        at, other = a % (len(data) + 1), b % (len(data) + 1)
        if kind == "set":
            data = data[:at] + content + data[at + len(content) :]
        elif kind == "cut":
            data = data[:at] + data[at + other % 16 :]
        elif kind == "insert":
            data = data[:at] + content + data[at:]
        else:
            data = data[:at] + data[other : other + 20] + data[at:]
    return data


@settings(max_examples=500, derandomize=True, deadline=None, database=None)
@given(seed=st.sampled_from(SEEDS), edits=st.lists(EDIT, min_size=1, max_size=4))
def test_a_mutated_file_loads_or_is_refused(tmp_path_factory, seed: bytes, edits: list) -> None:
    load_or_refuse(tmp_path_factory.getbasetemp() / "mutated", edited(seed, edits))


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(data=st.binary(max_size=64))
def test_noise_loads_or_is_refused(tmp_path_factory, data: bytes) -> None:
    load_or_refuse(tmp_path_factory.getbasetemp() / "noise", b"\x80\x04" + data)


def test_no_tests_name_holds_bytes_of_its_parameters(request: pytest.FixtureRequest) -> None:
    """Some of them hold addresses: processes that share out the tests would not agree on their names."""
    named = [
        (item.name, value)
        for item in request.session.items
        for value in getattr(getattr(item, "callspec", None), "params", {}).values()
        if isinstance(value, bytes) and len(value) > 4
    ]
    # A word may be in any name; what is no text comes from nowhere else.
    assert not [name for name, value in named if ascii(value)[2:-1] in name and "\\" in ascii(value)]
