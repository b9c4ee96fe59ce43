"""How close generated tokens are to the true ones. Pure functions of tensors, and their streamed sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def fidelity(generated: Tensor, target: Tensor, target_mean: Tensor) -> dict[str, float]:
    """The fidelity metrics of one batch; see `FidelitySums`. [n, N, C], [n, N, C], [C]."""
    sums = FidelitySums(target_mean)
    sums.add(generated, target)
    return sums.result()


class FidelitySums:
    """Streamed fidelity of generated tokens [n, N, C] to true ones, in float64.

    * `cosine_similarity_mean`, `_std`: cosine of each token with its true token, in [-1, 1]. A constant
      vector can score high on it: compare with baselines.
    * `pooled_cosine_similarity_mean`: the same for the mean token of each sample.
    * `l2_distance_mean`, `_std`: Euclidean distance per token, in the units of the data, >= 0.
    * `norm_ratio_mean`: length of a generated token over that of the true one; 1 is right.
    * `r2`: 1 - sum (x_hat - x)^2 / sum (x - training mean)^2 per channel, averaged over the channels that
      vary; 1 is perfect, 0 is the training mean.

    The sums of several processes can be added: `state` is one vector.

    Args:
        target_mean: mean of the training split per channel, [C].
    """

    _scalars = (
        *("samples", "tokens", "cosine", "cosine_squares", "pooled_cosine"),
        *("distance", "distance_squares", "norm_ratio"),
    )

    def __init__(self, target_mean: Tensor) -> None:
        self._mean = target_mean.double().cpu()
        self.state = torch.zeros(len(self._scalars) + 2 * len(self._mean), dtype=torch.float64)

    def add(self, generated: Tensor, target: Tensor) -> None:
        """Take in n samples. Raises ValueError when the shapes differ."""
        if generated.shape != target.shape or generated.ndim != 3:
            raise ValueError(
                f"expected generated and target of one shape [n, N, C], "
                f"found {list(generated.shape)} and {list(target.shape)}"
            )
        x_hat, x = generated.double().cpu(), target.double().cpu()
        cosine = F.cosine_similarity(x_hat, x, dim=-1)
        distance = (x_hat - x).norm(dim=-1)
        ratio = x_hat.norm(dim=-1) / x.norm(dim=-1).clamp(min=1e-12)
        scalars = torch.tensor(
            [
                len(x),
                cosine.numel(),
                cosine.sum(),
                cosine.square().sum(),
                F.cosine_similarity(x_hat.mean(dim=1), x.mean(dim=1), dim=-1).sum(),
                distance.sum(),
                distance.square().sum(),
                ratio.sum(),
            ],
            dtype=torch.float64,
        )
        residual = (x_hat - x).square().sum(dim=(0, 1))
        spread = (x - self._mean).square().sum(dim=(0, 1))
        self.state += torch.cat([scalars, residual, spread])

    def result(self) -> dict[str, float]:
        """The metrics. Raises ValueError when no sample was added."""
        scalars = dict(zip(self._scalars, self.state.tolist(), strict=False))
        tokens, samples = scalars["tokens"], scalars["samples"]
        if not samples:
            raise ValueError("expected at least one sample to measure, found none")
        residual, spread = self.state[len(self._scalars) :].chunk(2)
        varies = spread > 0
        r2 = 1.0 - residual[varies] / spread[varies]
        cosine, distance = scalars["cosine"] / tokens, scalars["distance"] / tokens
        return {
            "cosine_similarity_mean": cosine,
            "cosine_similarity_std": _deviation(cosine, scalars["cosine_squares"] / tokens),
            "pooled_cosine_similarity_mean": scalars["pooled_cosine"] / samples,
            "l2_distance_mean": distance,
            "l2_distance_std": _deviation(distance, scalars["distance_squares"] / tokens),
            "norm_ratio_mean": scalars["norm_ratio"] / tokens,
            "r2": float(r2.mean()) if varies.any() else float("nan"),
        }


def _deviation(mean: float, mean_square: float) -> float:
    return max(0.0, mean_square - mean * mean) ** 0.5
