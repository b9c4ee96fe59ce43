"""Ridge regression of target tokens on condition tokens, streamed.

Top-down: the features a map is linear in, the spread around what it says, the moments that determine it, the
choice of the penalties, and two regressions: `TokenRidge` from the token at a position, `NeighbourhoodRidge`
from the 3x3 tokens around it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_dit.data.embeddings import Embeddings, batches

# Bounds the normal equations of a ridge regression on a 3x3 neighbourhood: they hold the square of this.
MAX_RIDGE_FEATURES = 2560

# Tried by `search_penalty`; relative to each feature's variance.
PENALTIES = tuple(10.0**exponent for exponent in range(-6, 3))

# Of ten, within which `search_penalties` moves that of a group of features.
FEWEST_POWER, MOST_POWER = -6, 4

# Channels of the target whose error chooses them, and how many choices are tried.
SEARCHED, TRIES = 32, 10

# Where there is nothing to choose it by.
USUAL_PENALTY = 1e-3

# Of a predicted deviation, in units of its channel's: no token's noise collapses, and none's drowns the rest.
SPREAD_BOUNDS = (0.2, 4.0)


def neighbour_components(condition_dim: int) -> int:
    """Principal components of each of eight neighbours that keep to `MAX_RIDGE_FEATURES`."""
    return min(condition_dim, max(1, (MAX_RIDGE_FEATURES - condition_dim) // 8))


def context_components(condition_dim: int) -> int:
    """Principal components by which a picture's mean enters `context_features`, r.

    A seventh of what the token itself leaves of `MAX_RIDGE_FEATURES`; the rest is its neighbours'.
    """
    return min(condition_dim, max(1, (MAX_RIDGE_FEATURES - condition_dim) // 7))


def context_sizes(condition_dim: int, components: int, num_tokens: int) -> tuple[int, ...]:
    """Features in each group of `context_features`, with r = `components`.

    Two thirds of what is left for neighbours go to the 8 nearest, and to no one more than the mean has.
    """
    left = max(0, MAX_RIDGE_FEATURES - condition_dim - components)
    nearest = min(components, max(1, left * 2 // 3 // 8))
    further = min(nearest, max(1, (left - 8 * nearest) // 16))
    return condition_dim, 8 * nearest, 16 * further, components, num_tokens


def source_components(source: str, condition_dim: int) -> int:
    """Principal components of other tokens that a source (`flow/config.py`) uses, r."""
    rules = {"ridge_3x3": neighbour_components, "noise": None, "ridge": None}
    rule = rules.get(source, context_components)
    return 0 if rule is None else rule(condition_dim)


def source_features(condition: Tensor, components: Tensor | None, context: bool = False) -> Tensor:
    """Features of the informed source's regression, [B, N, F], of a normalised condition [B, N, C].

    The tokens themselves, and with `components` also their neighbours (`neighbourhood_features`) or all that
    is around them (`context_features`).
    """
    if components is None:
        return condition
    return (context_features if context else neighbourhood_features)(condition, components)


def neighbourhood_features(centred: Tensor, components: Tensor) -> Tensor:
    """Centred tokens [n, N, C] -> [n, N, C + 8 r]: the token, then its eight neighbours' components.

    Args:
        components: [C, r]; a neighbour enters as its projection on them. Outside the grid is zero.
    """
    return torch.cat([centred, *_neighbours(centred @ components, distance=1)], dim=-1)


def context_features(centred: Tensor, components: Tensor) -> Tensor:
    """Centred tokens [n, N, C] -> [n, N, F]: five groups, of the sizes that `context_sizes` says.

    The token; its 8 nearest neighbours; the 16 around these; the picture's mean token; one for each position.
    All but the token enter by their leading components, of which `components` [C, r] holds the mean's.
    """
    width, kept = components.shape
    _, nearest, further, *_ = context_sizes(width, kept, centred.shape[1])
    projected = centred @ components
    positions = torch.eye(centred.shape[1], dtype=centred.dtype, device=centred.device)
    groups = [
        centred,
        *_neighbours(projected[..., -(nearest // 8) :], distance=1),
        *_neighbours(projected[..., -(further // 16) :], distance=2),
        projected.mean(dim=1, keepdim=True).expand_as(projected),
        positions.expand(centred.shape[0], -1, -1),  # len() would fix an exported batch
    ]
    return torch.cat(groups, dim=-1)


def _neighbours(tokens: Tensor, distance: int) -> list[Tensor]:
    """Of tokens [n, N, r] on a square grid those so many rows or columns away, row-major, [n, N, r] each.

    They are a square's edge: 8 at a distance of 1, 16 at a distance of 2.
    """
    side = math.isqrt(tokens.shape[1])
    padded = F.pad(tokens.unflatten(1, (side, side)), (0, 0, distance, distance, distance, distance))
    offsets = range(2 * distance + 1)
    return [
        padded[:, dy : dy + side, dx : dx + side].flatten(1, 2)
        for dy in offsets
        for dx in offsets
        if {dy, dx} & {0, 2 * distance}
    ]


def spread_features(guess: Tensor) -> Tensor:
    """What the logarithm of a spread is linear in, [..., 2 C], of a regression's guess [..., C]."""
    return torch.cat([guess, guess.square()], dim=-1)


def relative_spread(guess: Tensor, weight: Tensor) -> Tensor:
    """Deviation of targets from their guess [..., C], in units of that of their channel, [..., C].

    Its logarithm is linear in the guess and its square, weight [2 C + 1, C] with the bias last
    (multiplicative heteroscedasticity, Harvey 1976, Econometrica 44). A weight of zero says 1; what is said
    lies in `SPREAD_BOUNDS`.
    """
    logarithm = spread_features(guess) @ weight[:-1] + weight[-1]
    low, high = (math.log(bound) for bound in SPREAD_BOUNDS)
    return logarithm.clamp(low, high).exp()


def principal_components(
    source: Embeddings, indices: np.ndarray, batch_size: int, kept: int, *, ordered: bool = False
) -> tuple[Tensor, Tensor]:
    """Mean condition token [C_eva], and `kept` leading principal directions [C_eva, r], these last.

    Where all are kept they are the channels themselves, unless some will be taken of them (`ordered`).
    """
    width = source.condition_dim
    origin = token_origins(source, indices)[0]
    total, gram, count = torch.zeros_like(origin), origin.new_zeros(width, width), 0
    for eva, _ in _read_float64(source, indices, batch_size):
        rows = eva.flatten(0, 1) - origin
        total += rows.sum(dim=0)
        gram += rows.T @ rows
        count += len(rows)
    mean = total / count
    if kept == width and not ordered:
        return mean + origin, torch.eye(width, dtype=torch.float64, device=mean.device)
    _, directions = torch.linalg.eigh(gram / count - torch.outer(mean, mean))
    return mean + origin, directions[:, -kept:]


@dataclass(frozen=True)
class GroupPenalties:
    """Ridge penalties of groups of features, in units of a group's mean variance, and the groups' sizes.

    In units of each feature's own variance, directions in which few samples hardly differ would be free, and
    what lies there of other samples would count a thousandfold.
    """

    penalties: tuple[float, ...]
    sizes: tuple[int, ...]

    def times_variance(self, variance: Tensor) -> Tensor:
        """What is added to a covariance's diagonal, of which this is one before: [F] -> [F]."""
        added = [
            (penalty * group.mean()).clamp(min=1e-12).expand_as(group)
            for penalty, group in zip(self.penalties, variance.split(self.sizes), strict=True)
        ]
        return torch.cat(added)


class Moments:
    """Sums of products of features [F] and targets [C], taken about an origin near the data, float64.

    Those of two sets of rows can be merged, and give the error of any linear map on the rows.
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
        """Moments of the rows that are not in `other`, which holds a part of these rows."""
        rest = copy.copy(self)
        rest.gram, rest.cross = self.gram - other.gram, self.cross - other.cross
        rest.target_squares = self.target_squares - other.target_squares
        return rest

    def of_channels(self, channels: slice) -> Moments:
        """Moments of the same rows with some of the target's channels."""
        some = copy.copy(self)
        some.cross, some.target_squares = self.cross[:, channels], self.target_squares[channels]
        return some

    def solve(self, penalty: float | GroupPenalties) -> tuple[Tensor, Tensor]:
        """(W [F, C], bias [C]) for a ridge penalty in units of each feature's variance, or for one of each
        group's mean variance."""
        covariance, cross_covariance, mean_c, mean_x = self.centred()
        diagonal = covariance.diagonal()
        if isinstance(penalty, GroupPenalties):
            diagonal += penalty.times_variance(diagonal)
        else:
            diagonal.mul_(1 + penalty).clamp_(min=1e-12 * penalty)
        weight = _solver(covariance)(cross_covariance)
        return weight, mean_x - mean_c @ weight

    def centred(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Covariance [F, F], cross-covariance [F, C], mean of the features [F] and of the targets [C]."""
        count = self.count
        mean_c, mean_x = self.gram[-1, :-1] / count, self.cross[-1] / count
        covariance = self.gram[:-1, :-1] / count - torch.outer(mean_c, mean_c)
        cross_covariance = self.cross[:-1] / count - torch.outer(mean_c, mean_x)
        return covariance, cross_covariance, mean_c, mean_x

    def squared_error(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Mean of (x - W^T c - bias)^2 per channel, [C]."""
        return self.error_and_gradient(weight, bias)[0]

    def error_and_gradient(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """`squared_error` [C], and its gradient to W and, last, to the bias, [F + 1, C]."""
        full = torch.cat([weight, bias[None]])
        explained = self.gram @ full
        error = (self.target_squares + (full * (explained - 2 * self.cross)).sum(dim=0)) / self.count
        return error, 2 * (explained - self.cross) / self.count


def _solver(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Multiplies by a symmetric matrix's inverse: by a Cholesky factorisation, or by LU where rounding leaves
    it not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return partial(torch.linalg.solve, matrix)
    return lambda right: torch.cholesky_solve(right, factor)


def search_penalty(moments: Moments, validation: Moments) -> tuple[float, tuple[Tensor, Tensor]]:
    """The penalty of `PENALTIES` with the least error on the validation moments, and its map (W, bias).

    Walks from the middle of the list while the error falls: as a function of the penalty it has one valley in
    practice, and at full width each penalty costs half a second.
    """
    tried: dict[int, tuple[float, tuple[Tensor, Tensor]]] = {}

    def error(place: int) -> float:
        if place not in tried:
            solution = moments.solve(PENALTIES[place])
            error = validation.squared_error(*solution) * _units(validation)
            tried[place] = float(error.sum()), solution
        return tried[place][0]

    place = len(PENALTIES) // 2
    for step in (-1, 1):
        while 0 <= place + step < len(PENALTIES) and error(place + step) < error(place):
            place += step
    return PENALTIES[place], tried[place][1]


def search_penalties(
    moments: Moments, validation: Moments, sizes: tuple[int, ...]
) -> tuple[GroupPenalties, tuple[Tensor, Tensor]]:
    """A penalty for each group of features, and the map with these.

    From `USUAL_PENALTY` for all they go down the error on the validation moments, each by the sign of its
    derivative in steps that grow until it turns (Rprop; Riedmiller and Braun, 1993): what tells little is
    nearly left out, and what tells much is not held back by it. The error is that of some `SEARCHED`
    channels, spread over all.
    """
    some = slice(None, None, -(-len(moments.target_squares) // SEARCHED))
    searched = _PenaltyError(moments.of_channels(some), validation.of_channels(some), sizes)
    powers = torch.full((len(sizes),), math.log10(USUAL_PENALTY), dtype=torch.float64)
    step, before = torch.ones_like(powers), torch.zeros_like(powers)
    tried: list[tuple[float, list[float]]] = []
    for _ in range(TRIES):
        error, gradient = searched(powers)
        tried.append((error, powers.tolist()))
        step = (step * torch.where(gradient * before < 0, 0.5, 1.5)).clamp(max=2.0)
        powers = (powers - step * gradient.sign()).clamp(FEWEST_POWER, MOST_POWER)
        before = gradient
    best = min(tried)[1]
    penalties = GroupPenalties(tuple(10.0**power for power in best), sizes)
    return penalties, moments.solve(penalties)


class _PenaltyError:
    """The error on validation moments by the powers of ten of groups' penalties [G], and its gradient [G].

    With A the covariance and D the penalties on its diagonal the map is W = (A + D)^-1 C, so that a change
    of D changes it by -(A + D)^-1 dD W.
    """

    def __init__(self, moments: Moments, validation: Moments, sizes: tuple[int, ...]) -> None:
        self.validation, self.sizes = validation, sizes
        self.covariance, self.cross, self.mean_c, self.mean_x = moments.centred()
        self.variance, self.units = self.covariance.diagonal().clone(), _units(validation)

    def __call__(self, powers: Tensor) -> tuple[float, Tensor]:
        penalties = GroupPenalties(tuple((10.0**powers).tolist()), self.sizes)
        added = penalties.times_variance(self.variance)
        matrix = self.covariance.clone()
        matrix.diagonal().add_(added)
        solve = _solver(matrix)
        weight = solve(self.cross)
        bias = self.mean_x - self.mean_c @ weight
        error, gradient = self.validation.error_and_gradient(weight, bias)
        gradient *= self.units
        to_weight = gradient[:-1] - torch.outer(self.mean_c, gradient[-1])
        to_added = -(solve(to_weight) * weight).sum(dim=1)
        slopes = [group.sum() for group in (math.log(10) * to_added * added).split(self.sizes)]
        return float((error * self.units).sum()), torch.stack(slopes).cpu()


def _units(moments: Moments) -> Tensor:
    """What a channel's error counts, [C]: 1 / (its variance x their number), or nothing if it is constant."""
    variance = moments.target_squares / moments.count - (moments.cross[-1] / moments.count).square()
    varies = variance > 1e-12 * variance.max()
    return torch.where(varies, 1 / variance.where(varies, 1.0), 0.0) / varies.sum().clamp(min=1)


@dataclass(frozen=True)
class TokenRidge:
    """Ridge regression from each condition token to the target token at its position.

    One map for all positions, x = W^T (c - origin) + bias, that minimises the mean of |x - x_hat|^2 plus
    penalty |W|^2 over standardised conditions (Hoerl and Kennard, 1970), by normal equations in float64.
    With `components` the neighbours of c are features too (`source_features`).
    """

    origin: Tensor
    components: Tensor | None
    weight: Tensor
    bias: Tensor
    penalty: float

    @classmethod
    def fit(cls, source: Embeddings, indices: np.ndarray, **options: Any) -> TokenRidge:
        """Fitted on all samples; for the options see `fit_with_holdout`."""
        return cls.fit_with_holdout(source, indices, **options)[0]

    @classmethod
    def fit_with_holdout(
        cls,
        source: Embeddings,
        indices: np.ndarray,
        *,
        penalty: float | None = None,
        validation: np.ndarray | None = None,
        batch_size: int = 16,
    ) -> tuple[TokenRidge, TokenRidge]:
        """The map fitted on all samples, and with the same penalty the one without the validation samples.

        Streamed over the samples at `indices`, and those at `validation`, if any. The penalty is relative to
        each feature's variance; None takes the one of `PENALTIES` that does best on the validation samples,
        and `USUAL_PENALTY` without any.
        """
        origin, components = cls._origin_and_components(source, indices, batch_size)
        x_origin = token_origins(source, indices)[1]
        held_out = indices[:0] if validation is None else validation
        moments, holdout = (
            token_moments(source, rows, (origin, x_origin), batch_size, components)
            for rows in (indices, held_out)
        )
        if penalty is None and len(held_out):
            penalty, without_validation = search_penalty(moments, holdout)
        else:
            penalty = USUAL_PENALTY if penalty is None else penalty
            without_validation = moments.solve(penalty)
        moments.merge(holdout)
        final = moments.solve(penalty) if len(held_out) else without_validation

        def ridge(weight: Tensor, bias: Tensor) -> TokenRidge:
            kept = None if components is None else components.float()
            return cls(origin.float(), kept, weight.float(), (bias + x_origin).float(), penalty)

        return ridge(*final), ridge(*without_validation)

    @staticmethod
    def _origin_and_components(
        source: Embeddings, indices: np.ndarray, batch_size: int
    ) -> tuple[Tensor, Tensor | None]:
        return token_origins(source, indices)[0], None

    def predict(self, eva: Tensor) -> Tensor:
        """[n, N, C_eva] -> [n, N, C]."""
        return source_features(eva.float() - self.origin, self.components) @ self.weight + self.bias


class NeighbourhoodRidge(TokenRidge):
    """Ridge regression from the 3x3 condition tokens around a position to the target token there.

    The token itself enters whole. Its eight neighbours enter whole while there are at most 2,560 features,
    and by their leading principal components above (`neighbour_components`). Outside the grid is
    the mean token.
    """

    @staticmethod
    def _origin_and_components(
        source: Embeddings, indices: np.ndarray, batch_size: int
    ) -> tuple[Tensor, Tensor | None]:
        return principal_components(source, indices, batch_size, neighbour_components(source.condition_dim))


def token_moments(
    source: Embeddings,
    rows: np.ndarray,
    origins: tuple[Tensor, Tensor],
    batch_size: int,
    components: Tensor | None = None,
) -> Moments:
    """Moments of these samples' `source_features` and target tokens, about the origins."""
    width = source.condition_dim + (0 if components is None else 8 * components.shape[1])
    sums = Moments(width, source.target_dim)
    for eva, clip in _read_float64(source, rows, batch_size):
        features = source_features(eva - origins[0], components)
        sums.add(features.flatten(0, 1), clip.flatten(0, 1) - origins[1])
    return sums


def token_origins(source: Embeddings, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """Some token of each side: moments about zero would drown a small variance in a large mean."""
    eva, clip = source.fetch(indices[:1])
    return eva[0, 0].double(), clip[0, 0].double()


def _read_float64(source: Embeddings, rows: np.ndarray, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for piece in batches(rows, batch_size):
        eva, clip = source.fetch(piece)
        yield eva.double(), clip.double()
