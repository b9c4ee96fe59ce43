"""What training reads: the `Embeddings` protocol, how to open a store or a pickle, transformed views."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from blip3o_dit.data.array_embeddings import AS_IT_IS, Arrangement
from blip3o_dit.data.checks import AnyIndices, Indices, Record
from blip3o_dit.data.manifest import MANIFEST, STORE_ASIDE
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.utils.recognise import EMBEDDINGS, refusal


class Embeddings(Protocol):
    """What training, generation and evaluation read: a store, or a pickle in memory."""

    path: Path
    num_samples: int
    num_tokens: int
    condition_dim: int
    target_dim: int
    # [shards + 1], int64: the first sample of each shard, then `num_samples`
    shard_starts: np.ndarray

    def fetch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """Conditions [n, L, C_eva] and targets [n, N, C_clip], float32, in the order asked for."""

    def records(self, indices: Indices | None = None) -> list[Record]:
        """The records of these samples, or of all."""


def fetch_stored(source: Embeddings, indices: Indices) -> tuple[Tensor, Tensor]:
    """As `Embeddings.fetch`, but in the dtype that the tokens are stored in, if the source has it."""
    own = getattr(source, "fetch_stored", None)
    return own(indices) if callable(own) else source.fetch(indices)


def batches(indices: AnyIndices, batch_size: int) -> Iterator[AnyIndices]:
    """Consecutive pieces of `indices`, the last one perhaps shorter."""
    for start in range(0, len(indices), batch_size):
        yield indices[start : start + batch_size]  # type: ignore[misc]


def open_embeddings(
    path: str | Path, *, verify: str = "first", arrangement: Arrangement = AS_IT_IS
) -> Embeddings:
    """A store, a documented pickle, or another file or folder of embeddings (`array_files.py`), checked.

    Args:
        verify: as for `EmbeddingStore`. arrangement: what is done to the tokens of files; not to a store's.

    Raises:
        FileNotFoundError, ValueError: one line naming the file, what was expected and what was found.
    """
    from blip3o_dit.data.array_files import open_file, open_folder  # which are built on this module

    path = Path(path)
    if not path.is_dir():
        return open_file(path, arrangement)
    if any((path / name).exists() for name in (MANIFEST, STORE_ASIDE)):
        return EmbeddingStore(path, verify=verify)
    found = open_folder(path, arrangement)
    if found is None:
        raise refusal(path, EMBEDDINGS)
    return found


class TransformedEmbeddings:
    """A view of embeddings that applies a function each to conditions and targets, [n, N, C] -> [n, N, C]."""

    def __init__(
        self,
        source: Embeddings,
        condition: Callable[[Tensor], Tensor],
        target: Callable[[Tensor], Tensor],
    ) -> None:
        self.source, self.condition, self.target = source, condition, target
        self.path = source.path
        self.num_samples, self.num_tokens = source.num_samples, source.num_tokens
        self.condition_dim, self.target_dim = source.condition_dim, source.target_dim
        self.shard_starts = source.shard_starts

    def fetch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """See `Embeddings.fetch`."""
        eva, clip = self.source.fetch(indices)
        return self.condition(eva), self.target(clip)

    def records(self, indices: Indices | None = None) -> list[Record]:
        """See `Embeddings.records`."""
        return self.source.records(indices)


def check_sizes(source: Embeddings, expected: tuple[int, int, int], model: str | Path) -> None:
    """Refuse (ValueError) a source whose (tokens, condition width, target width) are not the model's."""
    found = (source.num_tokens, source.condition_dim, source.target_dim)
    if found != expected:
        raise ValueError(
            f"{source.path}: expected (tokens, eva width, clip width) {expected} as the model at {model}, "
            f"found {found}"
        )
