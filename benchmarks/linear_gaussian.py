"""A data set whose best possible flow is known in closed form.

Each sample has one condition c ~ N(0, I), shown on all of its condition tokens, and target tokens
x_1 = A c + b + L z with z ~ N(0, I) of their own. Given x_t and c everything is Gaussian, so the optimal
velocity, its loss (Bayes) and the distribution of x_1 given c have closed forms.

The condition is shared by a sample's tokens on purpose: the network's cross-attention has no positions on
its keys (as BLIP3-o's), so which condition token belongs to which target token must be legible from the
tokens themselves, as it is in a vision tower's but not in independent noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.store import Record
from blip3o_dit.flow.path import ProbabilityPath


@dataclass
class LinearGaussian:
    """The data set as an `EmbeddingSource`, and what is known about it.

    `matrix` A [C, C_eva], `offset` b [C], `factor` L [C, C].
    """

    num_samples: int = 8192
    num_tokens: int = 16
    condition_dim: int = 8
    target_dim: int = 8
    seed: int = 0
    path: Path = Path("linear-gaussian")

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.matrix = normal(self.target_dim, self.condition_dim) / self.condition_dim**0.5
        self.offset = normal(self.target_dim)
        self.factor = 0.7 * normal(self.target_dim, self.target_dim) / self.target_dim**0.5
        condition = normal(self.num_samples, 1, self.condition_dim)
        self._eva = condition.expand(-1, self.num_tokens, -1)
        noise = normal(self.num_samples, self.num_tokens, self.target_dim)
        self._clip = self.mean(self._eva) + noise @ self.factor.T

    def mean(self, eva: Tensor) -> Tensor:
        """E[x_1 | c] of each token."""
        return eva @ self.matrix.T + self.offset

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(np.asarray(indices))
        return self._eva[rows], self._clip[rows]

    def records(self, indices: Sequence[int] | None = None) -> list[Record]:
        return [{"key": str(i)} for i in (range(self.num_samples) if indices is None else indices)]


@dataclass(frozen=True)
class StandardizedAnswer:
    """The closed forms in the network's units: x_1 = M c' + L z there, c' the standardised condition."""

    data: LinearGaussian
    target_mean: Tensor
    target_std: Tensor

    @property
    def covariance(self) -> Tensor:
        """Cov[x_1 | c], [C, C]."""
        factor = self.data.factor / self.target_std[:, None]
        return (factor @ factor.T).double()

    def mean(self, eva: Tensor) -> Tensor:
        """E[x_1 | c] for conditions in the units of the data."""
        return (self.data.mean(eva) - self.target_mean) / self.target_std

    def velocity(self, x_t: Tensor, t: Tensor, eva: Tensor, path: ProbabilityPath) -> Tensor:
        """E[v | x_t, c]: what the best network predicts. [B, N, C], [B], [B, N, C_eva]."""
        out = torch.empty_like(x_t)
        mean = self.mean(eva)
        for row in range(len(t)):
            alpha, sigma = float(path.alpha(t[row])), max(float(path.sigma(t[row])), 1e-6)
            gain = self._gain(alpha, sigma).float()
            x_1 = mean[row] + (x_t[row] - alpha * mean[row]) @ gain.T
            noise = (x_t[row] - alpha * x_1) / sigma
            out[row] = path.alpha_derivative(t[row]) * x_1 + path.sigma_derivative(t[row]) * noise
        return out

    def _gain(self, alpha: float, sigma: float) -> Tensor:
        marginal = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.covariance))
        return alpha * torch.linalg.solve(marginal, self.covariance).T
