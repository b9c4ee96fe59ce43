"""From embeddings on disk to training batches: the split, the order of an epoch, batches and their noise."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain, count, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from blip3o_dit.data.checks import Record
from blip3o_dit.data.choices import SHUFFLES, SPLIT_RULES, check_split
from blip3o_dit.data.embeddings import Embeddings, fetch_stored, open_embeddings
from blip3o_dit.data.statistics import streamed_statistics
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.utils.json_files import short_repr
from blip3o_dit.utils.stateless_random import (
    StatelessOrder,
    stateless_generator,
    stateless_normal,
    stateless_permutation,
    stateless_uniform,
)
from blip3o_dit.utils.validation import check_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Sample indices, int64, ascending; `held_back` are neither trained on nor evaluated (`hold_back`).

    `groups` [n] numbers the group of each sample, if there are any.
    """

    train: np.ndarray
    eval: np.ndarray
    held_back: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    groups: np.ndarray | None = None


def split_samples(
    source: Embeddings,
    *,
    eval_split: float,
    seed: int,
    split_by: str = "permutation",
    group_pattern: str = "",
) -> Split:
    """Hold out a share of the samples, or as many as `eval_split` says from 1 up.

    `permutation` holds out round(n eval_split), but at least one, of a seeded permutation of n samples.
    `key_hash` holds a sample out when the hash of (seed, key) falls under the share: the count is only
    about right, but a sample stays on its side when data is appended or reordered. It reads the record of
    every sample, one shard's at a time, which the permutation does not. `group` does the same with the
    group that `group_pattern` takes out of each key (`group_of`), so that a group is on one side; the group
    of the smallest hash is held out in any case. Of the groups that were trained on none is held out when
    data is appended.

    Raises:
        ValueError: when one side would be empty, with both counts; for a count with a hash; when the
            pattern matches no key.
    """
    check_name("split_by", split_by, SPLIT_RULES)
    check_split(eval_split, split_by, group_pattern)
    split = _sides(source, eval_split, seed, split_by, group_pattern)
    if split.groups is not None:
        held_out = len(set(split.groups[split.eval]))
        logger.info("the split: %d group(s), %d held out", split.groups.max() + 1, held_out)
    if not len(split.train) or (eval_split > 0 and not len(split.eval)):
        groups = "" if split.groups is None else f" in {split.groups.max() + 1} group(s)"
        raise ValueError(
            f"{source.path}: eval_split={eval_split} of {source.num_samples} samples{groups} leaves "
            f"{len(split.train)} for training and {len(split.eval)} for evaluation: "
            "expected at least one each"
        )
    return split


def _sides(source: Embeddings, eval_split: float, seed: int, split_by: str, group_pattern: str) -> Split:
    """`split_samples` without its refusals: a side may be empty."""
    if split_by == "permutation":
        return split_permutation(source.num_samples, eval_split=eval_split, seed=seed)
    if split_by == "key_hash":
        return _split_at(_hashes(source, seed, lambda key: key) < eval_split)
    return _split_groups(source, eval_split, seed, re.compile(group_pattern))


def group_of(key: str, pattern: re.Pattern[str]) -> str | None:
    """What the pattern's first parenthesis finds in the key; without one, its whole match. None: no match."""
    found = pattern.search(key)
    return found[min(1, pattern.groups)] if found else None


def _split_groups(source: Embeddings, eval_split: float, seed: int, pattern: re.Pattern[str]) -> Split:
    """A key that the pattern does not match is a group of its own."""
    unmatched = 0

    def name(key: str) -> str:
        nonlocal unmatched
        group = group_of(key, pattern)
        unmatched += group is None
        return key if group is None else group

    hashes = _hashes(source, seed, name)
    if unmatched == source.num_samples:
        raise ValueError(
            f"{source.path}: expected keys that group_pattern {short_repr(pattern.pattern)} matches, found "
            f"none; the first is {short_repr(source.records([0])[0]['key'])}"
        )
    groups = np.unique(hashes, return_inverse=True)[1]
    split = _split_at((hashes < eval_split) | ((hashes == hashes.min()) & (eval_split > 0)))
    if unmatched:
        logger.info("%d keys that group_pattern does not match are groups of their own", unmatched)
    return replace(split, groups=groups)


def _hashes(source: Embeddings, seed: int, name: Callable[[str], str]) -> np.ndarray:
    """The hash of the name of each sample's key, [n], from U[0, 1)."""
    found = (_unit_hash(seed, name(record["key"])) for record in _each_record(source))
    return np.fromiter(found, dtype=np.float64, count=source.num_samples)


def _split_at(held_out: np.ndarray) -> Split:
    return Split(train=np.flatnonzero(~held_out), eval=np.flatnonzero(held_out))


# From so many samples on, split and order are computed piece by piece (`StatelessOrder`), indices int32.
LARGE = 2**25
PIECE = 2**16


def split_permutation(num_samples: int, *, eval_split: float, seed: int) -> Split:
    """The `permutation` split, which the number of samples decides alone; a side may be empty."""
    wanted = round(eval_split if eval_split >= 1 else num_samples * eval_split)
    count = max(1, wanted) if eval_split > 0 else 0
    if num_samples < LARGE:
        order = stateless_permutation(num_samples, seed=seed, stream="split")
        return Split(train=np.sort(order[count:]), eval=np.sort(order[:count]))
    large, held_out = (
        StatelessOrder(num_samples, seed=seed, stream="split"),
        np.zeros(num_samples, dtype=bool),
    )
    for places in _in_pieces(count):
        held_out[large.at(places)] = True
    return Split(train=_places_of(~held_out), eval=_places_of(held_out))


def _in_pieces(count: int, start: int = 0) -> Iterator[np.ndarray]:
    """start..count-1 as consecutive arrays."""
    for first in range(start, count, PIECE):
        yield np.arange(first, min(first + PIECE, count))


def _places_of(chosen: np.ndarray) -> np.ndarray:
    """As np.flatnonzero, int32 and without an int64 array of all of them beside it."""
    found, filled = np.empty(np.count_nonzero(chosen), dtype=np.int32), 0
    for first in range(0, len(chosen), PIECE):
        here = np.flatnonzero(chosen[first : first + PIECE])
        found[filled : filled + len(here)] = here + first
        filled += len(here)
    return found


# One in so many of the training side is held back, at most so many, and none where there would be fewer.
PART_HELD_BACK, MOST_HELD_BACK, LEAST_HELD_BACK = 16, 256, 32


def hold_back(source: Embeddings, split: Split, **rule: Any) -> Split:
    """Take some samples from the training side, for what is fitted to a trained model.

    They are what a somewhat larger `eval_split` would hold out as well, by the same rule (the arguments of
    `split_samples` that made the split), so the evaluated ones stay the same. None where nothing is evaluated
    or there are too few, or where the next group would be far too large.
    """
    wanted = min(len(split.train) // PART_HELD_BACK, MOST_HELD_BACK)
    if wanted < LEAST_HELD_BACK or not len(split.eval):
        return split
    more = wanted if rule["eval_split"] >= 1 else wanted / source.num_samples
    wider = _sides(source, **rule | {"eval_split": rule["eval_split"] + more})
    held_back = np.setdiff1d(wider.eval, split.eval, assume_unique=True)
    if not LEAST_HELD_BACK // 2 <= len(held_back) <= 4 * wanted:  # a hash holds back about so many
        return split
    return replace(wider, eval=split.eval, held_back=held_back)


def choose_samples(indices: np.ndarray, *, max_samples: int, seed: int) -> np.ndarray:
    """A random subset, the same for statistics, ridge source and baselines, so that its shards are read once.

    At most `max_samples` of `indices`, in random order; the seed alone decides.
    """
    if len(indices) >= LARGE:
        order = StatelessOrder(len(indices), seed=seed, stream="baseline samples")
        return np.asarray(indices)[order.at(np.arange(min(max_samples, len(indices))))].astype(np.int64)
    return stateless_generator(seed, "baseline samples").permutation(np.asarray(indices))[:max_samples]


def group_ranks(chosen: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """What a part of these samples is made of, [m]: whole groups, numbered in the order they first come in.

    Without groups, or where all are of one, each sample has a number of its own: 0 to m - 1.

    Args:
        chosen: indices [m], in random order. groups: as `Split.groups`.
    """
    if groups is not None:
        _, first, inverse = np.unique(groups[chosen], return_index=True, return_inverse=True)
        if len(first) > 1:
            return np.argsort(np.argsort(first))[inverse]
    return np.arange(len(chosen))


@dataclass(frozen=True)
class BatchNoise:
    """The random numbers of a batch, each a function of (seed, stream, epoch, sample index, repetition).

    They are made where the batch is used: a worker's would have to travel, twice as much as the batch itself.
    """

    seed: int
    stream: str

    def of(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """`noise` [B, N, C_clip] from N(0, 1); `u_time` and `u_dropout` [B] from U[0, 1); beside the batch's
        tokens, float32.

        These two are uniform numbers: training maps `u_time` to a time t, and compares `u_dropout` with the
        dropout rate of the condition.
        """
        clip, indices = batch["clip"], batch["index"]
        name: dict[str, Any] = {"seed": self.seed, "counter": batch["epoch"], "repeats": batch["repeats"]}
        shape, device = clip.shape[1:], clip.device
        u_time = stateless_uniform(indices, stream=f"{self.stream} time", **name)
        u_dropout = stateless_uniform(indices, stream=f"{self.stream} condition dropout", **name)
        return {
            "noise": stateless_normal(indices, shape, stream=f"{self.stream} noise", device=device, **name),
            "u_time": u_time.to(device, non_blocking=True),
            "u_dropout": u_dropout.to(device, non_blocking=True),
        }


@dataclass(eq=False)
class EmbeddingDataset(Dataset):
    """The samples `indices` of a source, fetched batch by batch.

    A sampler asks for an item as (epoch, position in `indices`), or as (epoch, position, n) when this sample
    comes for the n-th time after its first in that epoch; a plain position means epoch 0.

    A batch is a dict: `eva` [B, L, C_eva] and `clip` [B, N, C_clip] in the units of the data and in the dtype
    they are stored in (whoever computes with a batch converts it), `index`, a list of B sample indices in the
    source, `epoch`, an int, and `repeats`, a list of B: how often the sample came before in this epoch.
    """

    source: Embeddings
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: tuple[int, ...] | int) -> dict[str, Any]:
        return self.__getitems__([item])

    def __getitems__(self, items: Sequence[tuple[int, ...] | int]) -> dict[str, Any]:
        epochs, positions, repeats = zip(*map(_full_item, items), strict=True)
        epoch, index = epochs[0], self.indices[list(positions)]
        eva, clip = fetch_stored(self.source, index)
        return {"eva": eva, "clip": clip, "index": index.tolist(), "epoch": epoch, "repeats": list(repeats)}


def _full_item(item: tuple[int, ...] | int) -> tuple[int, ...]:
    """(epoch, position, repetition) of an item; a part that it does not have is 0."""
    return (*item, 0)[:3] if isinstance(item, tuple) else (0, item, 0)


class ShuffledSampler(Sampler):
    """Shuffles the whole split anew each epoch, as items (epoch, position): a function of (seed, epoch).

    An epoch is whole global batches, so that it has the same steps however a batch is divided among processes
    and gradient accumulation. The first samples of the epoch come again to fill the last batch, several times
    if the split is smaller than a batch; such an item is (epoch, position, n), n from 1 on.

    Args:
        global_batch: samples per optimizer step, of all processes and micro-batches together.
    """

    def __init__(self, num_samples: int, *, seed: int, global_batch: int = 1) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.global_batch = global_batch
        self.num_repeated = -num_samples % global_batch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples + self.num_repeated

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return self.items()

    def items(self, first: int = 0) -> Iterator[tuple[int, ...]]:
        """The epoch's items from number `first` on."""
        epoch, before = self.epoch, first
        for piece in self._pieces(epoch, first):
            for position in piece[before:]:
                yield epoch, int(position)
            before = max(0, before - len(piece))
        first_items = self._first_items(epoch) if self.num_repeated else []
        again = ((*item, repeat) for repeat in count(1) for item in first_items)
        yield from islice(again, max(0, first - self.num_samples), self.num_repeated)

    def _first_items(self, epoch: int) -> list[tuple[int, ...]]:
        """Those that come again at the end, at most all."""
        positions = chain.from_iterable(self._pieces(epoch))
        return [(epoch, int(position)) for position in islice(positions, self.num_repeated)]

    def _pieces(self, epoch: int, first: int = 0) -> Iterator[np.ndarray]:
        """The positions of an epoch in order, as consecutive arrays; before number `first` they may be empty
        of meaning, but have their lengths."""
        name: dict[str, Any] = {"seed": self.seed, "stream": "order", "counter": epoch}
        if self.num_samples < LARGE:
            yield stateless_permutation(self.num_samples, **name)
            return
        order, whole = StatelessOrder(self.num_samples, **name), first // PIECE * PIECE
        yield np.broadcast_to(np.int64(0), whole)
        for places in _in_pieces(self.num_samples, whole):
            yield order.at(places)


class WindowShuffledSampler(ShuffledSampler):
    """Shuffles the shards, then the samples within each window of that sequence, to read nearly in sequence.

    Both are functions of (seed, epoch), and about window / shard size shards are read at a time. Items are
    those of `ShuffledSampler`. A shard larger than a quarter of the window (a pickle is one shard) is cut
    into pieces of that size, which are shuffled like shards: otherwise a window would hold neighbours only,
    the same ones in every epoch.

    Args:
        starts: [shards + 1], the first position of each shard, then the number of samples.
        window: number of samples that are shuffled among themselves; windows do not overlap.
    """

    def __init__(self, starts: np.ndarray, *, window: int, seed: int, global_batch: int = 1) -> None:
        super().__init__(int(starts[-1]), seed=seed, global_batch=global_batch)
        step = max(1, window // 4)
        cuts = [np.arange(start, stop, step) for start, stop in pairwise(starts.tolist())]
        self.starts = np.concatenate([*cuts, starts[-1:]])
        self.window = window

    def _pieces(self, epoch: int, first: int = 0) -> Iterator[np.ndarray]:
        name: dict[str, Any] = {"seed": self.seed, "counter": epoch}
        lengths = np.diff(self.starts)
        order = stateless_permutation(len(lengths), stream="order of shards", **name)
        ends = np.cumsum(lengths[order])  # in the sequence of shards; `shift` leads from there to positions
        shift = self.starts[order] - (ends - lengths[order])
        for first in range(0, self.num_samples, self.window):
            sequence = np.arange(first, min(first + self.window, self.num_samples))
            positions = sequence + shift[np.searchsorted(ends, sequence, side="right")]
            yield stateless_generator(self.seed, "order in a window", epoch, first).permutation(positions)


def training_sampler(
    dataset: EmbeddingDataset, *, shuffle: str, window: int, seed: int, global_batch: int = 1
) -> ShuffledSampler:
    """The sampler for `shuffle`, "exact" or "window". Raises ValueError for another name."""
    check_name("shuffle", shuffle, SHUFFLES)
    if shuffle == "exact":
        return ShuffledSampler(len(dataset), seed=seed, global_batch=global_batch)
    starts = np.searchsorted(dataset.indices, dataset.source.shard_starts)  # indices ascend
    return WindowShuffledSampler(starts, window=window, seed=seed, global_batch=global_batch)


def test_blip3o_dataset(path: str | Path) -> dict[str, Any]:
    """Check a data set before training on it, and say what is in it.

    Reads everything, whatever was verified before. Returns counts, widths, token norms and the range of the
    channels' standard deviations, and writes them to standard output, one line each.

    Raises:
        FileNotFoundError, ValueError: for anything `open_embeddings` or a checksum refuses.
    """
    source = open_embeddings(path)
    if isinstance(source, EmbeddingStore):
        source.verify()
    everything = np.arange(source.num_samples)
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


def _each_record(source: Embeddings) -> Iterator[Record]:
    """Every record in order; one shard's are in memory at a time."""
    for start, stop in pairwise(source.shard_starts.tolist()):
        yield from source.records(range(start, stop))


def _unit_hash(seed: int, key: str) -> float:
    # A file name that is no UTF-8 has half surrogate pairs, which plain UTF-8 cannot hold.
    digest = blake2b(f"{seed}\0{key}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
