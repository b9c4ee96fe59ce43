"""What needs no network: the yardsticks a generated embedding is held against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_dit.data.store import EmbeddingSource, batches


@dataclass(frozen=True)
class PositionMean:
    """The training split's mean token at each position, whatever the condition. `mean` [N, C]."""

    mean: Tensor

    @classmethod
    def fit(cls, source: EmbeddingSource, indices: np.ndarray, batch_size: int = 256) -> PositionMean:
        """Streamed over the samples at `indices`."""
        total = torch.zeros(source.num_tokens, source.target_dim, dtype=torch.float64)
        for piece in batches(indices, batch_size):
            total += source.fetch(piece)[1].double().sum(dim=0)
        return cls((total / len(indices)).float())

    def predict(self, eva: Tensor) -> Tensor:
        """[n, L, C_eva] -> [n, N, C]."""
        return self.mean.expand(len(eva), -1, -1)


@dataclass(frozen=True)
class TokenRidge:
    """Ridge regression from each condition token to the target token at its position.

    One map for all positions, x = W^T c + bias, that minimises the mean of |x - W^T c - bias|^2 plus
    penalty |W|^2 over standardised conditions (Hoerl and Kennard, 1970), by normal equations in float64.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(
        cls,
        source: EmbeddingSource,
        indices: np.ndarray,
        *,
        penalty: float = 1e-3,
        batch_size: int = 256,
    ) -> TokenRidge:
        """Streamed over the samples at `indices`; `penalty` is relative to the condition's variance."""
        width = source.condition_dim + 1
        gram = torch.zeros(width, width, dtype=torch.float64)
        cross = torch.zeros(width, source.target_dim, dtype=torch.float64)
        # Moments about some token instead of zero: a large mean would drown the variance in rounding.
        origin = source.fetch(indices[:1])[0][0, 0].double()
        for piece in batches(indices, batch_size):
            eva, clip = source.fetch(piece)
            rows = F.pad(eva.flatten(0, 1).double() - origin, (0, 1), value=1.0)
            gram += rows.T @ rows
            cross += rows.T @ clip.flatten(0, 1).double()
        weight, bias = _solve(gram, cross, penalty)
        return cls(weight.float(), (bias - origin @ weight).float())

    def predict(self, eva: Tensor) -> Tensor:
        """[n, N, C_eva] -> [n, N, C]."""
        return (eva.double() @ self.weight.double() + self.bias.double()).float()


def _solve(gram: Tensor, cross: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Centre the moments, add the penalty in units of each channel's variance, solve."""
    count = gram[-1, -1]
    mean_c, mean_x = gram[-1, :-1] / count, cross[-1] / count
    covariance = gram[:-1, :-1] / count - torch.outer(mean_c, mean_c)
    cross_covariance = cross[:-1] / count - torch.outer(mean_c, mean_x)
    variance = covariance.diagonal().clamp(min=1e-12)
    weight = torch.linalg.solve(covariance + penalty * torch.diag(variance), cross_covariance)
    return weight, mean_x - mean_c @ weight
