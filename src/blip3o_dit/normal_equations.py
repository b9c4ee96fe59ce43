"""The normal equations of ridge regressions: the moments that determine a map, and the choice of penalties.

Top-down: penalties of groups of features, moments and what they solve, and the searches for one penalty and
for one of each group.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

# Tried by `search_penalty`; relative to each feature's variance.
PENALTIES = tuple(10.0**exponent for exponent in range(-6, 3))

# Of ten, within which `search_penalties` moves that of a group of features.
FEWEST_POWER, MOST_POWER = -6, 4

# Channels of the target whose error chooses them, and how many choices are tried.
SEARCHED, TRIES = 32, 10

# Where there is nothing to choose it by.
USUAL_PENALTY = 1e-3


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
