"""Ridge regression of target tokens on condition tokens, streamed.

Top-down: the features a map is linear in, the spread around what it says, and two regressions: `TokenRidge`
from the token at a position, `NeighbourhoodRidge` from the 3x3 tokens around it. What determines a map is in
`normal_equations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.normal_equations import USUAL_PENALTY, Moments, search_penalty

# Bounds the normal equations of a ridge regression on a 3x3 neighbourhood: they hold the square of this.
MAX_RIDGE_FEATURES = 2560

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
