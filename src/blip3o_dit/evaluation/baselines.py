"""What needs no network: the yardsticks a generated embedding is held against.

Each baseline is fitted on the training split, streamed, and answers `predict(eva)` [n, L, C_eva] ->
[n, N, C] in the units of the data: its best guess. Some can also `sample`: `methods.py` wraps the others
with `ResidualGaussian`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_dit.data.dataset import choose_samples
from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.metrics.distances import symmetric_root
from blip3o_dit.ridge import _origins, _token_moments
from blip3o_dit.utils.stateless_random import stateless_generator, stateless_normal


class Baseline(Protocol):
    """A point prediction."""

    def predict(self, eva: Tensor) -> Tensor:
        """[n, L, C_eva] -> [n, N, C], float32, in the units of the data."""


@dataclass(frozen=True)
class TrainingMean:
    """The training split's mean token, at every position and whatever the condition. `mean` [C]."""

    mean: Tensor
    num_tokens: int

    @classmethod
    def fit(cls, source: Embeddings, indices: np.ndarray, batch_size: int = 32) -> TrainingMean:
        """Streamed over the samples at `indices`."""
        return cls(PositionMean.fit(source, indices, batch_size).mean.mean(dim=0), source.num_tokens)

    def predict(self, eva: Tensor) -> Tensor:
        """[n, L, C_eva] -> [n, N, C]."""
        return self.mean.expand(len(eva), self.num_tokens, -1)


@dataclass(frozen=True)
class PositionMean:
    """The training split's mean token at each position, whatever the condition. `mean` [N, C]."""

    mean: Tensor

    @classmethod
    def fit(cls, source: Embeddings, indices: np.ndarray, batch_size: int = 32) -> PositionMean:
        """Streamed over the samples at `indices`."""
        total = torch.zeros(source.num_tokens, source.target_dim, dtype=torch.float64)
        for piece in batches(indices, batch_size):
            total += source.fetch(piece)[1].double().sum(dim=0)
        return cls((total / len(indices)).float())

    def predict(self, eva: Tensor) -> Tensor:
        """[n, L, C_eva] -> [n, N, C]."""
        return self.mean.expand(len(eva), -1, -1)


@dataclass(frozen=True)
class Procrustes:
    """A rotation and a scale from each condition token to its target token: x = s (c - origin) Q + bias.

    Q [C_eva, C] is the matrix with orthonormal rows or columns that maximises the covariance of cQ with x
    (Schoenemann 1966), and s the scale of least squared error. It says how far the two encoders are the
    same space seen from another side.
    """

    origin: Tensor
    weight: Tensor
    bias: Tensor
    scale: float

    @classmethod
    def fit(cls, source: Embeddings, indices: np.ndarray, batch_size: int = 16) -> Procrustes:
        """Streamed over the samples at `indices`."""
        origin = _origins(source, indices)
        covariance, cross, mean_c, mean_x = _token_moments(source, indices, origin, batch_size).centred()
        left, _, right = torch.linalg.svd(cross, full_matrices=False)
        rotation = left @ right
        size = float((rotation * (covariance @ rotation)).sum())
        scale = float((rotation * cross).sum()) / size if size > 0 else 0.0
        weight = scale * rotation
        bias = mean_x + origin[1] - mean_c @ weight
        return cls(origin[0].float(), weight.float(), bias.float(), scale)

    def predict(self, eva: Tensor) -> Tensor:
        """[n, N, C_eva] -> [n, N, C]."""
        return (eva.float() - self.origin) @ self.weight + self.bias


@dataclass(frozen=True)
class NearestNeighbours:
    """The target tokens of the k training samples whose mean condition token is nearest by cosine.

    The best guess is their mean; a sample is one of them, drawn at random.
    """

    source: Embeddings
    bank: Tensor
    bank_indices: np.ndarray
    centre: Tensor
    k: int

    @classmethod
    def fit(
        cls, source: Embeddings, indices: np.ndarray, *, k: int = 10, batch_size: int = 32
    ) -> NearestNeighbours:
        """Keeps the mean condition token of each sample, [n, C_eva]; cosines are about their mean."""
        pooled = torch.cat([source.fetch(piece)[0].mean(dim=1) for piece in batches(indices, batch_size)])
        centre = pooled.mean(dim=0)
        bank = F.normalize(pooled - centre, dim=-1)
        return cls(source, bank, np.asarray(indices), centre, min(k, len(indices)))

    def predict(self, eva: Tensor) -> Tensor:
        """[n, L, C_eva] -> [n, N, C]."""
        nearest = self._nearest(eva)
        total = torch.zeros(len(eva), self.source.num_tokens, self.source.target_dim)
        for column in nearest.T:
            total += self.source.fetch(column)[1]
        return total / self.k

    def sample(self, eva: Tensor, indices: Sequence[int], *, seed: int, sample_number: int) -> Tensor:
        """[n, L, C_eva] -> [n, N, C]: one neighbour's tokens, named by (seed, sample index, draw)."""
        nearest = self._nearest(eva)
        chosen = [
            stateless_generator(seed, "neighbour", sample_number, int(index)).integers(0, self.k)
            for index in indices
        ]
        return self.source.fetch(nearest[np.arange(len(eva)), chosen])[1]

    def _nearest(self, eva: Tensor) -> np.ndarray:
        """Indices in the source, [n, k]."""
        queries = F.normalize(eva.float().mean(dim=1) - self.centre, dim=-1)
        return self.bank_indices[(queries @ self.bank.T).topk(self.k, dim=1).indices.numpy()]


@dataclass(frozen=True)
class ResidualGaussian:
    """What a point prediction leaves open, as a Gaussian: turns it into a sampler.

    The residual's covariance is taken as a Kronecker product of one over positions [N, N] and one over
    channels [C, C] (a matrix normal distribution), from moments over samples the prediction was not fitted
    on. `positions` and `channels` are square roots of the factors.
    """

    positions: Tensor
    channels: Tensor

    @classmethod
    def fit(
        cls,
        baseline: Baseline,
        source: Embeddings,
        indices: np.ndarray,
        *,
        scale: Tensor,
        batch_size: int = 16,
    ) -> ResidualGaussian:
        """Streamed over the samples at `indices`; `scale` [C] makes channels comparable, e.g. their std."""
        positions = torch.zeros(source.num_tokens, source.num_tokens, dtype=torch.float64)
        channels = torch.zeros(source.target_dim, source.target_dim, dtype=torch.float64)
        for piece in batches(indices, batch_size):
            eva, clip = source.fetch(piece)
            residual = ((clip - baseline.predict(eva)) / scale).double()
            positions += (residual @ residual.mT).sum(dim=0)
            channels += (residual.flatten(0, 1).T) @ residual.flatten(0, 1)
        positions /= len(indices) * source.target_dim
        channels /= len(indices) * source.num_tokens
        variance = float(channels.trace()) / source.target_dim
        if variance == 0.0:
            return cls(torch.zeros_like(positions).float(), torch.zeros_like(channels).float())
        return cls(
            symmetric_root(positions / variance).float(), (symmetric_root(channels) * scale.double()).float()
        )

    def sample(self, indices: Sequence[int], *, seed: int, sample_number: int) -> Tensor:
        """Residuals [n, N, C], named by (seed, sample index, draw)."""
        shape = (len(self.positions), len(self.channels))
        noise = stateless_normal(indices, shape, seed=seed, stream="residual", counter=sample_number)
        return self.positions @ noise @ self.channels


def split_validation(indices: np.ndarray, *, most: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(fit, validation): at most `most` of the samples, a tenth of them for validation, both ascending."""
    order = choose_samples(indices, max_samples=most, seed=seed)
    held_back = max(1, len(order) // 10) if len(order) > 1 else 0
    return np.sort(order[held_back:]), np.sort(order[:held_back])
