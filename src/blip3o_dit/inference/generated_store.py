"""Generation in bounded memory: samples are generated piece by piece, and a piece is written as a shard."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blip3o_dit.data.checks import Record, check_pair, check_square
from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.data.manifest import DTYPES, STORE_ASIDE, write_manifest
from blip3o_dit.data.shard_writer import json_line, to_disk, write_shard
from blip3o_dit.data.store_folder import StoreFolder, writing_alone

DTYPE = "float32"
# Size of a shard at most, give or take a batch; a process holds one shard at a time.
MAX_SHARD_BYTES = 2**28


class GeneratedStore:
    """Writes conditions and generated tokens shard by shard, aside, until the store is whole.

    Args:
        path: the folder that becomes the store; all processes see it.
        sizes: tokens, condition width, target width.
        encoder: what is known of the tower that made the conditions, for the manifest.
    """

    def __init__(
        self, path: Path, sizes: tuple[int, int, int], *, encoder: Mapping[str, Any] | None = None
    ) -> None:
        self.path = path
        self.aside = path / STORE_ASIDE
        self.sizes = sizes
        self.encoder = encoder

    @contextmanager
    def claimed(self, *, overwrite: bool = False) -> Iterator[None]:
        """Hold the folder while the block writes; on one process, before others write.

        When the block ends well the store takes its place, else what was there before stays.

        Raises:
            ValueError: see `StoreFolder`; also when another process writes to the same folder.
        """
        check_square(self.path, self.sizes[0])
        with writing_alone(self.path, "generation"):
            folder = StoreFolder(self.path, overwrite=overwrite)
            try:
                yield
            except BaseException:
                folder.abandon()
                raise
            folder.publish()

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
        return write_shard(self.aside, number, stored_eva, stored_clip, lines)

    def finish(self, entries: Sequence[Mapping[str, Any]], made_by: Mapping[str, Any]) -> None:
        """Write the manifest, from the entries of all shards in order and how the tokens were made."""
        encoders: dict[str, Any] = {"clip": {"generated_by": made_by}}
        if self.encoder is not None:
            encoders["eva"] = dict(self.encoder)
        about = {"encoders": encoders, "pooling": None, "normalization": "none"}
        write_manifest(self.aside, self.sizes, DTYPE, entries, about)


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
        keep: whether to return the tokens. pooled: as the mean over each sample's, [n, C].
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
    pooled: bool
    advance: Callable[[int], Any]

    def __call__(self, piece: range) -> Piece:
        """Generate the samples at these positions of `indices`."""
        indices = self.indices[piece.start : piece.stop]
        conditions, parts, added = [], [], []
        for batch in batches(indices, self.batch_size):
            eva, clip = self.source.fetch(batch)
            generated = self.generate(eva, batch)
            added.append(self.measure(generated, clip))
            parts.append(generated.mean(dim=1) if self.pooled else generated)
            if self.store is not None:
                conditions.append(eva)
            self.advance(len(batch))
        tokens, entry = torch.cat(parts), None
        if self.store is not None:
            number, records = piece.start // self.size, self.source.records(indices)
            entry = self.store.write(number, piece.start, torch.cat(conditions), tokens, records)
        measured = [values for values in added if values is not None]
        return Piece(entry, measured, tokens if self.keep else None)
