"""What needs no network: the yardsticks a generated embedding is held against.

Each baseline is fitted on the training split, streamed, and answers `predict(eva)` [n, L, C_eva] ->
[n, N, C] in the units of the data: its best guess. Some can also `sample`: `methods.py` wraps the others
with `ResidualGaussian`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_dit.data.dataset import choose_samples
from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.flow.source import neighbourhood_features
from blip3o_dit.metrics.distances import symmetric_root
from blip3o_dit.model.config import neighbour_components
from blip3o_dit.utils.stateless_random import stateless_generator, stateless_normal

PENALTIES = tuple(10.0**exponent for exponent in range(-6, 3))


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


class Moments:
    """Sums of products of features [F] and targets [C], taken about an origin near the data, float64.

    Two of them can be added, and answer how well any linear map does on what they have seen.
    """

    def __init__(self, width: int, target_dim: int, device: torch.device | None = None) -> None:
        self.gram = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(width + 1, target_dim, dtype=torch.float64, device=device)
        self.target_squares = torch.zeros(target_dim, dtype=torch.float64, device=device)

    @property
    def count(self) -> Tensor:
        """Rows that were added, a scalar."""
        return self.gram[-1, -1]

    def add(self, features: Tensor, targets: Tensor) -> None:
        """features [rows, F], targets [rows, C], both less their origins."""
        rows = F.pad(features.double(), (0, 1), value=1.0)
        targets = targets.double()
        self.gram += rows.T @ rows
        self.cross += rows.T @ targets
        self.target_squares += targets.square().sum(dim=0)

    def merge(self, other: Moments) -> None:
        self.gram += other.gram
        self.cross += other.cross
        self.target_squares += other.target_squares

    def without(self, other: Moments) -> Moments:
        """Those of the rows that are not among `other`'s, which are a part of these."""
        rest = copy.copy(self)
        rest.gram, rest.cross = self.gram - other.gram, self.cross - other.cross
        rest.target_squares = self.target_squares - other.target_squares
        return rest

    def solve(self, penalty: float) -> tuple[Tensor, Tensor]:
        """(W [F, C], bias [C]) for a ridge penalty in units of each feature's variance."""
        covariance, cross_covariance, mean_c, mean_x = self.centred()
        covariance.diagonal().mul_(1 + penalty).clamp_(min=1e-12 * penalty)
        weight = _solve_symmetric(covariance, cross_covariance)
        return weight, mean_x - mean_c @ weight

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Covariance [F, F], cross-covariance [F, C], mean of the features [F] and of the targets [C]."""
        count = self.gram[-1, -1]
        mean_c, mean_x = self.gram[-1, :-1] / count, self.cross[-1] / count
        covariance = self.gram[:-1, :-1] / count - torch.outer(mean_c, mean_c)
        cross_covariance = self.cross[:-1] / count - torch.outer(mean_c, mean_x)
        return covariance, cross_covariance, mean_c, mean_x

    def squared_error(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Mean of (x - W^T c - bias)^2 per channel, [C]."""
        full = torch.cat([weight, bias[None]])
        count = self.gram[-1, -1]
        explained = (full * (self.gram @ full)).sum(dim=0)
        return (self.target_squares - 2 * (full * self.cross).sum(dim=0) + explained) / count


class Ridge:
    """What both ridge regressions share; a subclass brings `fit_twice`."""

    fit_twice: ClassVar[Any]

    @classmethod
    def fit(cls, source: Embeddings, indices: np.ndarray, **options: Any) -> Any:
        """The map fitted on everything, a `cls`; for the options see `fit_twice`."""
        return cls.fit_twice(source, indices, **options)[0]


@dataclass(frozen=True)
class TokenRidge(Ridge):
    """Ridge regression from each condition token to the target token at its position.

    One map for all positions, x = W^T (c - origin) + bias, that minimises the mean of |x - x_hat|^2 plus
    penalty |W|^2 over standardised conditions (Hoerl and Kennard, 1970), by normal equations in float64.
    """

    origin: Tensor
    weight: Tensor
    bias: Tensor
    penalty: float

    @classmethod
    def fit_twice(
        cls,
        source: Embeddings,
        indices: np.ndarray,
        *,
        penalty: float | None = None,
        validation: np.ndarray | None = None,
        batch_size: int = 16,
    ) -> tuple[TokenRidge, TokenRidge]:
        """The map fitted on everything, and with the same penalty the one that saw no validation sample.

        Streamed over the samples at `indices`, and those at `validation`, if any.

        Args:
            penalty: relative to each condition channel's variance. None takes the one of `PENALTIES` that
                does best on the validation samples, and 1e-3 without any.
        """
        origin, x_origin = _origins(source, indices)

        def moments(rows: np.ndarray) -> Moments:
            return _token_moments(source, rows, (origin, x_origin), batch_size)

        final, before = (
            cls(origin.float(), weight.float(), (bias + x_origin).float(), chosen)
            for weight, bias, chosen in _fit_ridge(moments, indices, validation, penalty)
        )
        return final, before

    def predict(self, eva: Tensor) -> Tensor:
        """[n, N, C_eva] -> [n, N, C]."""
        return (eva.float() - self.origin) @ self.weight + self.bias


@dataclass(frozen=True)
class NeighbourhoodRidge(Ridge):
    """Ridge regression from the 3x3 condition tokens around a position to the target token there.

    The token itself enters whole. Its eight neighbours enter whole while there are at most 2,560 features,
    and by their leading principal components above (`neighbour_components`). Outside the grid is
    the mean token.
    """

    mean: Tensor
    components: Tensor
    weight: Tensor
    bias: Tensor
    penalty: float

    @classmethod
    def fit_twice(
        cls,
        source: Embeddings,
        indices: np.ndarray,
        *,
        penalty: float | None = None,
        validation: np.ndarray | None = None,
        mean: Tensor | None = None,
        batch_size: int = 16,
    ) -> tuple[NeighbourhoodRidge, NeighbourhoodRidge]:
        """As `TokenRidge.fit_twice`; `mean` [C_eva] stands outside the grid, None for the samples' own."""
        own_mean, components = principal_components(source, indices, batch_size)
        mean = own_mean if mean is None else mean.double()
        x_origin = _origins(source, indices)[1]

        def moments(rows: np.ndarray) -> Moments:
            sums = Moments(source.condition_dim + 8 * components.shape[1], source.target_dim)
            for eva, clip in _fetched(source, rows, batch_size):
                features = neighbourhood_features(eva - mean, components)
                sums.add(features.flatten(0, 1), clip.flatten(0, 1) - x_origin)
            return sums

        final, before = (
            cls(mean.float(), components.float(), weight.float(), (bias + x_origin).float(), chosen)
            for weight, bias, chosen in _fit_ridge(moments, indices, validation, penalty)
        )
        return final, before

    def predict(self, eva: Tensor) -> Tensor:
        """[n, N, C_eva] -> [n, N, C]."""
        return neighbourhood_features(eva.float() - self.mean, self.components) @ self.weight + self.bias


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
    order = choose_samples(indices, most=most, seed=seed)
    held_back = max(1, len(order) // 10) if len(order) > 1 else 0
    return np.sort(order[held_back:]), np.sort(order[:held_back])


def _fit_ridge(
    moments_of: Callable[[np.ndarray], Moments],
    indices: np.ndarray,
    validation: np.ndarray | None,
    penalty: float | None,
) -> tuple[tuple[Tensor, Tensor, float], tuple[Tensor, Tensor, float]]:
    """(W, bias, penalty) fitted on everything, then the same without the validation samples.

    An open penalty is chosen on the validation samples.
    """
    moments = moments_of(indices)
    if validation is None or not len(validation):
        penalty = 1e-3 if penalty is None else penalty
        final = before = moments.solve(penalty)
    else:
        held_back = moments_of(validation)
        if penalty is None:
            penalty, before = search_penalty(moments, held_back)
        else:
            before = moments.solve(penalty)
        moments.merge(held_back)
        final = moments.solve(penalty)
    return (*final, penalty), (*before, penalty)


def search_penalty(moments: Moments, held_back: Moments) -> tuple[float, tuple[Tensor, Tensor]]:
    """The penalty of `PENALTIES` with the least error on what was held back, and its map.

    Walks from the middle of the list while the error falls: as a function of the penalty it has one valley in
    practice, and at full width each penalty costs half a second.
    """
    found: dict[int, tuple[float, tuple[Tensor, Tensor]]] = {}

    def error(place: int) -> float:
        if place not in found:
            solution = moments.solve(PENALTIES[place])
            found[place] = _standardized_error(held_back, *solution), solution
        return found[place][0]

    place = len(PENALTIES) // 2
    for step in (-1, 1):
        while 0 <= place + step < len(PENALTIES) and error(place + step) < error(place):
            place += step
    return PENALTIES[place], found[place][1]


def _solve_symmetric(matrix: Tensor, right: Tensor) -> Tensor:
    """By Cholesky's factor, and by elimination where rounding leaves the matrix not quite positive."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.solve(matrix, right) if failed else torch.cholesky_solve(right, factor)


def _standardized_error(moments: Moments, weight: Tensor, bias: Tensor) -> float:
    """Mean over the channels of the error in units of the channel's variance."""
    count = moments.gram[-1, -1]
    variance = moments.target_squares / count - (moments.cross[-1] / count).square()
    varies = variance > 1e-12 * variance.max()
    error = moments.squared_error(weight, bias)[varies] / variance[varies]
    return float(error.mean()) if len(error) else 0.0


def _origins(source: Embeddings, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """Some token of each side: moments about zero would drown a small variance in a large mean."""
    eva, clip = source.fetch(indices[:1])
    return eva[0, 0].double(), clip[0, 0].double()


def _token_moments(
    source: Embeddings, rows: np.ndarray, origin: tuple[Tensor, Tensor], batch_size: int
) -> Moments:
    sums = Moments(source.condition_dim, source.target_dim)
    for eva, clip in _fetched(source, rows, batch_size):
        sums.add(eva.flatten(0, 1) - origin[0], clip.flatten(0, 1) - origin[1])
    return sums


def principal_components(source: Embeddings, indices: np.ndarray, batch_size: int) -> tuple[Tensor, Tensor]:
    """Mean condition token [C_eva], and leading principal directions [C_eva, r] (all while they fit)."""
    width = source.condition_dim
    kept = neighbour_components(width)
    origin = _origins(source, indices)[0]
    total, gram, count = torch.zeros_like(origin), origin.new_zeros(width, width), 0
    for eva, _ in _fetched(source, indices, batch_size):
        rows = eva.flatten(0, 1) - origin
        total += rows.sum(dim=0)
        gram += rows.T @ rows
        count += len(rows)
    mean = total / count
    if kept == width:
        return mean + origin, torch.eye(width, dtype=torch.float64, device=mean.device)
    _, directions = torch.linalg.eigh(gram / count - torch.outer(mean, mean))
    return mean + origin, directions[:, -kept:]


def _fetched(source: Embeddings, rows: np.ndarray, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for piece in batches(rows, batch_size):
        eva, clip = source.fetch(piece)
        yield eva.double(), clip.double()
