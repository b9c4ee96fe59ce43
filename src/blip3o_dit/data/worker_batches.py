"""Batches that data-loader processes hand over: through shared memory, or through a pipe where that is short.

Shared memory copies nothing, but a worker that finds it full (containers have 64 MB), or whose socket's path
is too long (a long TMPDIR), hands over nothing, and the training would wait for ever.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

SHARED_MEMORY = "/dev/shm"
# A socket's path has at most 107 bytes; multiprocessing adds about 35 to the temporary folder's.
_MAX_FOLDER = 70
# Batches of each worker that the free memory must hold: two are ahead of the training, by default.
_BATCHES = 4


class _Piped(dict[str, Any]):
    """A batch that is pickled with its bytes, and is an ordinary one where it arrives."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, ({name: _packed(value) for name, value in self.items()},)


def whole_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """Collate function for a dataset whose `__getitems__` returns the whole batch."""
    worker = get_worker_info()
    return batch if worker is None or _can_share(batch, worker.num_workers) else _Piped(batch)


def _can_share(batch: Mapping[str, Any], workers: int) -> bool:
    if len(os.fsencode(tempfile.gettempdir())) > _MAX_FOLDER:
        return False
    try:
        free = os.statvfs(SHARED_MEMORY)
    except OSError:
        return True  # a system whose shared memory is elsewhere
    size = sum(value.nbytes for value in batch.values() if isinstance(value, Tensor))
    return free.f_bavail * free.f_frsize > _BATCHES * workers * size


def _packed(value: Any) -> Any:
    return (value.view(torch.uint8).numpy(), value.dtype) if isinstance(value, Tensor) else value


def _restored(packed: dict[str, Any]) -> dict[str, Any]:
    return {
        name: torch.from_numpy(value[0]).view(value[1]) if isinstance(value, tuple) else value
        for name, value in packed.items()
    }
