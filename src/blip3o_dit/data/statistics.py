"""Per-channel mean and standard deviation of a split, in one streamed pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_dit.data.checks import non_finite_samples
from blip3o_dit.data.embeddings import Embeddings, batches

# A channel that never varies must come back as its constant: its generated deviation from the mean is
# scaled by this share of the median deviation of those that vary.
FLOOR = 1e-5


@dataclass(frozen=True)
class ChannelStatistics:
    """`mean` and `std` [C], float32; `rms_norm` is the root mean square L2 norm of a token."""

    mean: Tensor
    std: Tensor
    rms_norm: float


class ChannelAccumulator:
    """Mean and squared deviations in float64, merged batch by batch (Chan, Golub and LeVeque, 1979)."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.squares = torch.zeros(width, dtype=torch.float64)

    def add(self, tokens: Tensor) -> None:
        """tokens [..., C]."""
        rows = tokens.reshape(-1, tokens.shape[-1]).to(torch.float64, copy=True)
        mean = rows.mean(dim=0)
        delta = mean - self.mean
        total = self.count + len(rows)
        self.squares += rows.sub_(mean).square_().sum(dim=0)  # in place: a batch is 170 MB at full width
        self.squares += delta.square() * self.count * len(rows) / total
        self.mean += delta * len(rows) / total
        self.count = total

    def result(self) -> ChannelStatistics:
        variance = self.squares / self.count
        std = variance.sqrt()
        varying = std[std > 0]
        floor = FLOOR * float(varying.median()) if len(varying) else 1.0
        rms_norm = float((variance + self.mean.square()).sum().sqrt())
        return ChannelStatistics(self.mean.float(), std.clamp(min=floor).float(), rms_norm)


def streamed_statistics(
    source: Embeddings,
    indices: np.ndarray,
    *,
    normalize: bool,
    batch_size: int = 256,
    progress: Callable[[Iterable[np.ndarray]], Iterable[np.ndarray]] | None = None,
) -> tuple[ChannelStatistics, ChannelStatistics]:
    """(condition, target) statistics over the tokens of these samples.

    Args:
        normalize: L2-normalise each token first, as training with `--normalize_embeddings` does.
        progress: wraps the iterable of batches in a progress bar.

    Raises:
        ValueError: for NaN or infinity, naming the first such sample.
    """
    condition = ChannelAccumulator(source.condition_dim)
    target = ChannelAccumulator(source.target_dim)
    pieces: Iterable[np.ndarray] = list(batches(np.sort(indices), batch_size))
    for piece in progress(pieces) if progress else pieces:
        eva, clip = source.fetch(piece)
        for name, tokens, accumulator in (("eva", eva, condition), ("clip", clip, target)):
            bad = non_finite_samples(tokens)
            if len(bad):
                first = piece[int(bad[0])]
                raise ValueError(f"{source.path}: {name}: NaN or infinity in sample {first}")
            accumulator.add(F.normalize(tokens, dim=-1) if normalize else tokens)
    return condition.result(), target.result()
