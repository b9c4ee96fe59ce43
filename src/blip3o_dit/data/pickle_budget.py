"""What reading a pickle may cost: its opcodes are added up before anything is built.

A few bytes of pickle can ask for gigabytes of memory, or for keys that take years to hash.
"""

from __future__ import annotations

import io
import pickletools
from typing import Any, BinaryIO

from blip3o_dit.data.pickle_values import ALLOWED, refuse

# A legitimate file spends each of its bytes at most twice (text -> bytes -> storage).
GROWTH = 4

# Bytes that all objects together may take: so many times the file's size, and this much in any case.
MEMORY_FACTOR, MEMORY_FREE = 10, 1 << 26

# Text is hashed with a random seed, and 64-bit numbers hardly collide. A tuple can hold one other tuple
# twice, that one the next, and so take 2^50 steps to hash in 200 bytes; and tuples and long numbers can be
# chosen to collide.
MAX_HASH_STEPS = 20_000

# Objects that hold others or are made by a call, and about how many bytes each takes.
_BYTES_HELD = {
    **dict.fromkeys(("EMPTY_LIST", "LIST", "EMPTY_DICT", "DICT", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"), 80),
    **dict.fromkeys(("EMPTY_SET", "FROZENSET"), 232),
    **dict.fromkeys(("REDUCE", "OBJ", "INST", "NEWOBJ", "NEWOBJ_EX"), 100),
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_TUPLE", "BININT1", "DUP"), 16),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), 16),
    **dict.fromkeys(("MARK", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), 8),
}
_BYTES_HELD_BY_OTHERS = 30  # a number or a short text, and its place in a list

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


def scan_opcodes(file: BinaryIO, size: int, *, with_storages: bool) -> int:
    """Where the pickle that begins here ends, from its opcodes alone: nothing is built.

    The C unpickler allocates what a length or a memo index asks for before it looks at the file, so
    both are bounded here: a length by the bytes that are left, an index by the opcodes so far. The
    ledger bounds what opcodes that are there would take.
    """
    ledger = Ledger(size)
    seen = 0
    while True:
        seen += 1
        code = file.read(1)
        op = _OPCODES.get(code)
        if op is None:
            found = f"{code!r} at byte {file.tell() - 1}" if code else "the end of the file"
            raise ValueError(f"expected a pickle opcode, found {found}")
        if op.name == "STOP":
            return file.tell()
        if op.name in _REFUSED_OPCODES or (op.name == "BINPERSID" and not with_storages):
            refuse(f"asks for an object outside the file (opcode {op.name}); {ALLOWED}")
        argument = _skip_argument(file, size, op)
        if op.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > seen:
            raise ValueError(f"expected a memo index below {seen}, found {argument}")
        if op.name == "FRAME":
            _check_length(file, size, argument)
        ledger.add(op.name, argument)


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


class Ledger:
    """Runs a pickle's opcodes on a stack and a memo that hold each object's hash cost in place of the object.

    The hash cost is how many steps hashing takes beyond those of a text or a 64-bit number.
    """

    def __init__(self, size: int) -> None:
        self._stack: list[int] = []
        self._marks: list[int] = []
        self._memo: dict[int, int] = {}  # costs above 0 only
        self._indices = bytearray()  # 1 for each index that the memo has
        self._memoized = 0
        self._memory_left = MEMORY_FACTOR * size + MEMORY_FREE
        self._hash_steps_left = MAX_HASH_STEPS

    def add(self, name: str, argument: int) -> None:
        """The next opcode. Raises ValueError when a sum is too high."""
        self._memory_left -= _BYTES_HELD.get(name, _BYTES_HELD_BY_OTHERS if _EFFECTS[name][2] else 0)
        if self._memory_left < 0:
            raise ValueError("expected objects in proportion to the file, found many more")
        if name in _ONLY_PUSH:  # most opcodes: one more text or number, or an empty container
            self._stack.append(0)
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            self._put(self._memoized if name == "MEMOIZE" else argument)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._memo.get(argument, 0))
        elif name == "MARK":
            self._marks.append(len(self._stack))
        elif name == "DUP":
            self._stack += self._stack[-1:]
        elif name == "POP" and self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._exchange(name, argument)

    def _exchange(self, name: str, argument: int) -> None:
        """Takes objects off the stack, and puts what the opcode makes of them there."""
        to_mark, taken, pushes = _EFFECTS[name]
        if to_mark:
            at = self._marks.pop() if self._marks else 0
            items = self._stack[at:]
            del self._stack[max(0, at - taken) :]
        else:
            items = self._stack[-taken:] if taken else []
            del self._stack[len(self._stack) - len(items) :]
        self._stack += [self._hash_cost(name, argument, items)] * pushes

    def _hash_cost(self, name: str, argument: int, items: list[int]) -> int:
        """Of the object that this opcode makes; spends the steps for the keys that it hashes."""
        if name.startswith("TUPLE"):
            return _tuple_cost(len(items), sum(items))
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

    def _hash(self, steps: int) -> None:
        self._hash_steps_left -= steps
        check_hash_steps(self._hash_steps_left)

    def _put(self, index: int) -> None:
        if index >= len(self._indices):
            self._indices += bytes(index + 1 - len(self._indices))
        self._memoized += not self._indices[index]
        self._indices[index] = 1
        cost = self._stack[-1] if self._stack else 0
        if cost:
            self._memo[index] = cost
        elif self._memo:
            self._memo.pop(index, None)


def _effect(op: pickletools.OpcodeInfo) -> tuple[bool, int, int]:
    """(whether it takes all down to the mark, how many it takes below or without that, how many it adds)."""
    before = op.stack_before
    if pickletools.markobject in before:
        return True, before.index(pickletools.markobject), len(op.stack_after)
    return False, len(before), len(op.stack_after)


_EFFECTS = {op.name: _effect(op) for op in pickletools.opcodes}
# Those that add one object of hash cost 0 and do nothing else.
_ONLY_PUSH = {
    name
    for name, effect in _EFFECTS.items()
    if effect == (False, 0, 1) and not name.startswith(("LONG", "INT", "MARK", "GET", "BINGET"))
}


def hash_steps(value: Any, done: dict[int, int]) -> int:
    """The ledger's hash cost for an object that is built already; `done` has those of the tuples so far."""
    if type(value) is int:
        return int(value.bit_length() > 64)
    if type(value) is frozenset:
        return 1
    if type(value) is not tuple:
        return 0
    if id(value) not in done:
        done[id(value)] = _tuple_cost(len(value), sum(hash_steps(item, done) for item in value))
    return done[id(value)]


def _tuple_cost(length: int, inner: int) -> int:
    return min(1 + length + inner, 2 * MAX_HASH_STEPS)


def check_hash_steps(left: int) -> None:
    if left < 0:
        raise ValueError(f"expected at most {MAX_HASH_STEPS} steps to hash tuples and long numbers")
