"""Splits, epochs and batches: every sample where it belongs, whatever the workers or the order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader

from blip3o_dit.data import dataset
from blip3o_dit.data.dataset import (
    BatchNoise,
    EmbeddingDataset,
    ShuffledSampler,
    Split,
    WindowShuffledSampler,
    choose_samples,
    group_of,
    split_samples,
    training_sampler,
)
from blip3o_dit.data.manifest import DTYPES
from blip3o_dit.data.pickle_format import PickledEmbeddings, write_pickle
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.data.worker_batches import whole_batch
from blip3o_dit.utils.stateless_random import stateless_normal

SIZES = dict(num_tokens=4, condition_dim=6, target_dim=3)


def write(path: Path, keys: list[str], *, seed: int = 0) -> EmbeddingStore:
    generator = torch.Generator().manual_seed(seed)
    eva = torch.randn(len(keys), 4, 6, generator=generator)
    clip = torch.randn(len(keys), 4, 3, generator=generator)
    with StoreWriter(path, **SIZES, dtype="float32", shard_size=7) as writer:
        writer.append(eva, clip, [{"key": key} for key in keys])
    return EmbeddingStore(path)


def names(count: int) -> list[str]:
    return [f"picture {row}" for row in range(count)]


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return write(tmp_path / "store", names(23))


# Splits

BOTH_RULES = pytest.mark.parametrize("rule", ["permutation", "key_hash"])


def same(a: Split, b: Split) -> bool:
    return np.array_equal(a.train, b.train) and np.array_equal(a.eval, b.eval)


@BOTH_RULES
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_a_split_is_disjoint_complete_sorted_and_repeatable(tmp_path: Path, rule: str, share: float) -> None:
    source = write(tmp_path / "s", names(120))
    split = split_samples(source, eval_split=share, seed=1, split_by=rule)
    both = np.concatenate([split.train, split.eval])
    assert np.array_equal(np.sort(both), np.arange(120))
    assert all(np.array_equal(side, np.sort(side)) for side in (split.train, split.eval))
    assert split.train.dtype == split.eval.dtype == np.int64
    assert same(split, split_samples(source, eval_split=share, seed=1, split_by=rule))


@BOTH_RULES
def test_another_seed_gives_another_split(tmp_path: Path, rule: str) -> None:
    source = write(tmp_path / "s", names(120))
    a, b = (split_samples(source, eval_split=0.3, seed=seed, split_by=rule) for seed in (0, 1))
    assert len(np.intersect1d(a.eval, b.eval)) < 0.6 * len(a.eval)


@BOTH_RULES
def test_a_split_does_not_depend_on_the_state_of_the_process(tmp_path: Path, rule: str) -> None:
    source = write(tmp_path / "s", names(60))
    first = split_samples(source, eval_split=0.3, seed=0, split_by=rule)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert same(first, split_samples(source, eval_split=0.3, seed=0, split_by=rule))


@BOTH_RULES
def test_a_split_of_nothing_trains_on_everything(store: EmbeddingStore, rule: str) -> None:
    split = split_samples(store, eval_split=0.0, seed=0, split_by=rule)
    assert np.array_equal(split.train, np.arange(23))
    assert split.eval.shape == (0,)


@pytest.mark.parametrize(
    ("count", "share", "held_out"), [(23, 0.1, 2), (23, 0.01, 1), (10, 0.26, 3), (2, 0.7, 1)]
)
def test_the_permutation_holds_out_the_rounded_share_but_at_least_one(
    tmp_path: Path, count: int, share: float, held_out: int
) -> None:
    source = write(tmp_path / "s", names(count))
    split = split_samples(source, eval_split=share, seed=0)
    assert (len(split.train), len(split.eval)) == (count - held_out, held_out)


def test_the_permutation_is_no_block_of_the_data(tmp_path: Path) -> None:
    split = split_samples(write(tmp_path / "s", names(200)), eval_split=0.2, seed=0)
    counts = np.histogram(split.eval, bins=4, range=(0, 200))[0]
    assert counts.min() >= 4
    assert np.diff(split.eval).max() > 1


def test_the_hash_holds_out_about_its_share(tmp_path: Path) -> None:
    source = write(tmp_path / "s", names(1000))
    for share in (0.1, 0.5):
        split = split_samples(source, eval_split=share, seed=0, split_by="key_hash")
        assert abs(len(split.eval) - 1000 * share) < 4 * (1000 * share * (1 - share)) ** 0.5


def test_the_hash_keeps_each_key_on_its_side_when_data_is_appended_and_reordered(tmp_path: Path) -> None:
    few = names(80)
    more = [*names(150), "ключ 🦊"]
    shuffled = [more[row] for row in np.random.default_rng(0).permutation(len(more))]
    sides = []
    for number, keys in enumerate((few, more, shuffled)):
        source = write(tmp_path / str(number), keys, seed=number)
        split = split_samples(source, eval_split=0.3, seed=5, split_by="key_hash")
        sides.append({keys[row] for row in split.eval})
    assert sides[0] == sides[1] & set(few)
    assert sides[1] == sides[2]


def test_the_hash_does_not_follow_the_position(tmp_path: Path) -> None:
    a = split_samples(write(tmp_path / "a", names(80)), eval_split=0.3, seed=0, split_by="key_hash")
    b = split_samples(write(tmp_path / "b", names(80)[::-1]), eval_split=0.3, seed=0, split_by="key_hash")
    assert np.array_equal(np.sort(79 - a.eval), b.eval)
    assert not np.array_equal(a.eval, b.eval)


def test_a_larger_share_keeps_what_the_smaller_one_held_out(tmp_path: Path) -> None:
    source = write(tmp_path / "s", names(100))
    for rule in ("permutation", "key_hash"):
        small, large = (
            split_samples(source, eval_split=share, seed=0, split_by=rule).eval for share in (0.1, 0.3)
        )
        assert set(small) < set(large)


@pytest.mark.parametrize(
    ("count", "share", "rule", "sides"),
    [
        (1, 0.1, "permutation", "0 for training and 1 for evaluation"),
        (3, 3.0, "permutation", "0 for training and 3 for evaluation"),
        (3, 4, "permutation", "0 for training and 3 for evaluation"),
        (3, 0.9, "permutation", "0 for training and 3 for evaluation"),
        (3, 1 - 1e-9, "key_hash", "0 for training and 3 for evaluation"),
        (3, 1e-9, "key_hash", "3 for training and 0 for evaluation"),
    ],
)
def test_an_empty_side_is_refused_with_both_counts(
    tmp_path: Path, count: int, share: float, rule: str, sides: str
) -> None:
    source = write(tmp_path / "s", names(count))
    with pytest.raises(ValueError, match=rf"eval_split={share} of {count} samples leaves {sides}") as caught:
        split_samples(source, eval_split=share, seed=0, split_by=rule)
    assert str(caught.value).startswith(str(tmp_path / "s"))


def test_a_split_is_the_same_in_every_version(tmp_path: Path) -> None:
    """Pinned: another order would move samples that a trained model has seen into its evaluation."""
    source = write(tmp_path / "s", names(20))
    assert split_samples(source, eval_split=0.2, seed=42).eval.tolist() == [1, 13, 14, 18]
    assert split_samples(source, eval_split=0.2, seed=42, split_by="key_hash").eval.tolist() == [1, 2, 4, 10]


def test_an_unknown_rule_is_refused_with_the_known_ones(store: EmbeddingStore) -> None:
    with pytest.raises(ValueError, match=r"permutation.*key_hash.*random"):
        split_samples(store, eval_split=0.3, seed=0, split_by="random")


@pytest.mark.parametrize("count", [1, 4.0])
def test_from_one_up_it_is_the_number_of_held_out_samples(tmp_path: Path, count: float) -> None:
    source = write(tmp_path / "s", names(20))
    split = split_samples(source, eval_split=count, seed=42)
    assert (len(split.eval), len(split.train)) == (count, 20 - count)
    assert set(split.eval) <= set(split_samples(source, eval_split=0.2, seed=42).eval)
    with pytest.raises(ValueError, match=r"expected a share in \[0, 1\) with split_by key_hash, found"):
        split_samples(source, eval_split=count, seed=42, split_by="key_hash")


@pytest.mark.parametrize("share", [-0.1, float("nan"), float("inf"), 1.5])
def test_a_share_that_is_none_is_refused(store: EmbeddingStore, share: float) -> None:
    with pytest.raises(ValueError, match="eval_split"):
        split_samples(store, eval_split=share, seed=0)


def test_a_numpy_integer_is_the_same_seed(store: EmbeddingStore) -> None:
    plain = split_samples(store, eval_split=0.3, seed=3)
    assert same(plain, split_samples(store, eval_split=0.3, seed=np.int64(3)))  # type: ignore[arg-type]


# Groups

CROPS = r"^(.*)_crop\d+$"


def crops(pictures: range, each: int = 3) -> list[str]:
    """Crops of one picture are not neighbours."""
    return [f"photo {picture}_crop{crop}" for crop in range(each) for picture in pictures]


def split_groups(source: EmbeddingStore, share: float = 0.3, seed: int = 0, pattern: str = CROPS) -> Split:
    return split_samples(source, eval_split=share, seed=seed, split_by="group", group_pattern=pattern)


def pictures_of(keys: list[str], indices: np.ndarray) -> set[str]:
    return {keys[index].split("_")[0] for index in indices}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_no_group_is_on_both_sides(tmp_path: Path, share: float, seed: int) -> None:
    keys = crops(range(60))
    split = split_groups(write(tmp_path / "s", keys), share, seed)
    assert np.array_equal(np.sort(np.concatenate([split.train, split.eval])), np.arange(180))
    assert not pictures_of(keys, split.train) & pictures_of(keys, split.eval)
    assert abs(len(split.eval) / 180 - share) <= 4 * (share * (1 - share) / 60) ** 0.5
    assert split.groups is not None  # one number for each picture
    assert len({(keys[index].split("_")[0], split.groups[index]) for index in range(180)}) == 60
    assert len(set(split.groups)) == 60


def test_appended_data_leaves_every_group_on_its_side(tmp_path: Path) -> None:
    few, more = crops(range(40), each=2), crops(range(80))[::-1]
    a, b = (split_groups(write(tmp_path / str(len(keys)), keys, seed=1)) for keys in (few, more))
    assert pictures_of(few, a.eval) == pictures_of(more, b.eval) & pictures_of(few, np.arange(len(few)))


def test_one_group_at_least_is_held_out_and_none_that_was_trained_on_later(tmp_path: Path) -> None:
    """A share of a few groups is less than one of them."""
    seen: set[str] = set()
    for count in range(2, 12):
        keys = crops(range(count))
        split = split_groups(write(tmp_path / str(count), keys), 1e-3)
        assert len(pictures_of(keys, split.eval)) == 1
        assert not pictures_of(keys, split.eval) & seen
        seen |= pictures_of(keys, split.train)
    assert len(seen) >= 10


def test_groups_of_one_key_are_split_as_by_its_hash(tmp_path: Path) -> None:
    source = write(tmp_path / "s", names(100))
    by_key = split_samples(source, eval_split=0.3, seed=2, split_by="key_hash")
    for pattern in (r".*", r"(picture \d+)", r"^(picture 1)$|nothing"):
        assert same(by_key, split_groups(source, seed=2, pattern=pattern))


def test_a_group_is_the_first_parenthesis_or_the_whole_match() -> None:
    cases = [
        (r"^[^/]+", "clip7/frame 12.jpg", "clip7"),
        (r"(\w+)-(\d+)", "scan-12.png", "scan"),
        (r"^(?:(\w+)/)?x", "x", None),
        (r"page", "cover", None),
        (r"(\d*)", "a", ""),
    ]
    for pattern, key, group in cases:
        assert group_of(key, re.compile(pattern)) == group


def test_keys_without_a_match_are_groups_of_their_own_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = [*crops(range(20)), "ключ", "other", "file \udce9"]
    with caplog.at_level("INFO", "blip3o_dit"):
        split = split_groups(write(tmp_path / "s", keys))
    assert split.groups is not None and len(set(split.groups)) == 23
    held_out = len(set(split.groups[split.eval]))
    assert f"the split: 23 group(s), {held_out} held out" in caplog.text
    assert "3 keys that group_pattern does not match are groups of their own" in caplog.text


def test_a_pattern_that_makes_no_split_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "s", crops(range(20)))
    with pytest.raises(
        ValueError, match=r"expected keys that group_pattern 'frame' matches, found none; the "
    ):
        split_groups(source, pattern="frame")
    with pytest.raises(ValueError, match=r"of 60 samples in 1 group\(s\) leaves 0 for training and 60 for"):
        split_groups(source, pattern="photo")
    assert len(split_groups(source, 0.0, pattern="photo").train) == 60


def test_groups_are_split_the_same_in_every_version(tmp_path: Path) -> None:
    """Pinned, as the other rules are."""
    source = write(tmp_path / "s", crops(range(10), each=2))
    assert split_groups(source, seed=42).eval.tolist() == [0, 1, 2, 3, 5, 10, 11, 12, 13, 15]


# Epochs


def order_of(sampler: ShuffledSampler, epoch: int) -> list[tuple[int, int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_an_epoch_holds_each_position_once() -> None:
    order = order_of(ShuffledSampler(40, seed=0), 3)
    assert sorted(position for _, position in order) == list(range(40))
    assert {index for index, _ in order} == {3}
    assert all(type(number) is int for item in order for number in item)
    assert len(ShuffledSampler(40, seed=0)) == 40


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    positions = {
        (seed, index): [position for _, position in order_of(ShuffledSampler(40, seed=seed), index)]
        for seed in (0, 1)
        for index in (0, 1, 2)
    }
    assert len({tuple(order) for order in positions.values()}) == 6
    assert list(range(40)) not in positions.values()
    resumed = ShuffledSampler(40, seed=1)
    torch.manual_seed(7)
    assert [position for _, position in order_of(resumed, 2)] == positions[1, 2]


def test_the_first_epoch_needs_no_set_epoch() -> None:
    assert list(ShuffledSampler(9, seed=0)) == order_of(ShuffledSampler(9, seed=0), 0)


STARTS = np.array([0, 10, 10, 13, 40, 50])  # an empty shard, and one that a window of 20 cuts to fives


def windows(seed: int, epoch: int, *, starts: np.ndarray = STARTS, window: int = 20) -> np.ndarray:
    items = order_of(WindowShuffledSampler(starts, window=window, seed=seed), epoch)
    assert {index for index, _ in items} == {epoch}
    assert all(type(number) is int for item in items for number in item)
    return np.array([position for _, position in items])


@pytest.mark.parametrize("window", [1, 3, 7, 20, 50, 1000])
def test_a_window_shuffled_epoch_holds_each_position_once(window: int) -> None:
    assert np.array_equal(np.sort(windows(0, 2, window=window)), np.arange(50))
    assert len(WindowShuffledSampler(STARTS, window=window, seed=0)) == 50


def test_the_window_shuffled_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {(seed, index): windows(seed, index).tolist() for seed in (0, 1) for index in (0, 1, 2)}
    assert len({tuple(order) for order in orders.values()}) == 6
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    assert windows(1, 2).tolist() == orders[1, 2]


def test_a_window_reads_few_shards_and_mixes_them() -> None:
    starts = np.arange(0, 6401, 100)
    order = windows(0, 0, starts=starts, window=400)
    shards_read = [len(np.unique(order[first : first + 400] // 100)) for first in range(0, 6400, 400)]
    assert shards_read == [4] * 16
    assert len(np.unique(order[:32] // 100)) == 4
    groups = [set(np.unique(windows(0, index, starts=starts, window=400)[:400] // 100)) for index in (0, 1)]
    assert groups[0] != groups[1]


def test_a_window_moves_on_a_shard_at_a_time() -> None:
    """Windows that do not end where shards do: two neighbours share a shard, and no third one reads it."""
    order = windows(0, 0, starts=np.arange(0, 6401, 100), window=450)
    read_by = [set((order[first : first + 450] // 100).tolist()) for first in range(0, 6400, 450)]
    assert max(map(len, read_by)) <= 6
    assert all(not (read_by[k] & later) for k in range(len(read_by)) for later in read_by[k + 2 :])


def test_one_shard_is_shuffled_differently_in_each_epoch() -> None:
    orders = [windows(0, index, starts=np.array([0, 12]), window=1000) for index in (0, 1)]
    assert orders[0].tolist() != orders[1].tolist()


def test_one_large_shard_is_mixed_beyond_a_window() -> None:
    first, second = (windows(0, index, starts=np.array([0, 4000]), window=100)[:100] for index in (0, 1))
    assert np.ptp(first) > 1000
    assert len(np.intersect1d(first, second)) < 50


def test_a_window_of_everything_is_a_permutation_without_structure() -> None:
    order = windows(3, 1, starts=np.arange(0, 3001, 100), window=3000)
    assert abs(np.corrcoef(order, np.arange(3000))[0, 1]) < 0.1
    assert len(np.unique(order[:60] // 100)) > 20


@pytest.mark.parametrize("window", [8, 1000])
def test_a_windowed_loader_brings_each_sample_of_the_split_once(store: EmbeddingStore, window: int) -> None:
    split = split_samples(store, eval_split=0.3, seed=0)
    data = EmbeddingDataset(store, split.train)
    sampler = training_sampler(data, shuffle="window", window=window, seed=0)
    brought = flat(list(DataLoader(data, batch_size=5, sampler=sampler, collate_fn=whole_batch)))
    assert sorted(brought) == split.train.tolist() != brought
    assert isinstance(sampler, WindowShuffledSampler)
    if window == 1000:  # nothing cut: the shards of 7, as far as the split leaves them
        assert sampler.starts.tolist() == [int((split.train < start).sum()) for start in (0, 7, 14, 21, 23)]


def test_a_pickle_is_one_shard(store: EmbeddingStore, tmp_path: Path) -> None:
    write_pickle(store, tmp_path / "e.pkl")
    data = EmbeddingDataset(PickledEmbeddings(tmp_path / "e.pkl"), np.arange(23))
    sampler = training_sampler(data, shuffle="window", window=1000, seed=0)
    assert isinstance(sampler, WindowShuffledSampler)
    assert sampler.starts.tolist() == [0, 23]


def test_the_exact_order_is_the_default_one_and_other_names_are_refused(store: EmbeddingStore) -> None:
    data = EmbeddingDataset(store, np.arange(23))
    exact = training_sampler(data, shuffle="exact", window=4, seed=5)
    assert order_of(exact, 2) == order_of(ShuffledSampler(23, seed=5), 2)
    with pytest.raises(ValueError, match=r"shuffle: expected one of \('exact', 'window'\), found 'shards'"):
        training_sampler(data, shuffle="shards", window=4, seed=5)


@pytest.mark.parametrize("size", [3, 8, 23, 50])
def test_the_first_samples_of_an_epoch_fill_its_last_batch(size: int) -> None:
    """In turn again and again where the split is smaller than a batch."""
    starts = np.array([0, 10, 20, 23])
    for plain, filled in (
        (ShuffledSampler(23, seed=1), ShuffledSampler(23, seed=1, global_batch=size)),
        (
            WindowShuffledSampler(starts, window=8, seed=1),
            WindowShuffledSampler(starts, window=8, seed=1, global_batch=size),
        ),
    ):
        order, whole = order_of(plain, 2), order_of(filled, 2)
        assert len(whole) == len(filled) == -(-23 // size) * size
        assert [item[:2] for item in whole] == (order * 3)[: len(whole)]
        assert [item[2:] for item in whole] == [(n,) if n else () for n in range(3) for _ in order][
            : len(whole)
        ]


@pytest.mark.parametrize(
    ("processes", "batch", "accumulation"), [(1, 32, 1), (2, 16, 1), (4, 8, 1), (1, 8, 4), (2, 8, 2)]
)
def test_processes_split_the_batches_of_one_process(processes: int, batch: int, accumulation: int) -> None:
    """What accelerate deals out makes, step by step, the global batch that one process would take."""
    sampler = ShuffledSampler(75, seed=0, global_batch=32)
    expected = [order_of(sampler, 1)[first : first + 32] for first in range(0, 96, 32)]
    shares = [
        list(BatchSamplerShard(BatchSampler(sampler, batch, drop_last=False), processes, rank))
        for rank in range(processes)
    ]
    for step, whole in enumerate(expected):
        micro = slice(step * accumulation, (step + 1) * accumulation)
        taken = [item for share in shares for piece in share[micro] for item in piece]
        assert sorted(taken) == sorted(whole)
    assert {len(share) for share in shares} == {3 * accumulation}


# What is fitted before training


def test_chosen_samples_are_a_function_of_the_seed() -> None:
    indices = np.arange(100, 400, 3)
    chosen = choose_samples(indices, max_samples=20, seed=0)
    assert len(np.unique(chosen)) == 20
    assert set(chosen.tolist()) < set(indices.tolist())
    torch.manual_seed(9)
    assert np.array_equal(chosen, choose_samples(indices, max_samples=20, seed=0))
    assert not np.array_equal(np.sort(chosen), np.sort(choose_samples(indices, max_samples=20, seed=1)))
    assert np.array_equal(np.sort(choose_samples(indices, max_samples=100, seed=0)), indices)


# Batches


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return write(tmp_path_factory.mktemp("big"), names(50))


INDICES = np.array([1, 3, 4, 9, 10, 11, 17, 20, 29, 33, 35, 41, 49])


def epochs(
    store: EmbeddingStore, *, workers: int, batch_size: int, seed: int = 0
) -> list[list[dict[str, Any]]]:
    sampler = ShuffledSampler(len(INDICES), seed=seed)
    loader: DataLoader = DataLoader(
        EmbeddingDataset(store, INDICES),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=whole_batch,
        persistent_workers=workers > 0,
    )
    found = []
    for index in (0, 1):
        sampler.set_epoch(index)
        found.append(list(loader))
    return found


def flat(batches: list[dict[str, Any]]) -> list[int]:
    return [index for batch in batches for index in batch["index"]]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_loads_each_sample_once_in_another_order(big: EmbeddingStore, workers: int) -> None:
    first, second = epochs(big, workers=workers, batch_size=5)
    assert [len(batch["index"]) for batch in first] == [5, 5, 3]
    assert sorted(flat(first)) == sorted(flat(second)) == INDICES.tolist()
    assert flat(first) != flat(second)
    assert {batch["epoch"] for batch in first} == {0}
    assert {batch["epoch"] for batch in second} == {1}
    for batch in (*first, *second):
        eva, clip = big.fetch(batch["index"])
        assert torch.equal(batch["eva"], eva)
        assert torch.equal(batch["clip"], clip)
        assert all(type(index) is int for index in batch["index"])


def test_the_order_does_not_depend_on_workers_or_batch_size(big: EmbeddingStore) -> None:
    reference = [flat(batches) for batches in epochs(big, workers=0, batch_size=5)]
    assert [flat(batches) for batches in epochs(big, workers=2, batch_size=4)] == reference
    assert [flat(batches) for batches in epochs(big, workers=0, batch_size=13)] == reference
    assert [flat(batches) for batches in epochs(big, workers=0, batch_size=5, seed=1)] != reference


def test_plain_positions_mean_epoch_zero(big: EmbeddingStore) -> None:
    loader: DataLoader = DataLoader(EmbeddingDataset(big, INDICES), batch_size=4, collate_fn=whole_batch)
    batches = list(loader)
    assert flat(batches) == INDICES.tolist()
    assert {batch["epoch"] for batch in batches} == {0}
    assert torch.equal(torch.cat([batch["clip"] for batch in batches]), big.fetch(INDICES)[1])


def test_one_item_is_a_batch_of_one(big: EmbeddingStore) -> None:
    data = EmbeddingDataset(big, INDICES)
    assert len(data) == len(INDICES)
    batch = data[(6, 2)]
    assert (batch["index"], batch["epoch"]) == ([4], 6)
    assert torch.equal(batch["eva"], big.fetch([4])[0])


# The documented check


def test_the_check_says_and_returns_what_is_in_the_data(
    store: EmbeddingStore, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = dataset.test_blip3o_dataset(store.path)
    eva, clip = (tokens.double().numpy() for tokens in store.fetch(range(23)))
    deviation = clip.reshape(-1, 3).std(axis=0)
    expected = {
        "path": str(store.path),
        "samples": 23,
        "tokens": 4,
        "condition width (eva)": 6,
        "target width (clip)": 3,
        "eva root mean square norm": round(float((eva**2).sum(-1).mean() ** 0.5), 4),
        "clip root mean square norm": round(float((clip**2).sum(-1).mean() ** 0.5), 4),
        "clip channel deviation": f"{deviation.min():.4g} to {deviation.max():.4g}",
    }
    assert facts == expected
    assert capsys.readouterr().out.splitlines() == [f"{name}: {value}" for name, value in expected.items()]


def test_the_documented_import_path_is_the_same_check() -> None:
    from src.modules.datasets import blip3o_dataset

    assert blip3o_dataset.test_blip3o_dataset is dataset.test_blip3o_dataset


@pytest.mark.parametrize("name", ["shard-00003.safetensors", "shard-00003.jsonl"])
def test_the_check_refuses_a_store_with_one_altered_byte(
    store: EmbeddingStore, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = store.path / name
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: its SHA-256 is not the manifest's"):
        dataset.test_blip3o_dataset(store.path)
    assert capsys.readouterr().out == ""


def test_the_check_refuses_a_file_that_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "e.pkl").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"e\.pkl: expected embeddings .* found a text file"):
        dataset.test_blip3o_dataset(tmp_path / "e.pkl")
    with pytest.raises(FileNotFoundError, match=r"none\.pkl"):
        dataset.test_blip3o_dataset(tmp_path / "none.pkl")


def test_noise_is_a_function_of_the_sample(tmp_path: Path) -> None:
    store = write(tmp_path / "store", names(48))
    dataset, noise = EmbeddingDataset(store, np.arange(48)), BatchNoise(5, "training")
    batch = noise.of(dataset.__getitems__([(2, 7), (2, 30)]))
    assert batch["noise"].shape == (2, 4, 3) and batch["u_time"].shape == batch["u_dropout"].shape == (2,)
    expected = stateless_normal([30], (4, 3), seed=5, stream="training noise", counter=2)
    assert torch.equal(batch["noise"][1:], expected)
    assert torch.equal(noise.of(dataset.__getitems__([(2, 30)]))["u_time"], batch["u_time"][1:])
    assert not torch.equal(noise.of(dataset.__getitems__([(3, 30)]))["u_time"], batch["u_time"][1:])
    assert batch["u_time"][0] != batch["u_dropout"][0]


def test_a_repeated_sample_gets_other_noise(tmp_path: Path) -> None:
    """A split smaller than a batch still trains on as many noise samples as the batch has items."""
    dataset = EmbeddingDataset(write(tmp_path / "store", names(3)), np.arange(3))
    noise = BatchNoise(5, "training")
    items = order_of(ShuffledSampler(3, seed=0, global_batch=8), 2)
    batch = dataset.__getitems__(items)
    assert batch["index"] == (batch["index"][:3] * 3)[:8]
    assert batch["repeats"] == [0, 0, 0, 1, 1, 1, 2, 2]
    batch |= noise.of(batch)
    for name in ("noise", "u_time", "u_dropout"):
        assert len(np.unique(batch[name].flatten(1).numpy() if name == "noise" else batch[name], axis=0)) == 8
    for rows in (slice(0, 3), slice(5, 6), slice(7, 8)):  # whatever batch they travel in
        alone = noise.of(dataset.__getitems__(items[rows]))
        assert torch.equal(alone["noise"], batch["noise"][rows])
        assert torch.equal(alone["u_time"], batch["u_time"][rows])
    first = stateless_normal(batch["index"][:3], (4, 3), seed=5, stream="training noise", counter=2)
    assert torch.equal(batch["noise"][:3], first)  # named as ever


@pytest.mark.parametrize(("dtype", "kind"), DTYPES.items())
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_travel_in_the_dtype_of_the_store(
    tmp_path: Path, dtype: str, kind: torch.dtype, workers: int
) -> None:
    eva, clip = torch.randn(9, 4, 6), torch.randn(9, 4, 3)
    with StoreWriter(tmp_path / "s", **SIZES, dtype=dtype, shard_size=4) as writer:
        writer.append(eva, clip, [{"key": str(row)} for row in range(9)])
    store = EmbeddingStore(tmp_path / "s")
    data = EmbeddingDataset(store, np.arange(9))
    loader: DataLoader = DataLoader(
        data,
        batch_size=9,
        sampler=ShuffledSampler(9, seed=0),
        num_workers=workers,
        collate_fn=whole_batch,
    )
    (batch,) = loader
    assert {batch[name].dtype for name in ("eva", "clip")} == {kind}
    assert {tensor.dtype for tensor in BatchNoise(5, "training").of(batch).values()} == {torch.float32}
    for name, tokens in zip(("eva", "clip"), store.fetch(batch["index"]), strict=True):
        assert tokens.dtype == torch.float32  # for everybody else
        assert torch.equal(batch[name].float(), tokens)


def test_a_pickles_batches_travel_as_it_has_them(store: EmbeddingStore, tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "half", **SIZES) as writer:
        writer.append(*store.fetch(range(23)), store.records())
    write_pickle(EmbeddingStore(tmp_path / "half"), tmp_path / "e.pkl")
    pickled = PickledEmbeddings(tmp_path / "e.pkl")
    batch = EmbeddingDataset(pickled, np.arange(23))[4]
    assert batch["eva"].dtype == batch["clip"].dtype == torch.float16
    assert torch.equal(batch["eva"].float(), pickled.fetch([4])[0])


@pytest.fixture(params=[False, True], ids=["small", "large"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """A hundred samples count as too many to hold in memory, or do not."""
    monkeypatch.setattr(dataset, "LARGE", 100 if request.param else 2**25)
    monkeypatch.setattr(dataset, "PIECE", 16)
    return bool(request.param)


def test_a_large_split_is_one_too(large: bool) -> None:
    small = dataset.split_permutation(99, eval_split=0.1, seed=1)
    assert small.train.dtype == np.int64
    split = dataset.split_permutation(1000, eval_split=0.1, seed=1)
    assert split.train.dtype == (np.int32 if large else np.int64)
    assert len(split.eval) == 100 and (np.diff(split.eval) > 0).all() and (np.diff(split.train) > 0).all()
    assert sorted([*split.train, *split.eval]) == list(range(1000))
    wider = dataset.split_permutation(1000, eval_split=150, seed=1)
    assert set(split.eval) < set(wider.eval)
    assert set(dataset.split_permutation(1000, eval_split=0.1, seed=2).eval) != set(split.eval)
    chosen = choose_samples(split.train, max_samples=50, seed=1)
    assert chosen.dtype == np.int64 and len(set(chosen) & set(split.train)) == 50
    assert np.array_equal(np.sort(choose_samples(split.train, max_samples=5000, seed=1)), split.train)


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize(("samples", "batch"), [(500, 32), (5, 32), (96, 16)])
def test_an_order_can_begin_anywhere(large: bool, samples: int, batch: int, window: int | None) -> None:
    if window:
        starts = np.arange(0, samples + 1, max(1, samples // 4))
        sampler = WindowShuffledSampler(starts, window=window, seed=1, global_batch=batch)
    else:
        sampler = ShuffledSampler(samples, seed=1, global_batch=batch)
    sampler.set_epoch(3)
    whole = list(sampler)
    assert len(whole) == len(sampler) and {item[0] for item in whole} == {3}
    assert {item[1] for item in whole} == set(range(sampler.num_samples))
    for first in (0, 1, 15, 16, 17, 33, len(whole) - 1, len(whole)):
        assert list(sampler.items(first)) == whole[first:]
