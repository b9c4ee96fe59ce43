"""Pickles whose objects, or the hashing of their keys, would take far more than the file are refused."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import pytest

from blip3o_dit.data import pickle_budget
from blip3o_dit.data.safe_unpickler import load_pickle
from tests.data.test_safe_unpickler import PROTOCOLS, call, name, program, reason_of, write


def shared_tuples(levels: int) -> bytes:
    """A tuple that holds the next one twice, so many times over: 6 bytes a level, 2^levels steps to hash."""
    gets = [b"h" + bytes([level]) for level in range(levels)]
    return b")\x94" + b"".join(get + get + b"\x86\x94" for get in gets)


# Multiples of the modulus of Python's hash of numbers: all of them hash to 0.
COLLIDING = [pickle.dumps((2**61 - 1) * 2**64 * k, 2)[2:-1] for k in range(1, 30_000)]


@pytest.mark.parametrize(
    "opcodes",
    [
        b"}" + shared_tuples(60)[:-1] + b"Ns",
        b"}(" + shared_tuples(60)[:-1] + b"Nu",
        b"(" + shared_tuples(60)[:-1] + b"Nd",
        b"\x8f(" + shared_tuples(60)[:-1] + b"\x90",
        b"(" + shared_tuples(60)[:-1] + b"\x91",
        b"}" + b")" + b"2\x86" * 60 + b"Ns",
        b"}" + b")" + b"\x85" * 100_000 + b"Ns",
        call(name("builtins", "set"), b"](" + shared_tuples(60) + b"e"),
        b"}("
        + b"".join(pickle.dumps((2**61 - 1) * 2**64 * k, 2)[2:-1] + b"N" for k in range(1, 30_000))
        + b"u",
        call(name("builtins", "frozenset"), b"](" + b"".join(COLLIDING) + b"e"),
    ],
    ids=range(10),
)
def test_keys_that_take_forever_to_hash_are_refused(tmp_path: Path, opcodes: bytes) -> None:
    started = time.monotonic()
    assert "steps to hash" in reason_of(write(tmp_path, program(opcodes)))
    assert time.monotonic() - started < 5


def test_tuples_and_numbers_are_keys_as_before(tmp_path: Path) -> None:
    content = {
        "grid": {(row, column): row * column for row in range(64) for column in range(64)},
        "index": {number: number + 1 for number in range(50_000)},
        "long": {2**70 + number for number in range(1000)},
        "shared": [(shape := (8, 8)), shape, {shape: shape}, frozenset({shape})],
        "text": {f"k{number}": (number, number) for number in range(20_000)},
    }
    for protocol in PROTOCOLS:
        assert load_pickle(write(tmp_path, pickle.dumps(content, protocol))) == content


@pytest.mark.parametrize(
    ("opcodes", "count"),
    [(b"]", 16_000), (b"}", 16_000), (b"\x8f", 5000), (b"h\0)R", 12_000)],
)
def test_many_small_objects_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opcodes: bytes, count: int
) -> None:
    monkeypatch.setattr(pickle_budget, "MEMORY_FREE", 1 << 20)  # 64 MiB would leave its mark on later tests
    head = name("collections", "OrderedDict") + b"\x94("
    path = write(tmp_path, program(head, opcodes * count, b"l"))
    assert "in proportion to the file" in reason_of(path)
    assert len(load_pickle(write(tmp_path, program(head, opcodes * (count // 2), b"l")))) > 1
