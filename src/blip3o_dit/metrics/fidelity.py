"""How close generated tokens are to the true ones, and what they are good for. Pure functions of tensors.

Three kinds of questions are answered here: is each token near its own true token (fidelity), can the
generated tokens do the true ones' work (use), and do several samples of one condition spread as the truth
does (conditional). Distances between whole distributions are in `distribution.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Number = TypeVar("Number", np.ndarray, float)


def fidelity(generated: Tensor, target: Tensor, target_mean: Tensor) -> dict[str, float]:
    """The fidelity metrics of one batch; see `FidelitySums`. [n, N, C], [n, N, C], [C]."""
    sums = FidelitySums(target_mean)
    sums.add(generated, target)
    return sums.result()


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
    """Each generated token against its true one, [n, N, C] both, in float64.

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
        scalars = torch.stack(
            [
                torch.tensor(float(len(target)), dtype=torch.float64),
                torch.tensor(float(tokens.cosine.numel()), dtype=torch.float64),
                tokens.cosine.sum(),
                tokens.cosine.square().sum(),
                tokens.pooled_cosine.sum(),
                tokens.distance.sum(),
                tokens.distance.square().sum(),
                tokens.norm_ratio.sum(),
            ]
        )
        residual = tokens.squares.sum(dim=(0, 1))
        spread = (target.cpu().double() - self._mean).square_().sum(dim=(0, 1))
        return torch.cat([scalars, residual, spread])

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


# Use

# Cosines of unit float32 vectors closer than this are rounding apart.
TIE = 1e-6


def retrieval_ranks(queries: Tensor, gallery: Tensor, *, block: int = 256) -> Tensor:
    """Rank, by cosine, of gallery row i among all gallery rows for query i; 1 is best. [n, C] x2 -> [n].

    Equal similarities share the middle of the places they take, so a constant gallery ranks everything
    at (n + 1) / 2 instead of first.
    """
    queries, gallery = F.normalize(queries.float(), dim=-1), F.normalize(gallery.float(), dim=-1)
    ranks = []
    for start in range(0, len(queries), block):
        similarity = queries[start : start + block] @ gallery.T
        rows = torch.arange(len(similarity))
        own = similarity[rows, rows + start][:, None]
        better = (similarity > own + TIE).sum(dim=1)
        equal = ((similarity - own).abs() <= TIE).sum(dim=1) - 1
        ranks.append(1.0 + better + equal / 2)
    return torch.cat(ranks).double()


def neighbour_agreement(generated: Tensor, truth: Tensor, *, k: int = 10, block: int = 256) -> Tensor:
    """Share of a true vector's k nearest other true vectors that its generated vector finds too, in [0, 1].

    [n, C], [n, C] -> [n]. Nearness is the cosine; both search all true vectors but the sample's own.
    Chance is k / (n - 1).

    Raises:
        ValueError: unless 1 <= k < n.
    """
    if not 1 <= k < len(truth):
        raise ValueError(f"k: expected 1 to {len(truth) - 1}, one less than the vectors, found {k}")
    generated, truth = F.normalize(generated.float(), dim=-1), F.normalize(truth.float(), dim=-1)
    shares = []
    for start in range(0, len(truth), block):
        found = []
        for vectors in (truth, generated):
            similarity = vectors[start : start + block] @ truth.T
            rows = torch.arange(len(similarity))
            similarity[rows, rows + start] = -torch.inf
            found.append(similarity.topk(k, dim=1).indices)
        shared = (found[0][:, :, None] == found[1][:, None, :]).any(dim=2)
        shares.append(shared.double().mean(dim=1))
    return torch.cat(shares)


class LinearProbe:
    """Multinomial logistic regression on standardised features, the same objective as scikit-learn's.

    Minimises the mean cross-entropy plus |W|^2 / (2 inverse_penalty n) over W [F, classes] and a free bias,
    by L-BFGS in float64; features that never vary are left out by their zero.

    Args:
        features: [n, F] of true tokens. labels: n names, of at least two kinds.
        inverse_penalty: scikit-learn's C.

    Raises:
        ValueError: for fewer than two classes.
    """

    def __init__(
        self, features: Tensor, labels: list[str], *, inverse_penalty: float = 0.1, max_steps: int = 200
    ) -> None:
        self.classes = sorted(set(labels))
        if len(self.classes) < 2:
            raise ValueError(f"labels: expected at least two classes, found {self.classes}")
        numbers = {name: number for number, name in enumerate(self.classes)}
        wanted = torch.tensor([numbers[label] for label in labels])
        features = features.double()
        self._mean, std = features.mean(dim=0), features.std(dim=0, correction=0)
        self._scale = torch.where(std > 1e-9 * std.max(), 1.0 / std.clamp(min=1e-300), torch.zeros_like(std))
        rows = self._standardize(features)
        self._weight = torch.zeros(rows.shape[1], len(self.classes), dtype=torch.float64, requires_grad=True)
        self._bias = torch.zeros(len(self.classes), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [self._weight, self._bias], max_iter=max_steps, history_size=20, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            penalty = self._weight.square().sum() / (2 * inverse_penalty * len(rows))
            value = F.cross_entropy(rows @ self._weight + self._bias, wanted) + penalty
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(loss)
        self._weight, self._bias = self._weight.detach(), self._bias.detach()

    def predict(self, features: Tensor) -> list[str]:
        """[n, F] -> n class names."""
        scores = self._standardize(features.double()) @ self._weight + self._bias
        return [self.classes[number] for number in scores.argmax(dim=1).tolist()]

    def _standardize(self, features: Tensor) -> Tensor:
        return (features - self._mean) * self._scale


# Conditional: several samples of one condition


def energy_score(draws: Tensor, truth: Tensor) -> Tensor:
    """The energy score of each sample, [K, n, D], [n, D] -> [n], divided by sqrt(D); lower is better.

    mean_k |x_k - y| - 1/2 mean_{k != l} |x_k - x_l| (Gneiting and Raftery 2007, equation 21, in its
    unbiased form). It is strictly proper: on average no distribution beats the true conditional one, so
    neither blurring nor noise can win. One draw is read as a certain prediction, whose score is its
    distance. In units of the standard deviation of a coordinate when these are standardised.
    """
    count = len(draws)
    distance = (draws - truth).norm(dim=-1).double().mean(dim=0)
    if count == 1:
        return distance / draws.shape[-1] ** 0.5
    between = torch.zeros_like(distance)
    for k in range(1, count):
        between += (draws[k:] - draws[:-k]).norm(dim=-1).double().sum(dim=0)
    return (distance - between / (count * (count - 1))) / draws.shape[-1] ** 0.5


@dataclass(frozen=True)
class SpreadAndError:
    """Per sample [n], mean squares per coordinate: `spread` of the draws, `error` of their mean.

    `spread` is the unbiased variance of K draws times (1 + 1 / K), which for draws from the true conditional
    distribution is what `error` is on average (Fortin et al. 2014, equation 15).
    """

    spread: Tensor
    error: Tensor


def spread_and_error(draws: Tensor, truth: Tensor) -> SpreadAndError:
    """[K, n, D], [n, D] -> two times [n]. One draw has no spread: zero."""
    count = len(draws)
    centre = draws.mean(dim=0)
    error = (centre - truth).square().double().mean(dim=-1)
    if count == 1:
        return SpreadAndError(torch.zeros_like(error), error)
    # Tensor.var over the first dimension is many times slower
    variance = (draws - centre).square().sum(dim=0).double().mean(dim=-1) / (count - 1)
    return SpreadAndError((1 + 1 / count) * variance, error)


def spread_error_ratio(mean_spread: Number, mean_error: Number) -> Number:
    """sqrt(mean spread / mean error): 1 is calibrated, below 1 over-confident, 0 a collapsed sampler."""
    return np.sqrt(mean_spread / np.maximum(mean_error, 1e-300))


def diversity(mean_spread: Number, *, num_draws: int, total_variance: float) -> Number:
    """How different the draws of one condition are beside unrelated true samples: 0 collapsed, 1 as much.

    Root of the mean squared distance of two draws over that of two true samples.

    Args:
        mean_spread: mean of `SpreadAndError.spread` of `num_draws` draws.
        total_variance: mean variance of a coordinate over the true samples.
    """
    if total_variance <= 0:
        return mean_spread * np.nan
    return np.sqrt(mean_spread / (1 + 1 / num_draws) / total_variance)
