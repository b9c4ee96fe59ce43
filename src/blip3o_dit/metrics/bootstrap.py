"""Confidence intervals: bootstrap over held-out samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from blip3o_dit.utils.stateless_random import stateless_generator

LEVEL = 0.95
MIN_SAMPLES = 20  # with fewer samples a bootstrap says nothing
KEPT = 2**22  # most numbers of resamples that are kept from metric to metric, 32 MiB


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; `low` and `high` are None where there are too few samples for one."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        return {"value": _finite(self.value), "low": _finite(self.low), "high": _finite(self.high)}


@dataclass(frozen=True)
class Bootstrap:
    """Resamples of `count` samples with replacement (Efron 1979), the same ones for every metric.

    Because two samplers see the same resamples, the interval of a difference is a paired one.
    """

    count: int
    replicates: int = 1000
    seed: int = 0

    def means(self, columns: np.ndarray) -> np.ndarray:
        """Means of the columns over each resample, [n, m] -> [replicates, m]."""
        resamples = _kept if self.count * self.replicates <= KEPT else _resamples
        out = np.empty((self.replicates, columns.shape[1]))
        for row, shares in zip(out, resamples(self.count, self.replicates, self.seed), strict=True):
            row[:] = shares @ columns
        return out

    def mean(self, values: np.ndarray) -> Estimate:
        """The mean of one value per sample, [n]."""
        return self.function(values[:, None], lambda means: means[..., 0])

    def function(self, columns: np.ndarray, of_means: Callable[[np.ndarray], np.ndarray]) -> Estimate:
        """A function of the columns' means: `of_means` takes [..., m] and returns [...]."""
        value = float(of_means(columns.mean(axis=0)))
        if self.count < MIN_SAMPLES:
            return Estimate(value)
        return self._interval(value, of_means(self.means(columns)))

    def median(self, values: np.ndarray) -> Estimate:
        """The median of one value per sample, [n]."""
        if self.count < MIN_SAMPLES:
            return Estimate(float(np.median(values)))
        generator = stateless_generator(self.seed, "bootstrap of medians")
        chosen = (generator.integers(0, self.count, self.count) for _ in range(self.replicates))
        found = [np.median(values[rows]) for rows in chosen]
        return self._interval(float(np.median(values)), np.array(found))

    def _interval(self, value: float, replicates: np.ndarray) -> Estimate:
        low, high = np.quantile(replicates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(value, float(low), float(high))


def _resamples(count: int, replicates: int, seed: int) -> Iterator[np.ndarray]:
    """The share of each sample in a resample, [count], for each of the resamples."""
    generator = stateless_generator(seed, "bootstrap")
    for _ in range(replicates):
        chosen = generator.integers(0, count, count)
        yield np.bincount(chosen, minlength=count) / count


@lru_cache(maxsize=2)
def _kept(count: int, replicates: int, seed: int) -> list[np.ndarray]:
    return list(_resamples(count, replicates, seed))


def half_samples(count: int, *, replicates: int, seed: int) -> Iterator[np.ndarray]:
    """Halves of 0..count-1 without replacement, ascending.

    The scores of halves scatter around their mean as those of resamples of full size do (for scores that
    are smooth in the data; Shao and Tu 1995, chapter 5), and a half holds no vector twice: duplicates
    would break nearest-neighbour balls and kernel sums.
    """
    generator = stateless_generator(seed, "half samples")
    for _ in range(replicates):
        yield np.sort(generator.permutation(count)[: count // 2])


def from_half_samples(
    value: float, replicates: np.ndarray, *, limits: tuple[float, float] = (-np.inf, np.inf)
) -> Estimate:
    """value +- 1.96 standard deviations of the half-sample scores, inside the score's limits."""
    if not len(replicates):
        return Estimate(value)
    margin = 1.96 * float(np.std(replicates, ddof=1))
    return Estimate(value, max(limits[0], value - margin), min(limits[1], value + margin))


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
