"""Loading: how fast samples come out of a store, in how much memory, and how soon.

Writes a store of 64 x 1280 and 64 x 768 float16 tokens (0.26 MB a sample) and a second one of its first
eighth, then reads them, each time in a fresh process, as training does. A pass is one epoch through the
loader alone, in batches of 32. The first verifies checksums, the second finds what the first left in the page
cache, and before the third the store is dropped from the page cache (as far as no process maps it).

Short epochs are the training's own stream of batches (`data/batch_stream.py`) beside a step that sleeps, 37.6
ms for 32 samples (850 a second): the share of waiting, in epochs of 15 steps after the first.

Start-up is importing aside: opening, the split, the statistics of 1,000 samples, the first batch. A shard is
read whole, for its checksum, before its first sample is trained on: the first batch waits for at most 32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing
from torch.utils.data import DataLoader

from benchmarks.measure import Row
from blip3o_dit.data.batch_stream import BatchStream, OwnBatches
from blip3o_dit.data.choices import SHUFFLES
from blip3o_dit.data.dataset import (
    EmbeddingDataset,
    choose_samples,
    split_samples,
    training_sampler,
)
from blip3o_dit.data.embeddings import open_embeddings
from blip3o_dit.data.manifest import write_manifest
from blip3o_dit.data.shard_writer import write_shard
from blip3o_dit.data.statistics import streamed_statistics
from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.data.worker_batches import whole_batch
from blip3o_dit.training.metrics import Throughput

SIZES = TOKENS, CONDITION, TARGET = 64, 1280, 768
BYTES_PER_SAMPLE = 2 * TOKENS * (CONDITION + TARGET)
SHARD = 2**28 // BYTES_PER_SAMPLE
BATCH, WINDOW, SEED = 32, 4096, 0
STATISTICS = 1000
STEP_SECONDS, EPOCHS = 0.0376, 4
SHORT = "short epochs"
PASSES = ("first pass", "second pass", "pass from disk")


def write_store(path: Path, samples: int) -> None:
    """A few random samples over and over, in another order in every shard, as drawing all would take long."""
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    few = [torch.randn(64, TOKENS, width, generator=generator).half() for width in (CONDITION, TARGET)]
    shards = []
    for start in range(0, samples, SHARD):
        count = min(SHARD, samples - start)
        rows = torch.randint(len(few[0]), (count,), generator=generator)
        lines = [json.dumps({"key": str(start + row)}) for row in range(count)]
        shards.append(write_shard(path, len(shards), few[0][rows], few[1][rows], lines))
    write_manifest(path, SIZES, "float16", shards, {})


def write_part(path: Path, store: EmbeddingStore, shards: int) -> None:
    """The first shards of a store as a store of their own, on the same bytes."""
    path.mkdir()
    entries = store.manifest["shards"][:shards]
    for entry in entries:
        for name in (entry["file"], entry["table"]):
            os.link(store.path / name, path / name)
    write_manifest(path, SIZES, "float16", entries, {})


def drop_from_page_cache(folder: Path) -> None:
    """Works without privileges on pages that are written back and not mapped."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_mib(process: int | str) -> float:
    """The most resident memory (anonymous and mapped files) that the process has had, in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def loader_of(data: EmbeddingDataset, shuffle: str, workers: int) -> tuple[Any, DataLoader]:
    """As the Trainer builds it, without what moves batches to a device."""
    sampler = training_sampler(data, shuffle=shuffle, window=WINDOW, seed=SEED)
    loader: DataLoader = DataLoader(
        data,
        batch_size=BATCH,
        sampler=sampler,
        num_workers=workers,
        collate_fn=whole_batch,
        persistent_workers=workers > 0,
    )
    return sampler, loader


def measure_passes(path: Path, shuffle: str, workers: int) -> list[Row]:
    source = open_embeddings(path)
    indices = np.arange(source.num_samples)
    sampler, loader = loader_of(EmbeddingDataset(source, indices), shuffle, workers)
    rows = []
    for number, name in enumerate(PASSES):
        if name == "pass from disk":
            drop_from_page_cache(path)
        sampler.set_epoch(number)
        started = time.perf_counter()
        read = sum(len(batch["index"]) for batch in loader)
        seconds = time.perf_counter() - started
        assert read == source.num_samples
        children = [peak_mib(child.pid) for child in torch.multiprocessing.active_children() if child.pid]
        rows.append(
            {
                "measured": name,
                "samples": source.num_samples,
                "shuffle": shuffle,
                "workers": workers,
                "samples_per_second": read / seconds,
                "mb_per_second": read * BYTES_PER_SAMPLE / seconds / 1e6,
                "peak_mib": peak_mib("self"),
                "worker_peak_mib": max(children, default=0.0),
            }
        )
    return rows


def measure_short_epochs(path: Path) -> list[Row]:
    source, workers = open_embeddings(path), 2
    data = EmbeddingDataset(source, np.arange(min(source.num_samples, 15 * BATCH)))
    own = OwnBatches(
        training_sampler(data, shuffle="exact", window=WINDOW, seed=SEED, global_batch=BATCH), BATCH
    )
    loading = {"num_workers": workers, "collate_fn": whole_batch}
    stream = BatchStream(data, own, device=torch.device("cpu"), **loading)
    waiting = Throughput(1.0, 1.0)
    for epoch in range(EPOCHS + 1):
        stream.epoch = epoch
        batches = iter(stream.in_order())
        if epoch == 1:
            waiting.pop()  # the first verified checksums and started the workers
        for _ in range(len(stream)):
            with waiting.waiting():
                next(batches)
            waiting.count(BATCH)
            time.sleep(STEP_SECONDS)
    stream.close()
    found = waiting.pop()
    row: Row = {"measured": SHORT, "samples": len(data), "workers": workers, "steps": len(stream)}
    return [row | {name: found[name] for name in ("samples_per_second", "data_wait")}]


def measure_start(path: Path, shuffle: str) -> list[Row]:
    drop_from_page_cache(path)
    times = [time.perf_counter()]
    source = open_embeddings(path)
    times.append(time.perf_counter())
    split = split_samples(source, eval_split=0.1, seed=SEED)
    times.append(time.perf_counter())
    assert isinstance(source, EmbeddingStore)
    chosen = choose_samples(split.train, max_samples=STATISTICS, seed=SEED)
    streamed_statistics(source.unverified(), chosen, normalize=False)
    times.append(time.perf_counter())
    next(iter(loader_of(EmbeddingDataset(source, split.train), shuffle, 0)[1]))
    times.append(time.perf_counter())
    names = ("open_seconds", "split_seconds", "statistics_seconds", "first_batch_seconds")
    row: Row = {"measured": "start", "samples": source.num_samples, "shuffle": shuffle}
    return [row | dict(zip(names, np.diff(times).tolist(), strict=True))]


def in_a_fresh_process(*words: str) -> list[Row]:
    command = [sys.executable, "-m", "benchmarks", "loading", "--rows", "--measure", *words]
    with tempfile.TemporaryDirectory() as own:  # where nothing says that a shard was verified before
        environment = os.environ | {"TMPDIR": own}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--folder", type=Path, help="for the stores (default: a temporary folder)")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)  # what a fresh process does


def run(arguments: argparse.Namespace) -> list[Row]:
    if arguments.measure:
        path, shuffle, *workers = arguments.measure
        if workers:
            return measure_passes(Path(path), shuffle, int(workers[0]))
        return measure_short_epochs(Path(path)) if shuffle == SHORT else measure_start(Path(path), shuffle)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        whole, part = Path(folder) / "whole", Path(folder) / "part"
        write_store(whole, max(1, round(arguments.gigabytes * 1e9 / BYTES_PER_SAMPLE)))
        store = EmbeddingStore(whole)
        write_part(part, store, -(-len(store.manifest["shards"]) // 8))
        rows = [row for path in (part, whole) for s in SHUFFLES for row in in_a_fresh_process(str(path), s)]
        for shuffle in SHUFFLES:
            for workers in "02":
                rows += in_a_fresh_process(str(whole), shuffle, workers)
        rows += in_a_fresh_process(str(part), SHORT)
    return rows
