"""CUDA graphs: a computation whose kernels are launched together instead of one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_RECORDINGS = 16  # the one that was used the longest time ago makes room


class CUDAGraphs:
    """Runs functions of tensors on a CUDA device: the first time plainly, then recorded, then replayed.

    The first run shows libraries what to prepare, and costs nothing that is used only once. A recording reads
    and writes memory of its own, so inputs are copied in, from wherever they are, and the output is copied
    out: that is all that is left to do outside of it. All recordings share
    one memory pool for what they compute in between: one at a time is replayed, and its output copied before
    the next.
    """

    def __init__(self) -> None:
        self._recordings: dict[Hashable, _Recording | None] = {}  # the longest unused one first
        self._pool: Any = None

    def run(
        self,
        function: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        device: torch.device,
        key: tuple[Hashable, ...],
    ) -> Tensor:
        """function(*inputs), the inputs brought to the device. What else the result depends on is in the key.

        The function must not copy between devices, or wait for the GPU.
        """
        with torch.cuda.device(device):
            shapes = tuple((held.shape, held.dtype) for held in inputs)
            key = (device, shapes, key)
            seen, recording = key in self._recordings, self._recordings.pop(key, None)
            if not seen:
                if len(self._recordings) == MAX_RECORDINGS:
                    del self._recordings[next(iter(self._recordings))]
                self._recordings[key] = None
                return function(*(held.to(device) for held in inputs))
            self._recordings[key] = recording = recording or self._record(function, inputs, device)
            return recording.replay(inputs)

    def _record(
        self, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], device: torch.device
    ) -> _Recording:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        logger.info("recording a CUDA graph for a batch of %d", len(inputs[0]))
        own = tuple(held.to(device, copy=True) for held in inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = function(*own)
        return _Recording(graph, own, output)


@dataclass
class _Recording:
    """The graph, and the memory that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output.clone()
