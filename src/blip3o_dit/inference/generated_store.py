"""Generation piece by piece, in bounded memory: the work on a piece, and the store it is written to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip3o_dit.data.checks import Record, check_pair
from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.data.store import DTYPES, StoreWriter, json_line, to_disk, write_manifest, write_shard

DTYPE = "float32"
SHARD_BYTES = 2**28
"""Most bytes of a shard, give or take a batch; a process holds one shard at a time."""


class GeneratedStore:
    """Conditions and generated tokens, shard by shard; the manifest comes last and makes it a store.

    Args:
        path: folder to create, which all processes see.
        sizes: tokens, condition width, target width.
    """

    def __init__(self, path: Path, sizes: tuple[int, int, int]) -> None:
        self.path = path
        self.sizes = sizes

    def claim(self) -> None:
        """Make the folder, without what an interrupted generation left; on one process, before any writes.

        Raises:
            ValueError: there is a store already, or no folder.
        """
        num_tokens, condition_dim, target_dim = self.sizes
        StoreWriter(
            self.path, num_tokens=num_tokens, condition_dim=condition_dim, target_dim=target_dim, dtype=DTYPE
        )

    def shard_size(self, count: int, *, batch_size: int, processes: int) -> int:
        """Samples of a shard: whole batches, so few that each of the processes gets equally many shards.

        The batches are then those of one process, and with them the samples, bit for bit.
        """
        num_tokens, condition_dim, target_dim = self.sizes
        max_samples = max(
            1, SHARD_BYTES // (num_tokens * (condition_dim + target_dim) * DTYPES[DTYPE].itemsize)
        )
        rounds = math.ceil(count / (max_samples * processes))
        return batch_size * math.ceil(count / (rounds * processes * batch_size))

    def write(
        self, number: int, first: int, eva: Tensor, generated: Tensor, records: Sequence[Record]
    ) -> dict[str, Any]:
        """Write a shard, [n, L, C_eva] and [n, N, C]; returns its manifest entry.

        Args:
            first: samples in the shards before it.

        Raises:
            ValueError: for NaN or infinity and bad records, naming the sample.
        """
        check_pair(self.path, eva, generated, records, expected=self.sizes, offset=first)
        lines = [json_line(self.path, first + row, record) for row, record in enumerate(records)]
        stored_eva, stored_clip = (
            to_disk(self.path, tokens, name, DTYPE) for tokens, name in ((eva, "eva"), (generated, "clip"))
        )
        return write_shard(self.path, number, stored_eva, stored_clip, lines)

    def finish(self, entries: Sequence[Mapping[str, Any]], made_by: Mapping[str, Any]) -> None:
        """Write the manifest, from the entries of all shards in order and how the tokens were made."""
        about = {"encoders": {"clip": {"generated_by": made_by}}, "pooling": None, "normalization": "none"}
        write_manifest(self.path, self.sizes, DTYPE, entries, about)


class Piece(NamedTuple):
    """Of a piece: its shard's `entry`, what each batch adds to the metrics, and the `tokens` if kept."""

    entry: dict[str, Any] | None
    added: list[Tensor]
    tokens: Tensor | None


@dataclass(frozen=True)
class PieceWork:
    """One process's work on a piece of the samples: generate batch by batch, then write the shard or keep it.

    Args:
        indices: all samples in the source. batch_size: samples at a time.
        size: samples of a piece, a shard's if there is a store.
        generate: conditions and their indices -> tokens [n, N, C].
        measure: generated and true tokens -> what they add to the metrics, or None.
        keep: return the tokens.
        advance: called with the size of each batch that is done.
    """

    source: Embeddings
    indices: Sequence[int]
    batch_size: int
    size: int
    generate: Callable[[Tensor, Sequence[int]], Tensor]
    measure: Callable[[Tensor, Tensor], Tensor | None]
    store: GeneratedStore | None
    keep: bool
    advance: Callable[[int], Any]

    def __call__(self, piece: range) -> Piece:
        """Work on the samples at these positions of `indices`."""
        mine = self.indices[piece.start : piece.stop]
        conditions, parts, added = [], [], []
        for batch in batches(mine, self.batch_size):
            eva, clip = self.source.fetch(batch)
            parts.append(self.generate(eva, batch))
            added.append(self.measure(parts[-1], clip))
            if self.store is not None:
                conditions.append(eva)
            self.advance(len(batch))
        tokens, entry = torch.cat(parts), None
        if self.store is not None:
            number, records = piece.start // self.size, self.source.records(mine)
            entry = self.store.write(number, piece.start, torch.cat(conditions), tokens, records)
        found = [values for values in added if values is not None]
        return Piece(entry, found, tokens if self.keep else None)
