"""Scale: a store of 100 million samples in 200,000 shards, imitated, up to the first batches of a training.

All shards are the same few files under many names, 500 tiny samples each: manifest, sizes of files, split,
held-back samples, order and places are those of a real store. Everything runs in one process; `peak GiB` is
the most memory it has had until then, importing and writing the store (the first row) among it.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import Row
from blip3o_dit.data.batch_stream import OwnBatches
from blip3o_dit.data.dataset import (
    EmbeddingDataset,
    choose_samples,
    hold_back,
    split_samples,
    training_sampler,
)
from blip3o_dit.data.manifest import write_manifest
from blip3o_dit.data.shard_writer import write_shard
from blip3o_dit.data.store import EmbeddingStore

SIZES = TOKENS, CONDITION, TARGET = 4, 8, 8
NAMES_OF_A_FILE = 20_000  # as file systems allow
BATCH, SEED = 32, 42


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", type=int, default=200_000)
    parser.add_argument("--shard_samples", type=int, default=500)


def run(arguments: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []

    def timed(step: str, work: Callable[[], Any]) -> Any:
        began, busy = time.perf_counter(), time.process_time()
        found = work()
        row: Row = {"step": step, "seconds": time.perf_counter() - began}
        row |= {"processor": time.process_time() - busy, "peak GiB": _peak()}
        rows.append(row)
        return found

    with tempfile.TemporaryDirectory() as folder:
        timed("written", lambda: write_store(Path(folder), arguments.shards, arguments.shard_samples))
        store = timed("opened", lambda: EmbeddingStore(folder))
        rule: dict[str, Any] = {
            "eval_split": 0.1,
            "seed": SEED,
            "split_by": "permutation",
            "group_pattern": "",
        }
        split = timed("split", lambda: split_samples(store, **rule))
        split = timed("held back", lambda: hold_back(store, split, **rule))
        chosen = timed("chosen for statistics", lambda: _choose(split.train))
        timed("first sixteen of them", lambda: store.unverified().fetch(chosen[:16]))
        dataset = EmbeddingDataset(store, split.train)
        middle = len(dataset) // (2 * BATCH)
        for shuffle in ("exact", "window"):
            sampler = training_sampler(dataset, shuffle=shuffle, window=4096, seed=SEED, global_batch=BATCH)
            for what, first in (("first batch", 0), ("first batch of a run continued halfway", middle)):
                own = OwnBatches(copy.copy(sampler), BATCH, epoch=1, first=first)
                timed(f"{what}, {shuffle} order", lambda own=own: dataset.__getitems__(next(iter(own))))
    return rows


def _choose(train: np.ndarray) -> np.ndarray:
    return choose_samples(train, max_samples=10_000, seed=SEED)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write_store(folder: Path, shards: int, samples: int) -> None:
    """A store whose shards are copies of one, by links."""
    generator = torch.Generator().manual_seed(0)
    eva, clip = (torch.randn(samples, TOKENS, width, generator=generator) for width in (CONDITION, TARGET))
    lines = [json.dumps({"key": str(number)}) for number in range(samples)]
    entries: list[dict[str, Any]] = []
    for number in range(shards):
        if number % NAMES_OF_A_FILE == 0:
            first = write_shard(folder, number, eva, clip, lines)
            entries.append(first)
            continue
        names = {"file": f"shard-{number:06}.safetensors", "table": f"shard-{number:06}.jsonl"}
        os.link(folder / first["file"], folder / names["file"])
        entries.append(first | names)
    write_manifest(folder, SIZES, "float32", entries, {})
