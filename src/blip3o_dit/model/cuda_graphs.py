"""CUDA graphs: a network call whose kernels are launched together instead of one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip3o_dit.model.encoded_condition import EncodedCondition

logger = logging.getLogger(__name__)

# `NextDiT.predict`: x_t [B, N, C], t [B], encoded condition -> [B, N, C]
Predict = Callable[[Tensor, Tensor, EncodedCondition], Tensor]

WARM_UP_CALLS = 3  # before recording: libraries choose their kernels and take their workspace
MAX_RECORDINGS = 16  # shapes; the one that was used the longest time ago makes room


class GraphedPredict:
    """`predict`, recorded once per shape and replayed; for inference on a CUDA device, that of its inputs.

    A recording reads and writes memory of its own, so inputs are copied in and the output is copied out.
    The encoded condition is copied once, not at every solver step. All recordings share one memory pool for
    what they compute in between: one at a time is replayed, and its output copied before the next.
    """

    def __init__(self, predict: Predict) -> None:
        self._predict = predict
        self._recordings: dict[tuple[Any, ...], _Recording] = {}  # the longest unused one first
        self._pool: Any = None

    def __call__(self, x: Tensor, t: Tensor, encoded: EncodedCondition) -> Tensor:
        with torch.cuda.device(x.device):
            recording = self._recording(x, t, encoded)
            if recording.encoded_from is not encoded:
                for static, given in zip(recording.encoded.tensors(), encoded.tensors(), strict=True):
                    static.copy_(given)
                recording.encoded_from = encoded
            recording.x.copy_(x)
            recording.t.copy_(t)
            recording.graph.replay()
            return recording.output.clone()

    def _recording(self, x: Tensor, t: Tensor, encoded: EncodedCondition) -> _Recording:
        """The recording for these shapes."""
        key = (x.device, x.dtype, *((held.shape, held.dtype) for held in (x, *encoded.tensors())))
        recording = self._recordings.pop(key, None)
        if recording is None:
            if len(self._recordings) == MAX_RECORDINGS:
                del self._recordings[next(iter(self._recordings))]
            logger.info("recording a CUDA graph for a batch of %d: the first call takes longer", len(x))
            recording = self._record(x, t, encoded)
        self._recordings[key] = recording
        return recording

    def _record(self, x: Tensor, t: Tensor, encoded: EncodedCondition) -> _Recording:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        x, t, own = x.clone(), t.clone(), encoded.clone()
        current, aside = torch.cuda.current_stream(x.device), torch.cuda.Stream(x.device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_CALLS):
                self._predict(x, t, own)
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=aside):
            output = self._predict(x, t, own)
        return _Recording(graph, x, t, own, output, encoded)


@dataclass
class _Recording:
    """The graph, the memory it works in, and whose condition that memory holds."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    t: Tensor
    encoded: EncodedCondition
    output: Tensor
    encoded_from: EncodedCondition
