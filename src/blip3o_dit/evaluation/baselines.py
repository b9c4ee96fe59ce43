"""The baselines that a model is compared with, fitted on the training split, and as samplers.

Each predicts the mean of the target tokens, `predict(eva)` [n, L, C_eva] -> [n, N, C] in the units of the
data, and is fitted by one pass over the samples at `indices`. Nearest neighbours are a sampler by themselves;
the others become one by a `ResidualGaussian`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from blip3o_dit.data.dataset import choose_samples, group_ranks
from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.evaluation.reference import Progress
from blip3o_dit.evaluation.samplers import Sampler
from blip3o_dit.metrics.distances import symmetric_root
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.ridge import NeighbourhoodRidge, TokenRidge, token_moments, token_origins
from blip3o_dit.utils.stateless_random import stateless_generator, stateless_normal


class Baseline(Protocol):
    """A point prediction."""

    def predict(self, eva: Tensor) -> Tensor:
        """[n, L, C_eva] -> [n, N, C], float32, in the units of the data."""


@dataclass(frozen=True)
class PositionMean:
    """The training split's mean token at each position, whatever the condition. `mean` [N, C]."""

    mean: Tensor

    @classmethod
    def fit(cls, source: Embeddings, indices: np.ndarray, batch_size: int = 32) -> PositionMean:
        total = torch.zeros(source.num_tokens, source.target_dim, dtype=torch.float64)
        for piece in batches(indices, batch_size):
            total += source.fetch(piece)[1].double().sum(dim=0)
        return cls((total / len(indices)).float())

    def predict(self, eva: Tensor) -> Tensor:
        return self.mean.expand(len(eva), -1, -1)


class TrainingMean(PositionMean):
    """The training split's mean token, at every position and whatever the condition. `mean` [N, C]."""

    @classmethod
    def fit(cls, source: Embeddings, indices: np.ndarray, batch_size: int = 32) -> TrainingMean:
        mean = PositionMean.fit(source, indices, batch_size).mean
        return cls(mean.mean(dim=0).expand_as(mean))


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
        origin = token_origins(source, indices)
        covariance, cross, mean_c, mean_x = token_moments(source, indices, origin, batch_size).centred()
        left, _, right = torch.linalg.svd(cross, full_matrices=False)
        rotation = left @ right
        size = float((rotation * (covariance @ rotation)).sum())
        scale = float((rotation * cross).sum()) / size if size > 0 else 0.0
        weight = scale * rotation
        bias = mean_x + origin[1] - mean_c @ weight
        return cls(origin[0].float(), weight.float(), bias.float(), scale)

    def predict(self, eva: Tensor) -> Tensor:
        return (eva.float() - self.origin) @ self.weight + self.bias


@dataclass(frozen=True)
class NearestNeighbours:
    """The k training samples whose mean condition token is nearest by cosine: predicts the mean of their
    target tokens, samples one of them at random."""

    source: Embeddings
    bank: Tensor
    bank_indices: np.ndarray
    centre: Tensor
    k: int
    seed: int = 0
    name: str = "nearest neighbours"
    is_model: bool = False
    calls: int = 0
    random: bool = True

    @classmethod
    def fit(
        cls,
        source: Embeddings,
        indices: np.ndarray,
        *,
        k: int = 10,
        seed: int = 0,
        batch_size: int = 32,
        progress: Progress = lambda items, name: items,
    ) -> NearestNeighbours:
        """Keeps the mean condition token of each sample, [n, C_eva]; cosines are about their mean."""
        pieces = progress(list(batches(indices, batch_size)), "fitting nearest neighbours")
        pooled = torch.cat([source.fetch(piece)[0].mean(dim=1) for piece in pieces])
        centre = pooled.mean(dim=0)
        bank = F.normalize(pooled - centre, dim=-1)
        return cls(source, bank, np.asarray(indices), centre, min(k, len(indices)), seed)

    @property
    def about(self) -> str:
        return f"{self.k} training samples with the nearest mean condition token, among {len(self.bank)}"

    def predict_mean(self, eva: Tensor, indices: Sequence[int]) -> Tensor:
        nearest = self._nearest(eva)
        total = torch.zeros(len(eva), self.source.num_tokens, self.source.target_dim)
        for column in nearest.T:
            total += self.source.fetch(column)[1]
        return total / self.k

    def sample(self, eva: Tensor, indices: Sequence[int], sample_number: int) -> Tensor:
        """One neighbour's tokens, by (seed, sample index, sample number)."""
        nearest = self._nearest(eva)
        chosen = [
            stateless_generator(self.seed, "neighbour", sample_number, int(index)).integers(0, self.k)
            for index in indices
        ]
        return self.source.fetch(nearest[np.arange(len(eva)), chosen])[1]

    def _nearest(self, eva: Tensor) -> np.ndarray:
        """Indices in the source, [n, k]."""
        queries = F.normalize(eva.float().mean(dim=1) - self.centre, dim=-1)
        return self.bank_indices[(queries @ self.bank.T).topk(self.k, dim=1).indices.numpy()]


@dataclass(frozen=True)
class ResidualGaussian:
    """The residual of a point prediction, as a Gaussian: turns it into a sampler.

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
        """Residuals [n, N, C], a function of (seed, sample index, sample number)."""
        shape = (len(self.positions), len(self.channels))
        noise = stateless_normal(indices, shape, seed=seed, stream="residual", counter=sample_number)
        return self.positions @ noise @ self.channels


@dataclass(frozen=True)
class NetworkRegression:
    """The model's own network trained by least squares: its output at x_t = 0, t = 0 is E[x_1 | c]."""

    model: BLIP3oDiTModel

    @classmethod
    def fit(
        cls,
        like: BLIP3oDiTModel,
        source: Embeddings,
        indices: Sequence[int],
        *,
        steps: int,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        seed: int = 0,
        progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
    ) -> NetworkRegression:
        """AdamW, linear warm-up over a twentieth of the steps, then a cosine to zero.

        `like` gives the sizes and the data's statistics; it is not changed.
        """
        torch.manual_seed(seed)
        model = BLIP3oDiTModel(like.config)
        model.to(torch.device(like.device))  # type: ignore[arg-type]
        model.set_statistics(
            condition=(like.condition_mean, like.condition_std), target=(like.target_mean, like.target_std)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
        schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
        generator = stateless_generator(seed, "regression batches")
        model.train()
        for _ in progress(range(steps)) if progress else range(steps):
            eva, clip = source.fetch(generator.choice(indices, size=min(batch_size, len(indices))))
            x_1 = model.normalize_target(clip.to(model.device))
            loss = (_regress(model, eva) - x_1).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return cls(model.eval())

    @torch.no_grad()
    def predict(self, eva: Tensor) -> Tensor:
        return self.model.denormalize_target(_regress(self.model, eva)).cpu()


def _regress(model: BLIP3oDiTModel, eva: Tensor) -> Tensor:
    condition = model.normalize_condition(eva.to(model.device))
    x_t = condition.new_zeros(len(eva), model.config.num_tokens, model.config.in_channels)
    return model(x_t, x_t.new_zeros(len(eva)), condition)


@dataclass(frozen=True)
class BaselineSampler:
    """A point prediction, and samples from a Gaussian around it (`residual` None: no randomness)."""

    name: str
    about: str
    baseline: Baseline
    residual: ResidualGaussian | None
    seed: int = 0
    is_model: bool = False
    calls: int = 0

    @property
    def random(self) -> bool:
        return self.residual is not None

    def predict_mean(self, eva: Tensor, indices: Sequence[int]) -> Tensor | None:
        return self.baseline.predict(eva)

    def sample(self, eva: Tensor, indices: Sequence[int], sample_number: int) -> Tensor:
        mean = self.baseline.predict(eva)
        if self.residual is None:
            return mean
        return mean + self.residual.sample(indices, seed=self.seed, sample_number=sample_number)


def fit_baselines(
    source: Embeddings,
    train: np.ndarray,
    *,
    std: Tensor,
    max_samples: int,
    seed: int,
    progress: Progress,
    groups: np.ndarray | None = None,
    network: BLIP3oDiTModel | None = None,
    network_steps: int = 0,
) -> list[Sampler]:
    """Every baseline as a sampler; residuals are those of validation samples, which the fit has not seen.

    Args:
        train: indices in `source`; at most `max_samples` of them, chosen by the seed, are used.
        std: of the training tokens per channel, [C].
        groups: numbers of all samples' groups, [n]; one is for the fit or for validation.
        network, network_steps: also train this model's network by plain regression, for so many steps.
    """
    fit, validation = split_validation(train, max_samples=max_samples, seed=seed, groups=groups)
    both = np.sort(np.concatenate([fit, validation]))

    def gaussian(name: str, about: str, final: Baseline, on_fit: Baseline) -> Sampler:
        residual = None
        if len(validation):
            residual = ResidualGaussian.fit(on_fit, source, validation, scale=std)
        return BaselineSampler(name, f"{about}; Gaussian residual", final, residual, seed=seed)

    kinds: list[tuple[str, type[PositionMean | Procrustes | TokenRidge], str]] = [
        ("training mean", TrainingMean, "the training split's mean token"),
        ("position mean", PositionMean, "the training split's mean token at each position"),
        ("ridge", TokenRidge, "linear map from each condition token to the token there"),
        ("ridge 3x3", NeighbourhoodRidge, "linear map from the 3x3 condition tokens around each position"),
        ("procrustes", Procrustes, "rotation and scale of each condition token"),
    ]
    samplers: list[Sampler] = []
    for name, kind, about in progress(kinds, "fitting baselines"):
        if issubclass(kind, TokenRidge):
            final, on_fit = kind.fit_with_holdout(source, fit, validation=validation)
            about += f", penalty {final.penalty:g} chosen on {len(validation)} validation samples"
            samplers.append(gaussian(name, about, final, on_fit))
        else:
            samplers.append(gaussian(name, about, kind.fit(source, both), kind.fit(source, fit)))
    samplers.append(NearestNeighbours.fit(source, both, seed=seed, progress=progress))
    if network is not None and network_steps:
        regression = NetworkRegression.fit(
            network,
            source,
            fit.tolist(),
            steps=network_steps,
            seed=seed,
            progress=lambda steps: progress(list(steps), "network regression"),
        )
        about = f"the model's network, least squares, {network_steps} steps"
        samplers.append(gaussian("network regression", about, regression, regression))
    return samplers


def split_validation(
    indices: np.ndarray, *, max_samples: int, seed: int, groups: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(fit, validation), ascending: at most `max_samples` samples, a tenth of them for validation, or the
    groups that it takes to have a tenth."""
    order = choose_samples(indices, max_samples=max_samples, seed=seed)
    holdout = max(1, len(order) // 10) if len(order) > 1 else 0
    ranks = group_ranks(order, groups)
    last = np.searchsorted(np.bincount(ranks).cumsum(), holdout)
    chosen = (ranks <= last) & (holdout > 0)
    return np.sort(order[~chosen]), np.sort(order[chosen])
