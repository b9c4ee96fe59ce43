"""How fast a run is: samples per second, the share of the machine's arithmetic it uses, the wait for data."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from blip3o_dit.model.config import BLIP3oDiTConfig

# One backward pass forms two products for each one of the forward pass.
PASSES_PER_STEP = 3


def forward_flops(config: BLIP3oDiTConfig, condition_tokens: int | None = None) -> float:
    """Floating point operations of one network call for one sample: 2 per weight and token, and attention's.

    Norms, activations and rotations are not counted, nor what gradient checkpointing computes again, as in
    PaLM's definition of model FLOPs utilization (Chowdhery et al., arXiv 2204.02311, appendix B).
    """
    d, kv, ffn, time_dim = config.model_dim, config.kv_dim, config.ffn_dim, config.time_embed_dim
    n = config.num_tokens
    length = n if condition_tokens is None else condition_tokens
    assert ffn is not None  # the configuration fills it in
    per_target = 3 * d * d + 2 * d * kv + 3 * d * ffn  # both queries, output; keys and values; SwiGLU
    layer = 2 * n * per_target + 2 * length * 2 * d * kv + 2 * time_dim * 4 * d
    attention = 4 * n * (n + length) * d
    ends = 2 * length * (config.eva_embedding_size * d + d * d) + 2 * n * 2 * config.in_channels * d
    return float(config.num_layers * (layer + attention) + ends)


def matmul_rate(config: BLIP3oDiTConfig, batch_size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second of the network's largest product here, the median of five."""
    rows, d, ffn = batch_size * config.num_tokens, config.model_dim, config.ffn_dim
    assert ffn is not None
    x = torch.ones(rows, d, device=device, dtype=dtype)
    weight = torch.ones(2 * ffn, d, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        _synchronize(device)
        started = time.perf_counter()
        F.linear(x, weight)
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2.0 * rows * d * 2 * ffn / sorted(seconds[1:])[2]


class Throughput:
    """Counts samples and seconds between two log lines.

    Args:
        flops_per_sample: of a training step.
        rate: the device's measured floating point operations per second.
    """

    def __init__(self, flops_per_sample: float, rate: float) -> None:
        self._flops, self._rate = flops_per_sample, rate
        self._paused = False
        self._start()

    def count(self, samples: int) -> None:
        self._samples += samples

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the fetching of a batch."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is not training: evaluations and checkpoints. May be nested."""
        if self._paused:
            yield
            return
        started, self._paused = time.perf_counter(), True
        try:
            yield
        finally:
            self._apart += time.perf_counter() - started
            self._paused = False

    def pop(self, processes: int = 1) -> dict[str, float]:
        """What is logged since the last call: all processes' samples/s, MFU in [0, 1], share of waiting."""
        seconds = time.perf_counter() - self._started - self._apart
        mine = self._samples / seconds
        logged = {
            "samples_per_second": mine * processes,
            "mfu": mine * self._flops / self._rate,
            "data_wait": self._waited / seconds,
        }
        self._start()
        return logged

    def _start(self) -> None:
        self._started = time.perf_counter()
        self._samples, self._waited, self._apart = 0, 0.0, 0.0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
