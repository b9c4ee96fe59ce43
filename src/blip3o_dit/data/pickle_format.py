"""The documented pickle of BLIP3-o embeddings: reading it, writing it, and converting it to a store.

One dict: `eva_blip3o_embeddings` [n, L, C_eva] and `clip_blip3o_embeddings` [n, N, C_clip], NumPy arrays or
torch tensors, and perhaps `captions` and `keys` (n texts each) and `config`.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.checks import Indices, Record, check_indices, check_pair
from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.data.manifest import check_shard_count
from blip3o_dit.data.safe_unpickler import load_pickle
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.utils.atomic import dump_atomically
from blip3o_dit.utils.checksums import sha256
from blip3o_dit.utils.json_files import short_repr, show_names

EVA_KEY = "eva_blip3o_embeddings"
CLIP_KEY = "clip_blip3o_embeddings"

# Values of a pickle's config that a store takes over, at most.
MAX_CONFIG_VALUES = 10_000


class PickledEmbeddings:
    """The documented pickle, read safely and held in memory as it is (`convert_pickle` makes a store).

    Raises:
        FileNotFoundError, ValueError: naming file, key, expectation and finding; `UnsafePickleError`
            (a ValueError) when the file asks for anything but arrays, tensors and plain containers.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        content = load_pickle(self.path)
        if not isinstance(content, dict):
            raise ValueError(f"{path}: expected a dict, found a {type(content).__name__}")
        self._eva = _read_tokens(self.path, content, EVA_KEY)
        self._clip = _read_tokens(self.path, content, CLIP_KEY)
        self._records = _read_records(self.path, content, len(self._eva))
        check_pair(self.path, self._eva, self._clip, self._records)
        if not len(self._eva):
            raise ValueError(f"{path}: expected at least one sample, found none")
        self.num_samples, self.num_tokens, self.condition_dim = self._eva.shape
        self.target_dim = self._clip.shape[2]
        self.shard_starts = np.array([0, self.num_samples], dtype=np.int64)
        self.config = content.get("config")
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return self.num_samples

    def fingerprint(self) -> str:
        """What tells these embeddings from others: a hash of the file."""
        if self._fingerprint is None:
            self._fingerprint = sha256(self.path)
        return self._fingerprint

    def fetch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """See `Embeddings.fetch`."""
        eva, clip = self.fetch_stored(indices)
        return eva.float(), clip.float()

    def fetch_stored(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """The same in the dtypes of the pickle."""
        check_indices(self.path, indices, self.num_samples)
        rows = torch.as_tensor(np.asarray(indices, dtype=np.int64))
        return self._eva[rows], self._clip[rows]

    def records(self, indices: Indices | None = None) -> list[Record]:
        """See `Embeddings.records`."""
        if indices is None:
            return list(self._records)
        return [self._records[int(index)] for index in indices]


def convert_pickle(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str = "float16",
    shard_size: int | None = None,
    overwrite: bool = False,
) -> EmbeddingStore:
    """Write the documented pickle `source` as an embedding store at `target`."""
    pickled = PickledEmbeddings(source)
    if shard_size is not None and shard_size >= 1:
        check_shard_count(Path(target), pickled.num_samples, shard_size)
    writer = StoreWriter(
        target,
        num_tokens=pickled.num_tokens,
        condition_dim=pickled.condition_dim,
        target_dim=pickled.target_dim,
        dtype=dtype,
        shard_size=shard_size,
        encoders={"converted_from": Path(source).name, "config": _config_for_json(pickled)},
        overwrite=overwrite,
    )
    with writer:
        for rows in batches(range(pickled.num_samples), 256):
            writer.append(*pickled.fetch(rows), pickled.records(rows))
    return EmbeddingStore(target)


def write_pickle(source: Embeddings, path: str | Path) -> None:
    """Write embeddings as the documented pickle of NumPy arrays, which holds all of them in memory."""
    path = Path(path)
    shapes = [(source.num_tokens, source.condition_dim), (source.num_tokens, source.target_dim)]
    half = getattr(source, "manifest", {}).get("dtype") == "float16"
    dtype = np.float16 if half else np.float32
    eva, clip = (np.empty((source.num_samples, *shape), dtype=dtype) for shape in shapes)
    for rows in batches(range(source.num_samples), 256):
        batch = source.fetch(rows)
        eva[rows.start : rows.stop], clip[rows.start : rows.stop] = (tokens.numpy() for tokens in batch)
    records = source.records()
    content = {
        EVA_KEY: eva,
        CLIP_KEY: clip,
        "captions": [record.get("caption", "") for record in records],
        "keys": [record["key"] for record in records],
        "config": getattr(source, "manifest", {}).get("extraction", {}),
        "total_samples": source.num_samples,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    dump_atomically(path, content)


def _read_tokens(path: Path, content: dict[Any, Any], key: str) -> Tensor:
    if key not in content:
        raise ValueError(f"{path}: expected the key {key!r}, found {show_names(content)}")
    value = content[key]
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        value = _as_tensor(value.astype(value.dtype.newbyteorder("="), copy=False))
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = getattr(value, "dtype", type(value).__name__)
        raise ValueError(f"{path}: {key}: expected an array of floats, found {kind}")
    if value.dtype == torch.float64:
        value = value.float()  # what does not fit becomes infinite, and is refused as such
    if value.ndim != 3:
        raise ValueError(
            f"{path}: {key}: expected rank 3 [samples, tokens, width], found shape {list(value.shape)}"
        )
    return value


def _as_tensor(array: np.ndarray) -> Tensor:
    """The array as a tensor on the same memory, even where that is read-only: nothing here writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _read_records(path: Path, content: dict[Any, Any], count: int) -> list[Record]:
    """Keys (made up from the position when absent) and captions (left out when absent)."""
    keys = _column(path, content, "keys", count)
    captions = _column(path, content, "captions", count)
    records: list[Record] = []
    for row in range(count):
        record: Record = {"key": f"{row:08d}" if keys is None else _text(path, "keys", row, keys[row])}
        if captions is not None and captions[row] is not None:
            record["caption"] = _text(path, "captions", row, captions[row])
        records.append(record)
    return records


def _text(path: Path, name: str, row: int, value: Any) -> str:
    """Text, or a number as text; of anything else `str` could be without end."""
    number = isinstance(value, float | np.integer | np.floating)
    if isinstance(value, str) or number or (isinstance(value, int) and abs(value) < 2**63):
        return str(value)
    raise ValueError(f"{path}: {name}: sample {row}: expected text, found {short_repr(value)}")


def _column(path: Path, content: dict[Any, Any], name: str, count: int) -> list[Any] | None:
    values = content.get(name)
    if values is None:
        return None
    values = values.tolist() if isinstance(values, np.ndarray) else values
    if not isinstance(values, list | tuple):
        raise ValueError(f"{path}: {name}: expected a list, found a {type(values).__name__}")
    if not len(values):
        return None
    if len(values) != count:
        raise ValueError(f"{path}: expected as many {name} as samples ({count}), found {len(values)}")
    return list(values)


def _config_for_json(pickled: PickledEmbeddings) -> Any:
    """What JSON can hold of the config, the rest as short text; at most `MAX_CONFIG_VALUES` values.

    Containers that hold one another many times over would have no end as text.
    """
    left = MAX_CONFIG_VALUES

    def as_json(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > 50:
            raise ValueError(f"{pickled.path}: config: expected at most {MAX_CONFIG_VALUES} values, 50 deep")
        if isinstance(value, dict):
            return {
                k if isinstance(k, str) else short_repr(k): as_json(v, depth + 1) for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return [as_json(v, depth + 1) for v in value]
        if isinstance(value, np.generic | torch.dtype):
            return str(value)[:200]
        small = isinstance(value, int) and abs(value) < 2**63
        finite = isinstance(value, float) and math.isfinite(value)
        return value if value is None or small or finite or isinstance(value, str) else short_repr(value)

    return as_json(pickled.config, 0)
