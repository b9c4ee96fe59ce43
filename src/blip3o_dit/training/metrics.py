"""What a log line says of training: metrics of the steps, and how fast they were.

The metrics are summed on the device, so that no step between two log lines waits for it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_dit.flow.loss import BLIP3oFlowMatchingLoss, LossOutput
from blip3o_dit.flow.path import AffineSource, PathSample
from blip3o_dit.flow.predictions import convert_prediction
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.training.config import TrainingConfig

# One backward pass forms two products for each one of the forward pass.
PASSES_PER_STEP = 3


class TrainingMetrics:
    """Sums of step quantities, on the device of the step.

    * `flow_matching_loss`, `regularization_loss`: the parts of the loss.
    * `cosine_similarity`, `l2_distance`: per token, between the data x_1 and the estimate of it that one
      network call makes from x_t; in the network's (standardised) units.
    * `r2`: of the same estimate, 1 - sum (estimate - x_1)^2 / sum (x_1 - mean)^2 over tokens and channels;
      the mean is the training split's of each channel. Times are those of training: an estimate from a
      point near the data is nearly right, so that this lies above the `r2` of generated tokens.
    * `snr_db`: 10 log10 (|v|^2 / |v_hat - v|^2), the velocity over the error of its prediction.
    * `output_norm`: root mean square of the raw network output.
    """

    names = (
        "flow_matching_loss",
        "regularization_loss",
        "cosine_similarity",
        "l2_distance",
        "velocity_power",
        "velocity_error",
        "output_power",
        "estimate_error",
        "target_spread",
    )

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._count = 0

    @torch.no_grad()
    def add(
        self,
        loss_fn: BLIP3oFlowMatchingLoss,
        sample: PathSample,
        source: AffineSource,
        prediction: Tensor,
        output: LossOutput,
        mean: Tensor | None = None,
    ) -> None:
        """Take in one step; prediction [B, N, C], and the training split's mean in the network's units [C]
        (None: 0)."""
        prediction = prediction.detach().float()
        kind, path = loss_fn.prediction_type, loss_fn.path
        x_1, velocity = (
            convert_prediction(prediction, sample.x_t, sample.t, path, from_type=kind, to_type=wanted)
            for wanted in ("sample", "v_prediction")
        )
        estimate, target = source.from_flow(x_1), source.from_flow(sample.x_1)
        difference = estimate - target
        values = torch.stack(
            [
                output.flow_matching_loss.detach(),
                output.regularization_loss.detach(),
                F.cosine_similarity(estimate, target, dim=-1).mean(),
                difference.norm(dim=-1).mean(),
                sample.velocity.square().mean(),
                (velocity - sample.velocity).square().mean(),
                prediction.square().mean(),
                difference.square().mean(),
                (target if mean is None else target - mean).square().mean(),
            ]
        )
        self._sums = values if self._sums is None else self._sums + values
        self._count += 1

    @property
    def sums(self) -> tuple[Tensor | None, int]:
        """Sums and count, which can be set to what they were."""
        return self._sums, self._count

    @sums.setter
    def sums(self, before: tuple[Tensor | None, int]) -> None:
        self._sums, self._count = before

    @property
    def state(self) -> tuple[list[float], int] | None:
        """Sums and count, for a checkpoint; without those at the end that are unknown."""
        if self._sums is None:
            return None
        sums = self._sums.tolist()
        while sums and math.isnan(sums[-1]):
            sums.pop()
        return sums, self._count

    def restore(self, state: tuple[list[float], int] | None, device: torch.device) -> None:
        """Continue from `state`."""
        self._sums, self._count = None, 0
        if state is not None:
            # An older checkpoint has fewer sums: what needs the others is unknown until the next log line.
            unknown = [float("nan")] * (len(self.names) - len(state[0]))
            self._sums, self._count = torch.tensor(state[0] + unknown, device=device), state[1]

    def pop(self) -> Tensor | None:
        """Means since the last call, [len(names)], or None when there was no step."""
        means = None if self._sums is None else self._sums / self._count
        self._sums, self._count = None, 0
        return means

    @classmethod
    def log_entries(cls, means: Tensor) -> dict[str, float]:
        """Means, perhaps averaged over processes -> what is logged."""
        *plain, power, error, output_power, estimate_error, spread = means.double().cpu()
        logged = {name: float(value) for name, value in zip(cls.names, plain, strict=False)}
        logged["snr_db"] = float(10.0 * torch.log10(power / error))
        logged["r2"] = float(1.0 - estimate_error / spread)
        logged["output_norm"] = float(output_power.sqrt())
        return logged


class Throughput:
    """Counts samples and seconds between two log lines; `rate` is the device's measured FLOP per second.

    On a GPU (`on_gpu`) it waits for data while its own time passes and nothing is computed: the loop that
    fetches a batch may be ahead of it, or wait for it.
    """

    def __init__(self, flops_per_sample: float, rate: float, *, on_gpu: bool = False) -> None:
        self._flops, self._rate, self._on_gpu = flops_per_sample, rate, on_gpu
        self._paused = False
        self._start()

    def count(self, samples: int) -> None:
        self._samples += samples

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the fetching of what an optimizer step takes."""
        self._steps += 1
        if self._on_gpu:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            yield
            after.record()
            self._fetches.append((before, after))
            return
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def _waited_on_gpu(self) -> float:
        """Seconds from the end of what was asked for before a batch was fetched to the first moment after."""
        if self._fetches:
            self._fetches[-1][1].synchronize()
        return sum(before.elapsed_time(after) for before, after in self._fetches) / 1000

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is not training: evaluations, checkpoints, curves. May be nested."""
        nested, self._paused = self._paused, True
        if not nested:
            self._pause_began = time.perf_counter()
        try:
            yield
        finally:
            self._paused = nested
            if not nested:
                self._apart += time.perf_counter() - self._pause_began

    def pop(self, processes: int = 1) -> dict[str, float]:
        """What is logged since the last call: all processes' samples/s, a step's seconds, MFU in [0, 1], the
        share of waiting."""
        seconds = time.perf_counter() - self._started - self._apart
        per_second = self._samples / seconds
        logged = {
            "samples_per_second": per_second * processes,
            "seconds_per_step": seconds / max(1, self._steps),
            "mfu": per_second * self._flops / self._rate,
            "data_wait": (self._waited_on_gpu() if self._on_gpu else self._waited) / seconds,
        }
        self._start()
        return logged

    def _start(self) -> None:
        self._started = self._pause_began = time.perf_counter()
        self._samples, self._steps, self._waited, self._apart = 0, 0, 0.0, 0.0
        self._fetches: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []


def measure_throughput(
    model: BLIP3oDiTModel, config: TrainingConfig, device: torch.device, passes: float = PASSES_PER_STEP
) -> Throughput:
    """A `Throughput` for this run, for which the device's arithmetic is measured; a step takes as long as so
    many forward passes."""
    dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else model.compute_dtype
    rate = matmul_rate(model.config, config.batch_size, device, dtype)
    return Throughput(passes * forward_flops(model.config), rate, on_gpu=device.type == "cuda")


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
    # Products of constants are up to 13 % faster on a GPU.
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, d, device=device, generator=generator).to(dtype)
    weight = torch.randn(2 * ffn, d, device=device, generator=generator).to(dtype)
    seconds = []
    for _ in range(6):
        synchronize(device)
        started = time.perf_counter()
        F.linear(x, weight)
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2.0 * rows * d * 2 * ffn / sorted(seconds[1:])[2]


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
