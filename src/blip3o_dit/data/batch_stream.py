"""The batches of all epochs as one stream, which reads ahead over an epoch's end.

A `DataLoader` that is iterated once an epoch starts each one with nothing read; short epochs on a fast device
then wait for a tenth of their time or more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from blip3o_dit.data.dataset import ShuffledSampler


@dataclass(eq=False)
class OwnBatches(Sampler):
    """What one process takes of an epoch's batches, and then of the next epoch's, without end.

    Batch n of an epoch is batch n * processes + process of its sampler, which holds whole global batches.

    Args:
        epoch, first: where it begins; `first` counts batches of this process.
    """

    sampler: ShuffledSampler
    batch_size: int
    process: int = 0
    processes: int = 1
    epoch: int = 0
    first: int = 0

    def in_an_epoch(self) -> int:
        return len(self.sampler) // (self.batch_size * self.processes)

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        first = self.first
        for epoch in count(self.epoch):
            self.sampler.set_epoch(epoch)
            rest: Any = self.sampler.items(first * self.processes * self.batch_size)
            everyones = BatchSampler(rest, self.batch_size, drop_last=True)
            yield from islice(everyones, self.process, None, self.processes)
            first = 0


class BatchStream(Dataset):
    """Batch n of the epoch `epoch` as item n, on `device`, for a `DataLoader` without workers.

    The batches come from a loader of their own, with its workers, which goes on from batch to batch and from
    epoch to epoch. Asked for another batch than the next one, as after a resume, it begins again there.

    Args:
        loading: how the batches of `dataset` are read, as `DataLoader` takes it.
    """

    def __init__(self, dataset: Dataset, own: OwnBatches, *, device: torch.device, **loading: Any) -> None:
        self.epoch = 0
        self._dataset, self._own, self._device, self._loading = dataset, own, device, loading
        self._ahead: Iterator[dict[str, Any]] | None = None
        self._next = (0, 0)  # epoch and number of the batch that comes next in it

    def __len__(self) -> int:
        return self._own.in_an_epoch()

    def __getitems__(self, numbers: list[int]) -> dict[str, Any]:
        (number,) = numbers
        if self._ahead is None or self._next != (self.epoch, number):
            self.close()
            self._own.epoch, self._own.first = self.epoch, number
            self._ahead = iter(DataLoader(self._dataset, batch_sampler=self._own, **self._loading))
        batch = next(self._ahead)
        last = number + 1 == len(self)
        self._next = (self.epoch + 1, 0) if last else (self.epoch, number + 1)
        return {name: self._moved(value) for name, value in batch.items()}

    def close(self) -> None:
        """End the workers."""
        self._ahead = None

    def in_order(self) -> DataLoader:
        """A loader of one epoch's batches: of `epoch`, as it is when they are asked for."""
        return DataLoader(self, batch_size=1, collate_fn=_itself)  # type: ignore[arg-type]

    def _moved(self, value: Any) -> Any:
        return value.to(self._device, non_blocking=True) if isinstance(value, Tensor) else value


def _itself(batch: dict[str, Any]) -> dict[str, Any]:
    return batch
