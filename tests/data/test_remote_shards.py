"""Stores at an address: the same samples, read once, in a cache of bounded size."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import fsspec
import pytest
import torch

from blip3o_dit.data import shard_cache
from blip3o_dit.data.embeddings import open_embeddings
from blip3o_dit.data.shard_cache import ShardCache
from blip3o_dit.data.store import EmbeddingStore
from tests.helpers.remote import counted, in_memory
from tests.helpers.stores import without_sample_checksums, write_linear_store

# Bytes of a sample of these stores, and of a store without its tables.
SAMPLE, SAMPLES = 4 * 9 * (12 + 8), 48


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BLIP3O_DIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shards"


@pytest.fixture
def address(tmp_path: Path, cache: Path) -> str:
    write_linear_store(tmp_path / "store")
    return in_memory(tmp_path / "store", tmp_path.name)


def shuffled(epoch: int) -> list[list[int]]:
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(epoch)).tolist()
    return [order[first : first + 8] for first in range(0, SAMPLES, 8)]


def taken(cache: Path) -> int:
    """Bytes of samples in the cache."""
    return SAMPLE * sum(
        file.read_bytes()[-10:].count(b"\1") if file.stat().st_size > 8 * SAMPLE else 0
        for file in cache.glob("*.shard")
    )


@pytest.mark.usefixtures("cache")
def test_the_same_samples_and_records(tmp_path: Path, address: str) -> None:
    here, there = EmbeddingStore(tmp_path / "store"), open_embeddings(address)
    assert isinstance(there, EmbeddingStore) and str(there.path) == address
    wanted = [47, 3, 3, 0, 12, 46, 45]
    for _ in range(2):  # from the address, and from the cache
        for mine, other in zip(here.fetch(wanted), there.fetch(wanted), strict=True):
            assert torch.equal(mine, other)
    assert there.records() == here.records() and there.records([11]) == here.records([11])
    assert there.fingerprint() == here.fingerprint()
    there.verify()
    assert str(EmbeddingStore(Path(address)).path) == address  # which loses a slash
    again = pickle.loads(pickle.dumps(there))
    assert torch.equal(again.fetch([5])[1], here.fetch([5])[1])


def test_what_fits_the_cache_is_read_once(address: str, cache: Path) -> None:
    with counted() as traffic:
        store = EmbeddingStore(address)
        store.fetch(shuffled(0)[0])
        assert traffic.bytes < 8 * SAMPLE + 9_000  # the manifest, and five headers
        for epoch in range(3):
            for batch in shuffled(epoch):
                store.fetch(batch)
        EmbeddingStore(address).fetch(range(SAMPLES))
    assert SAMPLES * SAMPLE <= traffic.bytes < SAMPLES * SAMPLE + 12_000
    assert taken(cache) == SAMPLES * SAMPLE


def test_a_tenth_of_the_store_in_the_cache(
    address: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch reads the store once, less what the cache has room for, however it is shuffled."""
    bound = SAMPLES * SAMPLE // 10
    monkeypatch.setenv("BLIP3O_DIT_CACHE_GB", str(bound / 1e9))
    monkeypatch.setattr(shard_cache, "_size_of", lambda file: 0)  # blocks are larger than these shards
    store, here = EmbeddingStore(address), EmbeddingStore(tmp_path / "store")
    for epoch in range(3):
        with counted() as traffic:
            for batch in shuffled(epoch):
                assert torch.equal(store.fetch(batch)[1], here.fetch(batch)[1])
        assert traffic.bytes <= SAMPLES * SAMPLE + 6_000
    assert traffic.bytes == SAMPLES * SAMPLE - taken(cache)
    assert 0 < taken(cache) <= bound


def test_what_was_not_used_for_longest_goes(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 100_000)
    for number, name in enumerate(("old.shard", "older.table", "new.shard")):
        assert cache.take(30_000)
        used_at = (2_000, 1_000, 9e9)[number]
        os.utime(cache.add(name, 30_000, {0: bytes(30_000)}), (used_at, used_at))
    again = ShardCache(tmp_path / "cache", 100_000)  # finds what is there
    assert again.take(30_000)
    assert sorted(file.name for file in cache.folder.glob("*.*")) == ["new.shard", "old.shard"]
    assert not again.take(80_000)  # what is in use stays
    assert [file.name for file in cache.folder.glob("*.*")] == ["new.shard"]
    assert not again.take(1)  # for a while nobody is asked again


def test_a_shard_that_goes_stays_readable(address: str, cache: Path, tmp_path: Path) -> None:
    store, here = EmbeddingStore(address), EmbeddingStore(tmp_path / "store")
    store.fetch(range(20))
    for file in cache.iterdir():
        file.unlink()
    assert torch.equal(store.fetch(range(30))[0], here.fetch(range(30))[0])
    assert len(list(cache.glob("*.shard"))) == 1


def test_a_damaged_cache_is_read_again(address: str, cache: Path, tmp_path: Path) -> None:
    EmbeddingStore(address).fetch(range(10))
    EmbeddingStore(address).records(range(10))
    (file,), (table,) = cache.glob("*.shard"), cache.glob("*.table")
    content = bytearray(file.read_bytes())
    content[-10 - SAMPLE // 2] ^= 1
    file.write_bytes(content)
    table.write_bytes(b"{}\n" * 10)
    with counted() as traffic:
        store = EmbeddingStore(address)
        found = store.fetch(range(10))
        assert store.records([0])[0]["key"] == "sample-0"
    for mine, other in zip(found, EmbeddingStore(tmp_path / "store").fetch(range(10)), strict=True):
        assert torch.equal(mine, other)
    assert traffic.bytes < 4 * SAMPLE + 5_000


@pytest.mark.parametrize("damage", ["sample", "table", "size", "header"])
@pytest.mark.usefixtures("cache")
def test_an_altered_file_is_refused(address: str, damage: str) -> None:
    memory = fsspec.filesystem("memory")
    name = f"/{address.removeprefix('memory://')}/shard-00001"
    file = name + (".jsonl" if damage == "table" else ".safetensors")
    content = bytearray(memory.cat_file(file))
    if damage == "size":
        content = content[:-1]
    else:
        content[8 if damage == "header" else -1] ^= 1
    memory.pipe_file(file, bytes(content))
    if damage == "size":
        with pytest.raises(
            ValueError, match=rf"^{address}/shard-00001.safetensors: expected \d+ bytes, found"
        ):
            EmbeddingStore(address)
        return
    store = EmbeddingStore(address)
    store.fetch(range(10))
    with pytest.raises(ValueError, match=rf"^{address}/shard-00001.*(altered|not readable|not a readable)"):
        (store.records if damage == "table" else store.fetch)(range(20))
    with pytest.raises(ValueError, match=r"its SHA-256 is not the manifest's: the file was altered$"):
        store.verify()


@pytest.mark.usefixtures("address")
def test_without_checksums_of_samples_shards_come_whole(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = without_sample_checksums(tmp_path / "store")
    address = in_memory(folder, f"{tmp_path.name}-old")
    with counted() as traffic:
        for _ in range(2):
            assert torch.equal(
                EmbeddingStore(address).fetch([1, 11])[0], EmbeddingStore(folder).fetch([1, 11])[0]
            )
    assert 20 * SAMPLE < traffic.bytes < 20 * SAMPLE + 12_000
    memory = fsspec.filesystem("memory")
    file = f"/{tmp_path.name}-old/shard-00002.safetensors"
    memory.pipe_file(file, memory.cat_file(file)[:-1] + b"!")
    with pytest.raises(ValueError, match="the file was altered"):
        EmbeddingStore(address).fetch([21])
    assert len(list(cache.glob("*.shard"))) == 2 and not list(cache.glob("*.part"))
    monkeypatch.setenv("BLIP3O_DIT_CACHE_GB", "0")
    with pytest.raises(ValueError, match=r"expected room for its \d+ bytes .* --verify never$"):
        EmbeddingStore(address).fetch([31])
    assert torch.equal(
        EmbeddingStore(address, verify="never").fetch([31])[0], EmbeddingStore(folder).fetch([31])[0]
    )


def test_a_full_disk_keeps_nothing(
    address: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = EmbeddingStore(address)
    store.fetch([0])
    monkeypatch.setattr(shard_cache.CachedShard, "put", full)
    assert torch.equal(store.fetch([1])[0], store.fetch([1])[0])
    assert "the disk is full" in caplog.text and taken(cache) == SAMPLE


def test_the_bound_is_a_number(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP3O_DIT_CACHE_GB", "much")
    with pytest.raises(ValueError, match=r"^BLIP3O_DIT_CACHE_GB: expected gigabytes, found 'much'$"):
        ShardCache()


@pytest.mark.usefixtures("cache")
def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError,
        match=r"^memory://nowhere: expected an embedding store there, found no",
    ):
        EmbeddingStore("memory://nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text(json.dumps({"format": "another"}))
    with pytest.raises(ValueError, match="expected format 'blip3o-dit embedding store'"):
        open_embeddings(in_memory(tmp_path / "other", f"{tmp_path.name}-other"))
