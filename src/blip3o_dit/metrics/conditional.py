"""Scores of several samples of one condition: energy score, spread against error, diversity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Number = TypeVar("Number", np.ndarray, float)


def energy_score(samples: Tensor, reference: Tensor) -> Tensor:
    """The energy score of each condition, [K, n, D], [n, D] -> [n], divided by sqrt(D); lower is better.

    mean_k |x_k - y| - 1/2 mean_{k != l} |x_k - x_l| (Gneiting and Raftery 2007, equation 21, in its
    unbiased form). It is strictly proper: on average no distribution beats the true conditional one, so
    neither blurring nor noise can win. A single sample counts as a certain prediction, whose score is its
    distance. In units of the standard deviation of a coordinate when these are standardised.
    """
    count = len(samples)
    distance = (samples - reference).norm(dim=-1).double().mean(dim=0)
    if count == 1:
        return distance / samples.shape[-1] ** 0.5
    between = torch.zeros_like(distance)
    for k in range(1, count):
        between += (samples[k:] - samples[:-k]).norm(dim=-1).double().sum(dim=0)
    return (distance - between / (count * (count - 1))) / samples.shape[-1] ** 0.5


@dataclass(frozen=True)
class SpreadAndError:
    """Per condition [n], mean squares per coordinate: `spread` of the samples, `error` of their mean.

    `spread` is the unbiased variance of K samples times (1 + 1 / K), which for samples of the true
    conditional distribution is what `error` is on average (Fortin et al. 2014, equation 15).
    """

    spread: Tensor
    error: Tensor


def spread_and_error(samples: Tensor, reference: Tensor) -> SpreadAndError:
    """[K, n, D], [n, D] -> two times [n]. A single sample has no spread: zero."""
    count = len(samples)
    centre = samples.mean(dim=0)
    error = (centre - reference).square().double().mean(dim=-1)
    if count == 1:
        return SpreadAndError(torch.zeros_like(error), error)
    # Tensor.var over the first dimension is many times slower
    variance = (samples - centre).square().sum(dim=0).double().mean(dim=-1) / (count - 1)
    return SpreadAndError((1 + 1 / count) * variance, error)


def spread_error_ratio(mean_spread: Number, mean_error: Number) -> Number:
    """sqrt(mean spread / mean error): 1 is calibrated, below 1 over-confident, 0 a collapsed sampler."""
    return np.sqrt(mean_spread / np.maximum(mean_error, 1e-300))


def diversity(mean_spread: Number, *, num_samples: int, total_variance: float) -> Number:
    """How different samples of one condition are: 0 collapsed, 1 as different as unrelated ones.

    Root of the mean squared distance of two samples over that of two reference samples, from the mean of
    `SpreadAndError.spread` of `num_samples` samples and a coordinate's mean variance over the reference ones.
    """
    if total_variance <= 0:
        return mean_spread * np.nan
    return np.sqrt(mean_spread / (1 + 1 / num_samples) / total_variance)
