"""Seeded damage: to bytes, to JSON, and to the files of a folder. The same seed gives the same damage."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

# Bytes

_INTERESTING = (0, 1, 2, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**63 - 1)


def mutate_bytes(data: bytes, rng: Random, *, others: tuple[bytes, ...] = ()) -> bytes:
    """One to four edits; `others` are files of the same kind that pieces are taken from."""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        edit = rng.choice(_BYTE_EDITS)
        data = edit(data, rng, others or (data,))
    return data


def _flip_bit(data: bytes, rng: Random, _: tuple[bytes, ...]) -> bytes:
    return _replaced(data, rng, lambda old: bytes([old[0] ^ 1 << rng.randrange(8)]), 1)


def _set_byte(data: bytes, rng: Random, _: tuple[bytes, ...]) -> bytes:
    return _replaced(data, rng, lambda old: rng.randbytes(1), 1)


def _set_number(data: bytes, rng: Random, _: tuple[bytes, ...]) -> bytes:
    """A length field, if it happens to hit one: 1, 2, 4 or 8 bytes in either order."""
    width = rng.choice((1, 2, 4, 8))
    number = rng.choice(_INTERESTING) % 256**width
    order = rng.choice(("little", "big"))
    return _replaced(data, rng, lambda old: number.to_bytes(width, order), width)  # type: ignore[arg-type]


def _truncate(data: bytes, rng: Random, _: tuple[bytes, ...]) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _cut(data: bytes, rng: Random, _: tuple[bytes, ...]) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.randrange(1, 64) :]


def _insert(data: bytes, rng: Random, _: tuple[bytes, ...]) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.randrange(1, 16)) + data[at:]


def _splice(data: bytes, rng: Random, others: tuple[bytes, ...]) -> bytes:
    """The beginning of this one, the end of another."""
    other = rng.choice(others)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _repeat(data: bytes, rng: Random, _: tuple[bytes, ...]) -> bytes:
    at = rng.randrange(len(data) + 1)
    piece = data[at : at + rng.randrange(1, 32)]
    return data[:at] + piece * rng.choice((2, 3, 50, 2000)) + data[at:]


def _replaced(data: bytes, rng: Random, new: Callable[[bytes], bytes], width: int) -> bytes:
    if len(data) < width:
        return data
    at = rng.randrange(len(data) - width + 1)
    return data[:at] + new(data[at : at + width]) + data[at + width :]


_BYTE_EDITS = (_flip_bit, _set_byte, _set_number, _set_number, _truncate, _cut, _insert, _splice, _repeat)


# JSON


class Raw(str):
    """JSON text that `json.dumps` would not write; see `dump_json`."""


HOSTILE_NAMES = (
    *("../x", "../../../../etc/passwd", "/etc/passwd", "a/b", "..", ".", "", "a\0b", "a\nb", "C:\\x", "~"),
    *("\ud800", "x" * 300, "‮gnp.exe", "manifest.json", "-rf", "http://127.0.0.1:9/x", "nul"),
)
HOSTILE_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**48, 2**62, 2**63, 2**64, 10**30, -(10**30)),
    *(0.5, -0.0, 1.0, 1e-300, 1e308, "0", "1", "nan", "true", "x", [], {}, [1], {"a": 1}, [[]], [None]),
    *("x" * 10_000, list(range(500)), {"model_type": "x"}, "torch.float64", "float16", "int32", "auto"),
    *(Raw(x) for x in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "1" * 400, "-0")),
    *(Raw(x) for x in ("[" * 50_000, "[" * 900 + "]" * 900, '{"a":' * 20_000, '{"a":1,"a":[]}', '"\\ud800"')),
    *HOSTILE_NAMES,
)


def mutate_json(value: Any, rng: Random, *, values: tuple[Any, ...] = ()) -> bytes:
    """One to three edits of the tree as text: values, keys, order, duplicates, nesting.

    `values` are further values to put in, such as names that mean something to the reader.
    """
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places or rng.random() < 0.02:
            value = rng.choice(HOSTILE_VALUES)
            continue
        holder, at = rng.choice(places)
        rng.choice(_JSON_EDITS)(holder, at, rng, values, value)
    return dump_json(value)


def dump_json(value: Any) -> bytes:
    """JSON with the text of every `Raw` in it; unpaired surrogates stay escaped."""
    raws: list[str] = []

    def marked(node: Any) -> Any:
        if isinstance(node, Raw):
            raws.append(str(node))
            return f"@raw{len(raws) - 1}@"
        if isinstance(node, dict):
            return {key: marked(inner) for key, inner in node.items()}
        return [marked(inner) for inner in node] if isinstance(node, list) else node

    text = json.dumps(marked(value))
    for number, raw in enumerate(raws):
        text = text.replace(f'"@raw{number}@"', raw)
    return text.encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of every node below the root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for at, inner in items:
        yield value, at
        yield from _places(inner)


def _set_value(holder: Any, at: Any, rng: Random, values: tuple[Any, ...], root: Any) -> None:
    holder[at] = copy.deepcopy(rng.choice(values or HOSTILE_VALUES if rng.random() < 0.3 else HOSTILE_VALUES))


def _tweak_number(holder: Any, at: Any, rng: Random, values: tuple[Any, ...], root: Any) -> None:
    if isinstance(holder[at], int | float):
        holder[at] = rng.choice(
            (holder[at] + 1, -holder[at], holder[at] * 2, float(holder[at]), str(holder[at]))
        )
    else:
        _set_value(holder, at, rng, values, root)


def _delete(holder: Any, at: Any, rng: Random, values: tuple[Any, ...], root: Any) -> None:
    del holder[at]


def _rename(holder: Any, at: Any, rng: Random, values: tuple[Any, ...], root: Any) -> None:
    if isinstance(holder, dict):
        names = (*HOSTILE_NAMES, *holder, "auto_map", "quantization_config", "__class__", "extra")
        holder[rng.choice(names)] = holder[at]
    else:
        holder.append(copy.deepcopy(holder[at]))


def _move(holder: Any, at: Any, rng: Random, values: tuple[Any, ...], root: Any) -> None:
    """A node of the same document in another's place."""
    other, where = rng.choice(list(_places(root)))
    holder[at] = copy.deepcopy(other[where])


def _wrap(holder: Any, at: Any, rng: Random, values: tuple[Any, ...], root: Any) -> None:
    inner = copy.deepcopy(holder[at])
    holder[at] = rng.choice(([inner], {"x": inner}, [inner, inner], str(inner), [inner] * 100))


_JSON_EDITS = (_set_value, _set_value, _set_value, _tweak_number, _delete, _rename, _move, _wrap)


# safetensors


def mutate_safetensors(data: bytes, rng: Random, *, others: tuple[bytes, ...] = ()) -> bytes:
    """Bytes anywhere, or the JSON header's values with a header length that fits them."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng, others=others)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    dtypes = ("F64", "F32", "F16", "BF16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "C64", "x")
    new = mutate_json(header, rng, values=(*dtypes, [0, 0], [1, 1, 1], [2**62, 2**62], [0], [-1, 4]))
    return struct.pack("<Q", len(new)) + new + data[8 + length :]


# Folders


def flip_bytes(folder: Path, count: int, seed: int) -> Iterator[tuple[Path, int]]:
    """Flip one bit of one byte at a time, at `count` seeded positions over all files of the folder.

    Yields (file, position) while the byte is flipped; the file is whole again before the next one, and at
    the end. Every file gets at least one position; the rest fall by size, as disk damage would.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    sizes = [file.stat().st_size for file in files]
    rng = Random(f"flip/{seed}")
    chosen = [*files, *rng.choices(files, sizes, k=max(0, count - len(files)))][:count]
    for file in sorted(chosen):
        at, bit = rng.randrange(file.stat().st_size), 1 << rng.randrange(8)
        _flip(file, at, bit)
        try:
            yield file, at
        finally:
            _flip(file, at, bit)


def _flip(file: Path, at: int, bit: int) -> None:
    with open(file, "r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ bit]))
