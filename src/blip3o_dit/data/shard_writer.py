"""Samples become shards: collected, checked, converted to the dtype of the store and written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_dit.data.checks import Record, check_pair
from blip3o_dit.data.int8_tokens import NAME as INT8
from blip3o_dit.data.int8_tokens import quantized
from blip3o_dit.data.kept_vectors import CHECKSUMS as KEPT_CHECKSUMS
from blip3o_dit.data.kept_vectors import dtype_of, kept_checksums
from blip3o_dit.data.manifest import DTYPES, check_shard_count, sample_bytes
from blip3o_dit.data.sample_checksums import NAME as CHECKSUMS
from blip3o_dit.data.sample_checksums import sample_checksums
from blip3o_dit.utils.atomic import save_tensors, write_atomically
from blip3o_dit.utils.checksums import sha256

# A token that would be stored with a larger error than this share of its largest value is refused.
MAX_ERROR = 0.01


class ShardWriter:
    """Collects samples and writes them as shards into a folder; whoever uses it writes the manifest.

    Args:
        where: the store's path, for messages. folder: where the shards go.
        sizes: tokens, condition width, target width.
        dtype: "float16", "bfloat16", "float32" or "int8" on disk. shard_size: None aims at 256 MiB.
        first_shard, first_sample: what the store has already.
    """

    def __init__(
        self,
        where: Path,
        folder: Path,
        sizes: tuple[int, int, int],
        *,
        dtype: str,
        shard_size: int | None = None,
        first_shard: int = 0,
        first_sample: int = 0,
    ) -> None:
        self.where, self.folder, self.sizes, self.dtype = where, folder, sizes, dtype
        self.shard_size = shard_size or max(1, 2**28 // sample_bytes(sizes, dtype))
        self.entries: list[dict[str, Any]] = []
        self._first_shard, self._written = first_shard, first_sample
        self._pending: list[dict[str, Tensor]] = []
        self._lines: list[str] = []

    def append(
        self,
        eva: Tensor,
        clip: Tensor,
        records: Sequence[Record],
        kept: Mapping[str, Tensor] | None = None,
    ) -> None:
        """See `StoreWriter.append`."""
        where, first = self.where, self._written + len(self._lines)
        check_pair(where, eva, clip, records, expected=self.sizes, offset=first)
        lines = [json_line(where, first + row, record) for row, record in enumerate(records)]
        # Copies: the caller may reuse its buffers.
        sides = {"eva": eva, "clip": clip, **(kept or {})}
        stored = {name: to_disk(where, tokens, name, self.dtype) for name, tokens in sides.items()}
        start = 0
        while start < len(lines):
            piece = slice(start, start + self.shard_size - len(self._lines))
            self._pending.append({name: tokens[piece] for name, tokens in stored.items()})
            self._lines.extend(lines[piece])
            if len(self._lines) == self.shard_size:
                self.flush()
            start = piece.stop

    def flush(self) -> None:
        """Everything pending becomes one shard."""
        if not self._lines:
            return
        number = self._first_shard + len(self.entries)
        check_shard_count(self.where, self._written + len(self._lines), self.shard_size)
        joined = {name: torch.cat([part[name] for part in self._pending]) for name in self._pending[0]}
        eva, clip = joined.pop("eva"), joined.pop("clip")
        self.entries.append(write_shard(self.folder, number, eva, clip, self._lines, joined))
        self._written += len(self._lines)
        self._pending, self._lines = [], []


def write_shard(
    folder: Path,
    number: int,
    eva: Tensor,
    clip: Tensor,
    lines: Sequence[str],
    kept: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write one shard and its table; returns its manifest entry. Tensors in the dtype of the store.

    Args:
        kept: vectors [n, C] beside the tokens (`kept_vectors.py`).

    Raises:
        WriteError, OSError: when they cannot be written; nothing under their names is half written.
    """
    file, table = folder / f"shard-{number:05d}.safetensors", folder / f"shard-{number:05d}.jsonl"
    tokens = {"eva": eva.contiguous(), "clip": clip.contiguous()}
    tensors = tokens | {CHECKSUMS: sample_checksums(**tokens)}
    if kept:
        vectors = {name: vector.contiguous() for name, vector in kept.items()}
        tensors |= vectors | {KEPT_CHECKSUMS: kept_checksums(vectors)}
    save_tensors(tensors, file)
    write_atomically(table, ("\n".join(lines) + "\n").encode())
    return {
        "file": file.name,
        "num_samples": len(lines),
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
        "table": table.name,
        "table_sha256": sha256(table),
    }


def to_disk(where: Path, tokens: Tensor, name: str, dtype: str) -> Tensor:
    """Tokens [n, N, C], or kept vectors [n, C], in the dtype of the store, on the CPU, as a copy.

    Raises:
        ValueError: when a value does not fit, or a token would lose more than `MAX_ERROR`.
    """
    tokens = tokens.detach().cpu()
    if dtype == INT8 and tokens.ndim == 3:
        return quantized(tokens)
    dtype = dtype_of(dtype) if tokens.ndim == 2 else dtype
    stored = tokens.to(DTYPES[dtype], copy=True)
    if not torch.isfinite(stored).all():
        raise ValueError(
            f"{where}: {name}: largest value {tokens.abs().max():.3g} does not fit {dtype}; "
            "choose another dtype"
        )
    if stored.dtype != tokens.dtype:
        _check_precision(where, tokens.float(), stored, name, dtype)
    return stored


def _check_precision(where: Path, tokens: Tensor, stored: Tensor, name: str, dtype: str) -> None:
    """Values far below the smallest ones of a dtype become zero or coarse: [n, N, C] or [n, C] each."""
    if tokens.ndim == 2:
        tokens, stored = tokens[:, None], stored[:, None]
    largest = tokens.abs().amax(dim=-1)  # [n, N]
    bad = (tokens - stored.float()).abs().amax(dim=-1) > MAX_ERROR * largest
    if bad.any():
        row = int(bad.any(dim=1).nonzero()[0])
        raise ValueError(
            f"{where}: {name}: {int(bad.sum())} tokens are too small for {dtype}, which would change them by "
            f"more than {MAX_ERROR:.0%}; the first one's largest value is {largest[row][bad[row]][0]:.3g}: "
            "choose bfloat16 or float32, or scale them"
        )


def json_line(where: Path, index: int, record: Record) -> str:
    """A record as a line of a shard's table. Raises ValueError, naming the sample, if JSON cannot hold it."""
    try:
        return json.dumps(record)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: sample {index}: expected a record that JSON can hold: {error}") from error
