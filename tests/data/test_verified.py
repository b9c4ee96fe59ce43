"""A shard is read whole for its checksum once on a machine; what changed since is refused."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from blip3o_dit.data import dataset as dataset_module
from blip3o_dit.data import store as store_module
from blip3o_dit.data import verified
from blip3o_dit.data.dataset import EmbeddingDataset, ShuffledSampler
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.data.worker_batches import whole_batch
from tests.helpers.stores import without_sample_checksums

SHARDS = 6


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of temporary files of its own, and stores that count as old at once.

    Its name is short: loader workers put sockets there, whose names hold a hundred letters.
    """
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(verified.tempfile, "tempdir", folder)
        monkeypatch.setattr(verified, "SETTLED_AFTER", -1.0)
        yield Path(folder)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    eva, clip = (torch.randn(4 * SHARDS, 4, width, generator=generator) for width in (6, 3))
    sizes = dict(num_tokens=4, condition_dim=6, target_dim=3)
    with StoreWriter(tmp_path / "store", **sizes, dtype="float32", shard_size=4) as writer:
        writer.append(eva, clip, [{"key": str(row)} for row in range(4 * SHARDS)])
    return without_sample_checksums(tmp_path / "store")


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """The shards that were read for their checksums since it was asked last, by any process."""
    log, plain = tmp_path / "hashed", verified.sha256

    def sha256(file: Path) -> str:
        with open(log, "a") as lines:  # one write, which no other process comes between
            lines.write(f"{file.name}\n")
        return plain(file)

    for module in (verified, store_module):
        monkeypatch.setattr(module, "sha256", sha256)

    def take() -> list[str]:
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return sorted(name for name in names if name.endswith(".safetensors"))

    return take


def read_all(path: Path) -> None:
    EmbeddingStore(path).fetch(range(4 * SHARDS))


def alter(file: Path) -> None:
    """One bit, and the time of the last change as it was."""
    times, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    time.sleep(0.02)  # a tick of the file system's clock
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_each_shard_is_verified_once_whatever_the_workers(
    path: Path, hashed: Callable[[], list[str]], workers: int
) -> None:
    source = EmbeddingStore(path)
    passes = ShuffledSampler(4 * SHARDS, seed=0)
    loader: DataLoader[Any] = DataLoader(
        EmbeddingDataset(source, np.arange(4 * SHARDS)),
        batch_size=3,
        sampler=passes,
        num_workers=workers,
        collate_fn=whole_batch,
        multiprocessing_context="fork" if workers else None,  # the count goes with it
    )
    for number in (0, 1):
        passes.set_epoch(number)
        assert sum(len(batch["index"]) for batch in loader) == 4 * SHARDS
    assert hashed() == [f"shard-{shard:05d}.safetensors" for shard in range(SHARDS)]


def test_what_another_process_verified_is_not_read_again(path: Path, hashed: Callable[[], list[str]]) -> None:
    read_all(path)
    assert len(hashed()) == SHARDS
    read_all(path)  # nothing of the first store object is left: as in another process
    os.symlink(path, path.with_name("link"))
    read_all(path.with_name("link"))
    assert hashed() == []


def test_a_changed_shard_is_read_again_and_refused(path: Path, hashed: Callable[[], list[str]]) -> None:
    source = EmbeddingStore(path)
    source.fetch(range(4 * SHARDS))
    hashed()
    alter(path / "shard-00002.safetensors")
    source._maps.clear()
    for opened in (source, EmbeddingStore(path)):
        with pytest.raises(ValueError, match=r"shard-00002\.safetensors: its SHA-256 is not the manifest's"):
            opened.fetch(range(4 * SHARDS))
    assert hashed() == ["shard-00002.safetensors"] * 2


def test_a_record_is_of_one_expected_checksum(path: Path, hashed: Callable[[], list[str]]) -> None:
    read_all(path)
    hashed()
    source = EmbeddingStore(path)
    source.manifest["shards"][1]["sha256"] = "0" * 64
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors: its SHA-256"):
        source.fetch(range(4 * SHARDS))
    assert hashed() == ["shard-00001.safetensors"]


def test_a_record_is_not_kept_of_a_file_that_may_still_change_within_a_tick(
    path: Path, hashed: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    monkeypatch.setattr(verified, "SETTLED_AFTER", 60.0)
    for _ in range(2):
        read_all(path)
        assert len(hashed()) == SHARDS
    assert list(temporary.iterdir()) == []


def test_the_store_folder_is_only_read(path: Path, temporary: Path) -> None:
    before = sorted((file.name, file.stat().st_mtime_ns) for file in path.iterdir())
    for file in (*path.iterdir(), path):
        file.chmod(0o555 if file.is_dir() else 0o444)
    try:
        read_all(path)
        assert sorted((file.name, file.stat().st_mtime_ns) for file in path.iterdir()) == before
    finally:
        path.chmod(0o755)
    (directory,) = temporary.iterdir()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert [file.stat().st_mode & 0o777 for file in directory.iterdir()] == [0o600]


@pytest.mark.parametrize("planted", ["open to others", "its file open to others", "a link", "a file"])
def test_records_that_others_could_have_written_are_not_believed(
    path: Path,
    hashed: Callable[[], list[str]],
    temporary: Path,
    planted: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read_all(path)
    hashed()
    verified._say_once.cache_clear()
    (directory,) = temporary.iterdir()
    if planted == "open to others":
        directory.chmod(0o720)
    elif planted == "its file open to others":
        (record,) = directory.iterdir()
        record.chmod(0o620)
    else:
        directory.rename(temporary / "elsewhere")
        directory.symlink_to(temporary / "elsewhere") if planted == "a link" else directory.touch()
    for _ in range(2):
        read_all(path)
    assert len(hashed()) == 2 * SHARDS
    assert caplog.text.count("checksums are taken in every process anew") == 1


def test_another_users_directory_is_not_believed(
    path: Path, hashed: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_all(path)
    hashed()
    directory = verified.directory_of_records()
    monkeypatch.setattr(verified, "directory_of_records", lambda: directory)
    monkeypatch.setattr(verified.os, "geteuid", lambda: os.getuid() + 1)
    read_all(path)
    assert len(hashed()) == SHARDS


def test_never_relies_on_sizes(path: Path, hashed: Callable[[], list[str]]) -> None:
    alter(path / "shard-00002.safetensors")
    EmbeddingStore(path, verify="never").fetch(range(4 * SHARDS))
    assert hashed() == []
    with open(path / "shard-00002.safetensors", "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=r"expected \d+ bytes, found \d+: truncated or altered"):
        EmbeddingStore(path, verify="never")
    with pytest.raises(ValueError, match=r"verify: expected one of \('first', 'never'\), found 'always'"):
        EmbeddingStore(path, verify="always")


def test_a_check_that_was_asked_for_reads_everything(path: Path, hashed: Callable[[], list[str]]) -> None:
    read_all(path)
    hashed()
    dataset_module.test_blip3o_dataset(path)
    assert len(hashed()) == SHARDS
