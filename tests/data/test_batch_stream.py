"""One stream of batches over all epochs: the order of each, a start inside one, and no wait between two."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing import Value
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from blip3o_dit.data.batch_stream import BatchStream, OwnBatches
from blip3o_dit.data.dataset import ShuffledSampler
from blip3o_dit.data.worker_batches import whole_batch
from blip3o_dit.training.metrics import Throughput


class Items(Dataset):
    """Batches that say what was asked for; a worker counts them and may take its time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.read, self.seconds = Value("i", 0), seconds

    def __getitems__(self, items: list[tuple[int, ...]]) -> dict[str, Any]:
        time.sleep(self.seconds)
        with self.read.get_lock():
            self.read.value += 1
        return {"items": items, "epoch": items[0][0], "values": torch.tensor([item[1] for item in items])}


def stream_of(data: Items, *, workers: int = 0, process: int = 0, processes: int = 1) -> BatchStream:
    """21 samples in global batches of 8: three steps an epoch."""
    sampler = ShuffledSampler(21, seed=3, global_batch=8)
    own = OwnBatches(sampler, 8 // processes, process, processes)
    loading = dict(num_workers=workers, collate_fn=whole_batch)
    return BatchStream(data, own, device=torch.device("cpu"), **loading)


def epoch_of(stream: BatchStream, epoch: int) -> list[list[tuple[int, ...]]]:
    stream.epoch = epoch
    return [batch["items"] for batch in stream.in_order()]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_is_the_samplers_whatever_was_read_before(workers: int) -> None:
    expected = []
    for epoch in range(3):
        sampler = ShuffledSampler(21, seed=3, global_batch=8)
        sampler.set_epoch(epoch)
        order = list(sampler)
        expected.append([order[start : start + 8] for start in range(0, 24, 8)])
    stream = stream_of(Items(), workers=workers)
    assert [epoch_of(stream, epoch) for epoch in (0, 1, 2)] == expected
    assert epoch_of(stream, 1) == expected[1]  # another than the next
    stream.epoch = 2
    assert [stream.__getitems__([number])["items"] for number in (1, 2)] == expected[2][1:]  # a resume
    stream.close()


def test_processes_take_the_batches_of_an_epoch_in_turn() -> None:
    for epoch in (0, 1):
        parts = [epoch_of(stream_of(Items(), process=process, processes=2), epoch) for process in (0, 1)]
        together = [first + second for first, second in zip(*parts, strict=True)]
        assert together == epoch_of(stream_of(Items()), epoch)


def wait_for(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_the_next_epoch_is_read_before_it_is_asked_for() -> None:
    data = Items()
    stream = stream_of(data, workers=1)
    epoch_of(stream, 0)
    wait_for(lambda: data.read.value == 3 + 2)  # two batches of the second epoch are ready
    epoch_of(stream, 1)
    wait_for(lambda: data.read.value == 6 + 2)
    stream.close()


def test_nothing_is_read_ahead_without_workers() -> None:
    data = Items()
    epoch_of(stream_of(data), 0)
    assert data.read.value == 3


def test_short_epochs_do_not_wait() -> None:
    """Epochs of three steps of 50 ms on batches that take 60 ms to read, with two workers: starting each
    epoch with nothing read takes half of the time. All of it sleeps: other work here costs little."""
    stream, throughput = stream_of(Items(0.06), workers=2), Throughput(1.0, 1.0)
    for epoch in range(6):
        stream.epoch = epoch
        batches = iter(stream.in_order())
        if epoch == 1:
            throughput.pop()  # the first epoch starts the workers
        for _ in range(3):
            with throughput.waiting():
                next(batches)
            time.sleep(0.05)
    stream.close()
    assert throughput.pop()["data_wait"] < 0.25
