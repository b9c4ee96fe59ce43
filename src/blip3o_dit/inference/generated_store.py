"""Generation in bounded memory: samples are generated piece by piece, and a piece is written as a shard."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip3o_dit.data.checks import Record, check_pair, check_square
from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.data.manifest import DTYPES, STORE_ASIDE, write_manifest
from blip3o_dit.data.shard_writer import json_line, to_disk, write_shard
from blip3o_dit.data.store_folder import StoreFolder

DTYPE = "float32"
# Size of a shard at most, give or take a batch; a process holds one shard at a time.
MAX_SHARD_BYTES = 2**28


class GeneratedStore:
    """Writes conditions and generated tokens shard by shard, aside, until the store is whole.

    Args:
        path: folder to create, which all processes see.
        sizes: tokens, condition width, target width.
    """

    def __init__(self, path: Path, sizes: tuple[int, int, int]) -> None:
        self.path = path
        self.sizes = sizes
        self.folder: StoreFolder | None = None

    def claim(self) -> None:
        """Make the folder, without an interrupted generation's files; on one process, before others write.

        Raises:
            ValueError: when there is a store or anything else already, or a file in place of the folder.
        """
        check_square(self.path, self.sizes[0])
        self.folder = StoreFolder(self.path)

    def shard_size(self, count: int, *, batch_size: int, processes: int) -> int:
        """Samples per shard: a multiple of `batch_size` that gives each process equally many shards.

        The batches are then the same as on one process, and so are the samples, bit for bit.
        """
        num_tokens, condition_dim, target_dim = self.sizes
        bytes_per_sample = num_tokens * (condition_dim + target_dim) * DTYPES[DTYPE].itemsize
        max_samples = max(1, MAX_SHARD_BYTES // bytes_per_sample)
        shards_per_process = math.ceil(count / (max_samples * processes))
        return batch_size * math.ceil(count / (shards_per_process * processes * batch_size))

    def write(
        self, number: int, first: int, eva: Tensor, generated: Tensor, records: Sequence[Record]
    ) -> dict[str, Any]:
        """Write a shard, [n, L, C_eva] and [n, N, C]; returns its manifest entry.

        Args:
            first: number of samples in the shards before it.

        Raises:
            ValueError: for NaN or infinity and bad records, naming the sample.
        """
        check_pair(self.path, eva, generated, records, expected=self.sizes, offset=first)
        lines = [json_line(self.path, first + row, record) for row, record in enumerate(records)]
        stored_eva, stored_clip = (
            to_disk(self.path, tokens, name, DTYPE) for tokens, name in ((eva, "eva"), (generated, "clip"))
        )
        return write_shard(self.path / STORE_ASIDE, number, stored_eva, stored_clip, lines)

    def finish(self, entries: Sequence[Mapping[str, Any]], made_by: Mapping[str, Any]) -> None:
        """Write the manifest, from the entries of all shards in order and how the tokens were made."""
        about = {"encoders": {"clip": {"generated_by": made_by}}, "pooling": None, "normalization": "none"}
        assert self.folder is not None  # this process claimed it
        write_manifest(self.folder.aside, self.sizes, DTYPE, entries, about)
        self.folder.publish()


class Piece(NamedTuple):
    """The result for a piece: its shard's manifest entry, each batch's metric sums, the tokens if kept."""

    entry: dict[str, Any] | None
    added: list[Tensor]
    tokens: Tensor | None


@dataclass(frozen=True)
class PieceWork:
    """Generates a piece of the samples batch by batch, then writes it as a shard, or keeps it, or both.

    Args:
        indices: all samples to generate, as indices of the source. batch_size: samples at a time.
        size: samples per piece; the store's shard size if there is one.
        generate: conditions and their indices -> tokens [n, N, C].
        measure: generated and true tokens -> their sums for the metrics, or None.
        keep: whether to return the tokens.
        advance: called with the size of each finished batch, for a progress bar.
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
        """Generate the samples at these positions of `indices`."""
        indices = self.indices[piece.start : piece.stop]
        conditions, parts, added = [], [], []
        for batch in batches(indices, self.batch_size):
            eva, clip = self.source.fetch(batch)
            parts.append(self.generate(eva, batch))
            added.append(self.measure(parts[-1], clip))
            if self.store is not None:
                conditions.append(eva)
            self.advance(len(batch))
        tokens, entry = torch.cat(parts), None
        if self.store is not None:
            number, records = piece.start // self.size, self.source.records(indices)
            entry = self.store.write(number, piece.start, torch.cat(conditions), tokens, records)
        measured = [values for values in added if values is not None]
        return Piece(entry, measured, tokens if self.keep else None)
