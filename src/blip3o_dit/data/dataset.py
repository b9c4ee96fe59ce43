"""From embeddings at rest to batches: the split, the order of a pass, batched fetching."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from blip3o_dit.config import SPLIT_RULES, check_name
from blip3o_dit.data.source import open_embeddings
from blip3o_dit.data.statistics import streamed_statistics
from blip3o_dit.data.store import EmbeddingSource
from blip3o_dit.randomness import named_normal, named_permutation, named_uniform


@dataclass(frozen=True)
class Split:
    """Sample indices, int64, ascending."""

    train: np.ndarray
    eval: np.ndarray


def split_samples(
    source: EmbeddingSource, *, eval_split: float, seed: int, split_by: str = "permutation"
) -> Split:
    """Hold out a share of the samples.

    `permutation` holds out round(n eval_split), but at least one, of a seeded permutation of n samples.
    `key_hash` holds a sample out when the hash of (seed, key) falls under the share: the count is only
    about right, but a sample stays on its side when data is appended or reordered.

    Raises:
        ValueError: when one side would be empty, with both counts.
    """
    check_name("split_by", split_by, SPLIT_RULES)
    if not 0.0 <= eval_split <= 1.0:
        raise ValueError(f"eval_split: expected a share in [0, 1], found {eval_split}")
    if split_by == "permutation":
        split = split_permutation(source.num_samples, eval_split=eval_split, seed=seed)
    else:
        keys = [record["key"] for record in source.records()]
        held_out = np.array([_unit_hash(seed, key) < eval_split for key in keys])
        split = Split(train=np.flatnonzero(~held_out), eval=np.flatnonzero(held_out))
    if not len(split.train) or (eval_split > 0 and not len(split.eval)):
        raise ValueError(
            f"{source.path}: eval_split={eval_split} of {source.num_samples} samples leaves "
            f"{len(split.train)} for training and {len(split.eval)} for evaluation: "
            "expected at least one each"
        )
    return split


def split_permutation(num_samples: int, *, eval_split: float, seed: int) -> Split:
    """The `permutation` split, which the number of samples decides alone; a side may be empty."""
    count = max(1, round(num_samples * eval_split)) if eval_split > 0 else 0
    order = named_permutation(num_samples, seed=seed, stream="split")
    return Split(train=np.sort(order[count:]), eval=np.sort(order[:count]))


def some_samples(indices: np.ndarray, *, most: int, seed: int, stream: str) -> np.ndarray:
    """At most `most` of the samples, chosen by (seed, stream), ascending; all if there are no more."""
    if len(indices) <= most:
        return indices
    return np.sort(indices[named_permutation(len(indices), seed=seed, stream=stream)[:most]])


@dataclass(frozen=True)
class NamedDraws:
    """Everything random about a batch, named by (seed, pass, sample index).

    They are made where the batch is read, so that data-loader processes take this work off the step's.
    """

    seed: int
    stream: str

    def of(self, indices: Sequence[int], pass_index: int, shape: Sequence[int]) -> dict[str, Tensor]:
        """`noise` [B, *shape] from N(0, 1), `time` and `drop` [B] from U[0, 1): uniform, not yet a time."""
        name: dict[str, Any] = {"seed": self.seed, "pass_index": pass_index}
        return {
            "noise": named_normal(indices, shape, stream=f"{self.stream} noise", **name),
            "time": named_uniform(indices, stream=f"{self.stream} time", **name),
            "drop": named_uniform(indices, stream=f"{self.stream} condition dropout", **name),
        }


class EmbeddingDataset(Dataset):
    """Samples of a source as batches; an item is asked for as (pass index, position in the split).

    A batch is a dict: `eva` [B, L, C_eva] and `clip` [B, N, C_clip] float32 in the units of the data,
    `index`, a list of B sample indices in the source, `pass_index`, an int, and what `draws` adds.
    """

    def __init__(self, source: EmbeddingSource, indices: np.ndarray, draws: NamedDraws | None = None) -> None:
        self.source = source
        self.indices = indices
        self.draws = draws

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: tuple[int, int] | int) -> dict[str, Any]:
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[tuple[int, int] | int]) -> dict[str, Any]:
        pairs = [item if isinstance(item, tuple) else (0, item) for item in items]
        index = self.indices[[position for _, position in pairs]]
        eva, clip = self.source.fetch(index)
        batch = {"eva": eva, "clip": clip, "index": index.tolist(), "pass_index": pairs[0][0]}
        if self.draws is not None:
            batch |= self.draws.of(batch["index"], batch["pass_index"], clip.shape[1:])
        return batch


class ShuffledPasses(Sampler):
    """Items (pass index, position): a permutation of the split named by (seed, pass index)."""

    def __init__(self, num_samples: int, *, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.pass_index = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each pass."""
        self.pass_index = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for piece in self._pieces():
            for position in piece:
                yield self.pass_index, int(position)

    def _pieces(self) -> Iterator[np.ndarray]:
        """The pass's positions in their order, piece by piece."""
        yield self._permutation(self.num_samples, "order")

    def _permutation(self, count: int, stream: str) -> np.ndarray:
        return named_permutation(count, seed=self.seed, stream=stream, pass_index=self.pass_index)


class WindowedPasses(ShuffledPasses):
    """As `ShuffledPasses`, but reading few shards at a time: shards in a named order, then a window.

    The shards' samples, one shard after the other, are permuted within windows of `window` samples, so that
    a disk reads, and the page cache holds, what lies together. Every sample comes once a pass. Where the
    windows begin changes from pass to pass.

    Args:
        bounds: positions at which shards begin, and the number of samples; ascending, from 0.
        window: samples that are shuffled among each other, at least 1.
    """

    def __init__(self, bounds: np.ndarray, *, seed: int, window: int) -> None:
        super().__init__(int(bounds[-1]), seed=seed)
        self.bounds = bounds
        self.window = window

    def _pieces(self) -> Iterator[np.ndarray]:
        shards = self._permutation(len(self.bounds) - 1, "shard order")
        order = np.concatenate([np.arange(self.bounds[k], self.bounds[k + 1]) for k in shards])
        first = 1 + self._permutation(self.window, "window offset")[0]
        starts = np.concatenate([[0], np.arange(first, len(order), self.window), [len(order)]])
        for number, (start, end) in enumerate(pairwise(starts.tolist())):
            yield order[start:end][self._permutation(end - start, f"window {number}")]


def shard_bounds(dataset: EmbeddingDataset) -> np.ndarray:
    """Positions of the split at which another shard begins, and its length; a pickle is one shard."""
    starts = getattr(dataset.source, "shard_starts", np.zeros(1, dtype=np.int64))
    return np.unique(np.append(np.searchsorted(dataset.indices, starts), len(dataset)))


def whole_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Collator for a dataset whose `__getitems__` already returns the batch."""
    return batch


def test_blip3o_dataset(path: str | Path) -> dict[str, Any]:
    """Check a data set before training on it, and say what is in it.

    Reads every sample once. Returns counts, widths, token norms and the range of the channels' standard
    deviations, and writes them to standard output, one line each.

    Raises:
        FileNotFoundError, ValueError: for anything `open_embeddings` or a checksum refuses.
    """
    source = open_embeddings(path)
    everything = np.arange(source.num_samples)
    source.records()  # checks the tables; the statistics check the shards
    condition, target = streamed_statistics(source, everything, normalize=False)
    facts: dict[str, Any] = {
        "path": str(source.path),
        "samples": source.num_samples,
        "tokens": source.num_tokens,
        "condition width (eva)": source.condition_dim,
        "target width (clip)": source.target_dim,
        "eva root mean square norm": round(condition.rms_norm, 4),
        "clip root mean square norm": round(target.rms_norm, 4),
        "clip channel deviation": (f"{float(target.std.min()):.4g} to {float(target.std.max()):.4g}"),
    }
    # The documented command is a `python -c` that shows its findings; no logging is set up there.
    sys.stdout.writelines(f"{name}: {value}\n" for name, value in facts.items())
    return facts


def _unit_hash(seed: int, key: str) -> float:
    digest = blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
