"""From embeddings at rest to batches: the split, the order of a pass, batched fetching."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from blip3o_dit.config import SPLIT_RULES, check_name
from blip3o_dit.data.source import open_embeddings
from blip3o_dit.data.statistics import streamed_statistics
from blip3o_dit.data.store import EmbeddingSource
from blip3o_dit.randomness import named_permutation


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


class EmbeddingDataset(Dataset):
    """Samples of a source as batches; an item is asked for as (pass index, position in the split).

    A batch is a dict: `eva` [B, L, C_eva] and `clip` [B, N, C_clip] float32 in the units of the data,
    `index`, a list of B sample indices in the source, and `pass_index`, an int. The last two name random
    draws, which are made on the host: as tensors they would travel to the device and back.
    """

    def __init__(self, source: EmbeddingSource, indices: np.ndarray) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: tuple[int, int] | int) -> dict[str, Any]:
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[tuple[int, int] | int]) -> dict[str, Any]:
        pairs = [item if isinstance(item, tuple) else (0, item) for item in items]
        index = self.indices[[position for _, position in pairs]]
        eva, clip = self.source.fetch(index)
        return {"eva": eva, "clip": clip, "index": index.tolist(), "pass_index": pairs[0][0]}


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
        order = named_permutation(
            self.num_samples, seed=self.seed, stream="order", pass_index=self.pass_index
        )
        return ((self.pass_index, int(position)) for position in order)


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
