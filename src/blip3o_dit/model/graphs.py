"""CUDA graphs: a network call whose kernels are launched together instead of one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip3o_dit.model.nextdit import EncodedCondition

logger = logging.getLogger(__name__)

Predict = Callable[[Tensor, Tensor, EncodedCondition], Tensor]
"""`NextDiT.predict`: x_t [B, N, C], t [B], encoded condition -> [B, N, C]"""

WARM_UP_CALLS = 3  # before recording: libraries choose their kernels and take their workspace


class GraphedPredict:
    """`predict`, recorded once per shape and replayed; for inference on a CUDA device.

    A recording reads and writes memory of its own, so inputs are copied in and the output is copied out.
    The encoded condition is copied once, not at every solver step.
    """

    def __init__(self, predict: Predict) -> None:
        self._predict = predict
        self._recordings: dict[tuple[Any, ...], _Recording] = {}

    def __call__(self, x: Tensor, t: Tensor, encoded: EncodedCondition) -> Tensor:
        key = (x.shape, x.dtype, encoded.pooled.shape, *(tensor.shape for tensor in encoded.keys_values[0]))
        if key not in self._recordings:
            logger.info("recording a CUDA graph for a batch of %d: the first call takes longer", len(x))
            self._recordings[key] = self._record(x, t, encoded)
        recording = self._recordings[key]
        if recording.encoded_from is not encoded:
            for static, given in zip(recording.encoded.tensors(), encoded.tensors(), strict=True):
                static.copy_(given)
            recording.encoded_from = encoded
        recording.x.copy_(x)
        recording.t.copy_(t)
        recording.graph.replay()
        return recording.output.clone()

    def _record(self, x: Tensor, t: Tensor, encoded: EncodedCondition) -> _Recording:
        x, t, own = x.clone(), t.clone(), encoded.clone()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_CALLS):
                self._predict(x, t, own)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
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
