"""How close each generated token is to its reference token: cosine, L2 distance, norm ratio, R2."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TokenMeasures:
    """Of each token [n, N]: `cosine` in [-1, 1], `distance` >= 0, `norm_ratio` >= 0. `pooled_cosine` [n].

    `squares` [n, N, C] are the squared errors, float64.
    """

    cosine: Tensor
    distance: Tensor
    norm_ratio: Tensor
    pooled_cosine: Tensor
    squares: Tensor


def measure_tokens(generated: Tensor, target: Tensor) -> TokenMeasures:
    """Each generated token against its reference token, [n, N, C] both, in float64.

    Raises:
        ValueError: when the shapes differ or the rank is not 3.
    """
    if generated.shape != target.shape or generated.ndim != 3:
        raise ValueError(
            f"expected generated and target of one shape [n, N, C], "
            f"found {list(generated.shape)} and {list(target.shape)}"
        )
    x_hat, x = generated.cpu().double(), target.cpu().double()
    squares = (x_hat - x).square_()
    generated_norm, norm = x_hat.norm(dim=-1), x.norm(dim=-1)
    dot = torch.einsum("nkc,nkc->nk", x_hat, x)
    return TokenMeasures(
        cosine=dot / (generated_norm * norm).clamp(min=1e-16),
        distance=squares.sum(dim=-1).sqrt(),
        norm_ratio=generated_norm / norm.clamp(min=1e-12),
        pooled_cosine=F.cosine_similarity(x_hat.mean(dim=1), x.mean(dim=1), dim=-1),
        squares=squares,
    )


class FidelitySums:
    """Streamed fidelity of generated tokens [n, N, C] to reference tokens, in float64.

    * `cosine_similarity_mean`, `_std`: cosine of each token with its reference token, in [-1, 1]. A
      constant vector can score high on it: compare with baselines.
    * `pooled_cosine_similarity_mean`: the same for the mean token of each sample.
    * `l2_distance_mean`, `_std`: Euclidean distance per token, in the units of the data, >= 0.
    * `norm_ratio_mean`: length of a generated token over that of the reference token; 1 is right.
    * `r2`: 1 - sum (x_hat - x)^2 / sum (x - training mean)^2 per channel, averaged over the channels that
      vary; 1 is perfect, 0 is the training mean.

    The sums of several processes can be added: `state` is one vector. `target_mean` [C] is the training mean.
    """

    _scalars = (
        "samples",
        "tokens",
        "cosine",
        "cosine_squares",
        "pooled_cosine",
        "distance",
        "distance_squares",
        "norm_ratio",
    )

    def __init__(self, target_mean: Tensor) -> None:
        self._mean = target_mean.cpu().double()
        self.state = torch.zeros(len(self._scalars) + 2 * len(self._mean), dtype=torch.float64)

    def add(self, generated: Tensor, target: Tensor) -> TokenMeasures:
        """Take in n samples; returns their tokens' measures. Raises ValueError when the shapes differ."""
        tokens = measure_tokens(generated, target)
        self.state += self._sums(tokens, target)
        return tokens

    def of(self, generated: Tensor, target: Tensor) -> Tensor:
        """What these samples would add to `state`, for another process to add."""
        return self._sums(measure_tokens(generated, target), target)

    def _sums(self, tokens: TokenMeasures, target: Tensor) -> Tensor:
        scalars = (
            len(target),
            tokens.cosine.numel(),
            tokens.cosine.sum(),
            tokens.cosine.square().sum(),
            tokens.pooled_cosine.sum(),
            tokens.distance.sum(),
            tokens.distance.square().sum(),
            tokens.norm_ratio.sum(),
        )
        summed = torch.tensor([float(value) for value in scalars], dtype=torch.float64)
        residual = tokens.squares.sum(dim=(0, 1))
        spread = (target.cpu().double() - self._mean).square_().sum(dim=(0, 1))
        return torch.cat([summed, residual, spread])

    def result(self) -> dict[str, float]:
        """The metrics. Raises ValueError when no sample was added."""
        scalars = dict(zip(self._scalars, self.state[: len(self._scalars)].tolist(), strict=True))
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
