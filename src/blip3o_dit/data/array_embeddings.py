"""Embeddings in files of arrays, whatever the format: names, layouts, records, what is done to tokens.

Each format has a reader that gives `RawEmbeddings`: how to read rows of both sides, their shapes, and the
records. `ArrayEmbeddings` makes of them what training reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256 as sha256_of
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.checks import (
    Indices,
    Record,
    check_counts,
    check_indices,
    check_rank,
    check_record,
    check_token_counts,
    is_square,
    non_finite_samples,
)
from blip3o_dit.data.pooling import pool_tokens
from blip3o_dit.utils.checksums import sha256
from blip3o_dit.utils.json_files import parse_json, short_repr, show_names

# The names that arrays and columns are found under; the first is the documented one.
EVA_NAMES = ("eva_blip3o_embeddings", "eva_embeddings", "eva_tokens", "eva_features", "eva")
# What `generate` calls the tokens that a model made, which are then the targets, and a sample's mean of them.
GENERATED, POOLED_VECTORS = "generated_clip_embeddings", "pooled_clip_embeddings"
CLIP_NAMES = (
    *("clip_blip3o_embeddings", "clip_embeddings", "clip_tokens", "clip_features", "clip"),
    GENERATED,
)
KEY_NAMES = ("keys", "key", "ids", "id")
CAPTION_NAMES = ("captions", "caption", "texts", "text")
LABEL_NAMES = ("labels", "label")
# What `export-embeddings` adds: which captions are known, and whole records as lines of JSON.
HAS_CAPTION, RECORDS = "has_caption", "records"
CONFIG = "config"

CHECKED_AT_ONCE = 256

# Rows of more numbers than any embedding has are tokens one after the other, until something else is said.
MOST_IN_A_VECTOR = 16_384


@dataclass(frozen=True)
class Arrangement:
    """What is done to tokens as they are read: [n, N, C] -> [n, N', C]. A row of [n, C] is one token.

    Args:
        drop_class_token: leave out the first of N tokens where N - 1 is a square and N is not.
        pool: means over windows of the grid, to so many tokens, on a side that has more.
        flat_tokens: how many tokens are in each row of [n, M], which does not say so; None: one, of at most
            `MOST_IN_A_VECTOR` numbers.
    """

    drop_class_token: bool = False
    pool: int | None = None
    flat_tokens: int | None = None

    def __call__(self, tokens: Tensor) -> Tensor:
        if tokens.ndim == 2:
            tokens = tokens.unflatten(1, (self.flat_tokens or 1, -1))
        count = tokens.shape[1]
        if self.drop_class_token and not is_square(count) and is_square(count - 1):
            tokens = tokens[:, 1:]
        if self.pool is not None and tokens.shape[1] != self.pool:
            tokens = pool_tokens(tokens.float(), self.pool).to(tokens.dtype)
        return tokens

    def shape(self, where: Path, name: str, shape: Sequence[int]) -> tuple[int, int, int]:
        """The shape that tokens of this shape get. Raises ValueError for other ranks and uneven pooling."""
        if len(shape) == 2:
            self._check_flat(where, name, shape[1])
        else:
            check_rank(where, name, shape)
        if self.pool is not None and not is_square(self.pool):
            raise ValueError(f"{where}: --pool: expected a square number of tokens, found {self.pool}")
        try:
            _, tokens, width = self(torch.empty(1, *shape[1:], device="meta")).shape
        except ValueError as error:
            raise ValueError(f"{where}: {name}: {error}") from error
        return shape[0], tokens, width

    def _check_flat(self, where: Path, name: str, numbers: int) -> None:
        count = self.flat_tokens
        if count is None and numbers > MOST_IN_A_VECTOR:
            raise ValueError(
                f"{where}: {name}: expected at most {MOST_IN_A_VECTOR} numbers in a vector, found flat rows "
                f"of {numbers}: `blip3o-dit convert --tokens N` says how many tokens they are"
            )
        if not numbers or numbers % (count or 1):
            wanted = f"a multiple of {count} numbers (--tokens)" if count else "at least one number a sample"
            raise ValueError(f"{where}: {name}: expected {wanted}, found {numbers}")


AS_IT_IS = Arrangement()


@dataclass
class RawEmbeddings:
    """What a file holds, before anything is done to it.

    Args:
        path: for messages. files: those it was read from.
        read: rows, ascending or not -> eva [n, L, C_eva] and clip [n, N, C], L and N may differ; vectors
            [n, C] are not yet one token each.
        eva_shape, clip_shape: of all samples, as `read` gives them.
        shard_starts: see `Embeddings`; one shard by default.
        in_memory: whether all of it can be checked at once, without reading a file again.
        generated_by: what the file says of the model that generated the targets; None if none did.
    """

    path: Path
    files: Sequence[Path]
    read: Callable[[np.ndarray], tuple[Tensor, Tensor]]
    eva_shape: Sequence[int]
    clip_shape: Sequence[int]
    records: list[Record]
    has_keys: bool = True
    shard_starts: Sequence[int] = field(default_factory=list)
    in_memory: bool = False
    generated_by: Mapping[str, Any] | None = None


class ArrayEmbeddings:
    """The samples of files of arrays.

    What is in memory is checked here; what is mapped or read piece by piece is checked as it is fetched.

    Raises:
        ValueError: naming the file, what was expected and what was found.
    """

    def __init__(self, raw: RawEmbeddings, arrangement: Arrangement = AS_IT_IS) -> None:
        self.path = raw.path
        self._raw, self._arrange = raw, arrangement
        eva, clip = (
            arrangement.shape(self.path, name, shape)
            for name, shape in (("eva", raw.eva_shape), ("clip", raw.clip_shape))
        )
        check_counts(self.path, eva[0], clip[0], len(raw.records))
        check_token_counts(self.path, eva, clip)
        self.num_samples, self.num_tokens, self.condition_dim = eva
        self.target_dim = clip[2]
        self.has_keys, self.generated_by = raw.has_keys, raw.generated_by
        self.shard_starts = np.array(raw.shard_starts or [0, self.num_samples], dtype=np.int64)
        self._fingerprint: str | None = None
        if not self.num_samples:
            raise ValueError(f"{self.path}: expected at least one sample, found none")
        if raw.in_memory:
            self._check_all()
        for row, record in enumerate(raw.records):
            check_record(self.path, row, record)

    def __len__(self) -> int:
        return self.num_samples

    def fingerprint(self) -> str:
        """What tells these embeddings from others: a hash of the files, and of what is done to them."""
        if self._fingerprint is None:
            sums = [sha256(file) for file in self._raw.files]
            many = len(sums) > 1 or self._arrange != AS_IT_IS
            text = json.dumps([sums, repr(self._arrange)]).encode()
            self._fingerprint = sha256_of(text).hexdigest() if many else sums[0]
        return self._fingerprint

    def fetch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """See `Embeddings.fetch`."""
        eva, clip = self.fetch_stored(indices)
        return eva.float(), clip.float()

    def fetch_stored(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """The same in the dtypes of the file; float64 as float32."""
        check_indices(self.path, indices, self.num_samples)
        wanted = np.asarray(indices, dtype=np.int64)
        rows = wanted if len(wanted) else np.zeros(1, dtype=np.int64)  # none have a shape as well
        eva, clip = (self._arrange(_narrow(tokens))[: len(wanted)] for tokens in self._raw.read(rows))
        if not self._raw.in_memory and len(wanted):
            self._check(eva, clip, wanted)
        return eva, clip

    def records(self, indices: Indices | None = None) -> list[Record]:
        """See `Embeddings.records`."""
        if indices is None:
            return list(self._raw.records)
        check_indices(self.path, indices, self.num_samples)
        return [self._raw.records[int(index)] for index in indices]

    def _check_all(self) -> None:
        for start in range(0, self.num_samples, CHECKED_AT_ONCE):
            rows = np.arange(start, min(start + CHECKED_AT_ONCE, self.num_samples))
            self._check(*self.fetch_stored(rows), rows)

    def _check(self, eva: Tensor, clip: Tensor, rows: np.ndarray) -> None:
        """Refuse (ValueError) NaN and infinity, naming the sample."""
        for name, tokens in (("eva", eva), ("clip", clip)):
            bad = non_finite_samples(tokens)
            if len(bad):
                row = int(rows[int(bad[0])])
                key = short_repr(self._raw.records[row].get("key"))
                raise ValueError(
                    f"{self.path}: {name}: NaN or infinity in {len(bad)} samples, "
                    f"first in sample {row} (key {key})"
                )


def _narrow(tokens: Tensor) -> Tensor:
    return tokens.float() if tokens.dtype == torch.float64 else tokens


def raw_from_content(
    path: Path, files: Sequence[Path], content: Mapping[str, Any], *, in_memory: bool
) -> RawEmbeddings:
    """Of arrays and lists by their names; `in_memory` unless the arrays are mapped.

    Raises:
        ValueError: naming what is missing or no array of floats.
    """
    if POOLED_VECTORS in content:
        raise ValueError(f"{path}: expected tokens, found one vector a picture (`generate --pooled`)")
    generated_by = None
    if GENERATED in content:
        content = {name: _from_json_text(path, name, value) for name, value in content.items()}
        config = content.get(CONFIG)
        generated_by = config if isinstance(config, dict) else {}
    sides = [as_tokens(path, content, names) for names in (EVA_NAMES, CLIP_NAMES)]
    records, has_keys = read_records(path, content, len(sides[0]))
    return RawEmbeddings(
        path,
        files,
        Rows(*sides),
        sides[0].shape,
        sides[1].shape,
        records,
        has_keys=has_keys,
        in_memory=in_memory,
        generated_by=generated_by,
    )


def _from_json_text(path: Path, name: str, value: Any) -> Any:
    """What `generate` writes into .npz as bytes of JSON: all that is no array of tokens."""
    written = isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 1
    return parse_json(f"{path}: {name}", value.tobytes()) if written else value


@dataclass
class Rows:
    """Reads rows of two arrays, which may be mapped."""

    eva: Tensor | np.ndarray
    clip: Tensor | np.ndarray

    def __call__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        return self._of(self.eva, rows), self._of(self.clip, rows)

    @staticmethod
    def _of(tokens: Tensor | np.ndarray, rows: np.ndarray) -> Tensor:
        if isinstance(tokens, Tensor):
            return tokens[torch.from_numpy(rows)]
        found = tokens[rows]
        return torch.from_numpy(found.astype(found.dtype.newbyteorder("="), copy=False))


def find_name(path: Path, content: Mapping[Any, Any], names: Sequence[str]) -> str:
    """The one of these names that is there. Raises ValueError for none of them, or several."""
    found = [name for name in names if name in content]
    if not found:
        raise ValueError(f"{path}: expected the key {names[0]!r}, found {show_names(content)}")
    if len(found) > 1:
        raise ValueError(f"{path}: expected one of {list(names)}, found {show_names(found)}")
    return found[0]


def as_tokens(path: Path, content: Mapping[Any, Any], names: Sequence[str]) -> Tensor | np.ndarray:
    """An array or tensor of floats [n, N, C] or [n, C]; a list of arrays of one shape is stacked.

    Raises:
        ValueError: naming key, expectation and finding.
    """
    key = find_name(path, content, names)
    value = content[key]
    if isinstance(value, list | tuple) and value and all(isinstance(v, np.ndarray | Tensor) for v in value):
        value = _stacked(path, key, value)
    floats = isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.dtype.itemsize <= 8
    if not floats and not (isinstance(value, Tensor) and value.is_floating_point()):
        kind = getattr(value, "dtype", type(value).__name__)
        raise ValueError(f"{path}: {key}: expected an array of floats, found {kind}")
    if value.ndim not in (2, 3):
        check_rank(path, key, value.shape)
    return value


def _stacked(path: Path, key: str, values: Sequence[Any]) -> Any:
    kinds = {(type(value), value.dtype, tuple(value.shape)) for value in values}
    if len(kinds) > 1:
        shapes = sorted({str(list(value.shape)) for value in values})[:3]
        raise ValueError(f"{path}: {key}: expected arrays of one kind and shape, found shapes {shapes}")
    return np.stack(values) if isinstance(values[0], np.ndarray) else torch.stack(list(values))


def read_records(path: Path, content: Mapping[Any, Any], count: int) -> tuple[list[Record], bool]:
    """Keys (made up from the position when absent), captions and labels (left out when absent).

    Returns: the records, and whether there were keys.
    """
    whole = content.get(RECORDS)
    if whole is not None:
        return _whole_records(path, whole, count), True
    keys, captions, labels = (
        _column(path, content, names, count) for names in (KEY_NAMES, CAPTION_NAMES, LABEL_NAMES)
    )
    known = _column(path, content, (HAS_CAPTION,), count)
    records: list[Record] = []
    for row in range(count):
        record: Record = {"key": f"{row:08d}" if keys is None else _text(path, "keys", row, keys[row])}
        if captions is not None and captions[row] is not None and (known is None or known[row]):
            record["caption"] = _text(path, "captions", row, captions[row])
        if labels is not None and labels[row] is not None:
            record["label"] = _label(path, row, labels[row])
        records.append(record)
    return records, keys is not None


def _whole_records(path: Path, content: Any, count: int) -> list[Record]:
    """Lines of JSON as bytes in an array, as the exporter writes them."""
    content = content.numpy() if isinstance(content, Tensor) else content
    if not isinstance(content, np.ndarray) or content.dtype != np.uint8:
        raise ValueError(f"{path}: {RECORDS}: expected lines of JSON as uint8, found {short_repr(content)}")
    lines = content.tobytes().removesuffix(b"\n").split(b"\n")
    if len(lines) != count:
        raise ValueError(f"{path}: expected as many records as samples ({count}), found {len(lines)}")
    return [parse_json(f"{path}: record {row}", line) for row, line in enumerate(lines)]


def _column(path: Path, content: Mapping[Any, Any], names: Sequence[str], count: int) -> list[Any] | None:
    name = next((name for name in names if content.get(name) is not None), None)
    if name is None:
        return None
    values = content[name]
    values = values.tolist() if isinstance(values, np.ndarray | Tensor) else values
    if not isinstance(values, list | tuple):
        raise ValueError(f"{path}: {name}: expected a list, found a {type(values).__name__}")
    if not len(values):
        return None
    if len(values) != count:
        raise ValueError(f"{path}: expected as many {name} as samples ({count}), found {len(values)}")
    return list(values)


def _text(path: Path, name: str, row: int, value: Any) -> str:
    """Text, or a number as text; of anything else `str` could be without end."""
    number = isinstance(value, float | np.integer | np.floating)
    if isinstance(value, str) or number or (isinstance(value, int) and abs(value) < 2**63):
        return str(value)
    raise ValueError(f"{path}: {name}: sample {row}: expected text, found {short_repr(value)}")


def _label(path: Path, row: int, value: Any) -> Any:
    """A number or text that JSON can hold."""
    value = value.item() if isinstance(value, np.generic) else value
    small = isinstance(value, int) and abs(value) < 2**63
    if small or isinstance(value, str) or (isinstance(value, float) and np.isfinite(value)):
        return value
    raise ValueError(f"{path}: labels: sample {row}: expected a number or text, found {short_repr(value)}")
