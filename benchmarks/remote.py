"""A store at an address: what an epoch reads from there, by samples as we do and by whole shards, counted.

The bytes by samples are those that `RemoteFolder` got in the epoch; those by shards are counted from the same
order of samples, for a cache that keeps the shards used last.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import torch

from benchmarks.measure import Row
from blip3o_dit.data.dataset import EmbeddingDataset, training_sampler
from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.utils.addresses import RemoteFolder

SIZES = dict(num_tokens=16, condition_dim=64, target_dim=32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--shards", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.1, 1.0], help="of the store in the cache"
    )


def run(arguments: argparse.Namespace) -> list[Row]:
    return list(_rows(arguments))


def _rows(arguments: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        here = _written(Path(folder) / "store", arguments.samples, arguments.samples // arguments.shards)
        files = fsspec.filesystem("memory")
        for file in here.path.iterdir():
            files.pipe_file(f"/benchmark/{file.name}", file.read_bytes())
        size = sum(shard["bytes"] for shard in here.manifest["shards"])
        for share in arguments.shares:
            for shuffle in ("exact", "window"):
                os.environ["BLIP3O_DIT_CACHE"] = f"{folder}/cache-{share}-{shuffle}"
                os.environ["BLIP3O_DIT_CACHE_GB"] = str(1.1 * share * size / 1e9)
                there = EmbeddingStore("memory://benchmark")
                kept: OrderedDict[int, None] = OrderedDict()
                for epoch in (0, 1):
                    order = _order(there, shuffle, epoch, arguments.batch)
                    got, seconds = _read(there, order)
                    shards = _shards_read(there, order, int(share * arguments.shards), kept)
                    yield {
                        "measured": f"{len(there)} samples, {arguments.shards} shards, {shuffle} order",
                        "cache / store": share,
                        "epoch": epoch,
                        "by samples / store": got / size,
                        "by shards / store": shards / arguments.shards,
                        "samples/s": len(there) / seconds,
                        "samples/s, disk": len(there) / _read(here, order)[1],
                    }


def _written(path: Path, samples: int, shard_size: int) -> EmbeddingStore:
    with StoreWriter(path, **SIZES, shard_size=shard_size) as writer:
        eva = torch.randn(samples, SIZES["num_tokens"], SIZES["condition_dim"])
        clip = torch.randn(samples, SIZES["num_tokens"], SIZES["target_dim"])
        writer.append(eva, clip, [{"key": str(i)} for i in range(samples)])
    return EmbeddingStore(path)


def _order(store: EmbeddingStore, shuffle: str, epoch: int, batch: int) -> list[list[int]]:
    dataset = EmbeddingDataset(store, np.arange(len(store)))
    sampler = training_sampler(dataset, shuffle=shuffle, window=len(store) // 20, seed=0)
    sampler.set_epoch(epoch)
    samples = [item[1] for item in sampler]
    return [samples[first : first + batch] for first in range(0, len(samples), batch)]


def _read(store: EmbeddingStore, order: list[list[int]]) -> tuple[int, float]:
    """Bytes that came from the address, and seconds."""
    got, own = 0, RemoteFolder._ranges

    def counting(self: RemoteFolder, files: object, wanted: list[tuple[str, int, int]]) -> list[bytes]:
        nonlocal got
        found = own(self, files, wanted)
        got += sum(map(len, found))
        return found

    RemoteFolder._ranges = counting  # type: ignore[method-assign,assignment]
    began = time.perf_counter()
    for batch in order:
        store.fetch_stored(batch)
    RemoteFolder._ranges = own  # type: ignore[method-assign]
    return got, time.perf_counter() - began


def _shards_read(
    store: EmbeddingStore, order: list[list[int]], room: int, kept: OrderedDict[int, None]
) -> int:
    """Shards that a cache with room for so many would read, the least recently used going first."""
    read = 0
    for batch in order:
        for shard in np.unique(np.searchsorted(store.shard_starts, batch, side="right") - 1).tolist():
            read += shard not in kept
            kept[shard] = None
            kept.move_to_end(shard)
            while len(kept) > room:
                kept.popitem(last=False)
    return read
