"""Energy score, spread against error and diversity against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import gammaln
from torch import Tensor

from blip3o_dit.metrics.conditional import diversity, energy_score, spread_and_error, spread_error_ratio


def vectors(count: int = 60, width: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


# Energy score: the mean of the norm of an isotropic Gaussian of deviation s in D dimensions is
# s sqrt(2) Gamma((D + 1) / 2) / Gamma(D / 2).


def mean_norm(deviation: float, width: int) -> float:
    return deviation * np.sqrt(2) * np.exp(gammaln((width + 1) / 2) - gammaln(width / 2))


def gaussian_score(bias: float, predicted: float, width: int = 5, count: int = 60_000) -> float:
    """Mean energy score of N(bias, predicted^2) for truths from N(0, 1)."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(count, width, generator=generator)
    draws = bias + predicted * torch.randn(4, count, width, generator=generator)
    return float(energy_score(draws, truth).mean())


def test_the_energy_score_of_a_perfect_sampler_is_the_closed_form() -> None:
    expected = (mean_norm(np.sqrt(2), 5) - mean_norm(np.sqrt(2), 5) / 2) / np.sqrt(5)
    assert gaussian_score(0.0, 1.0) == pytest.approx(expected, rel=5e-3)


def test_the_energy_score_of_a_wrong_width_is_the_closed_form() -> None:
    for predicted in (0.3, 2.0):
        between = mean_norm(np.sqrt(2) * predicted, 5) / 2
        expected = (mean_norm(np.sqrt(1 + predicted**2), 5) - between) / np.sqrt(5)
        assert gaussian_score(0.0, predicted) == pytest.approx(expected, rel=5e-3)


def test_nothing_scores_below_the_true_distribution() -> None:
    best = gaussian_score(0.0, 1.0)
    for bias, predicted in ((0.0, 0.0), (0.0, 0.7), (0.0, 1.4), (0.3, 1.0), (0.0, 3.0)):
        assert gaussian_score(bias, predicted) > best + 0.005, (bias, predicted)


def test_the_energy_score_of_the_mean_predictor_is_its_distance() -> None:
    truth = vectors()
    draws = torch.zeros(4, 60, 7)
    expected = truth.norm(dim=1).double() / np.sqrt(7)
    torch.testing.assert_close(energy_score(draws, truth), expected)
    torch.testing.assert_close(energy_score(draws[:1], truth), expected)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_energy_score_is_its_definition(count: int) -> None:
    truth, draws = vectors(4), torch.stack([vectors(4, seed=seed) for seed in range(1, count + 1)])
    for row in range(4):
        near = np.mean([float((draws[k, row] - truth[row]).norm()) for k in range(count)])
        pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
        between = np.mean([float((draws[a, row] - draws[b, row]).norm()) for a, b in pairs])
        expected = (near - between / 2) / np.sqrt(7)
        assert float(energy_score(draws, truth)[row]) == pytest.approx(expected, rel=1e-5)


# Spread against error


@pytest.mark.parametrize("count", [2, 4, 10])
@pytest.mark.parametrize(("width", "ratio"), [(1.0, 1.0), (0.5, 0.5), (2.0, 2.0)])
def test_the_ratio_tells_calibrated_from_not(count: int, width: float, ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(20_000, 6, generator=generator)
    draws = width * torch.randn(count, 20_000, 6, generator=generator)
    found = spread_and_error(draws, truth)
    # error of the mean of K draws: 1 + width^2 / K; spread: (1 + 1 / K) width^2
    expected = np.sqrt((1 + 1 / count) * width**2 / (1 + width**2 / count))
    assert float(spread_error_ratio(float(found.spread.mean()), float(found.error.mean()))) == pytest.approx(
        expected, rel=0.01
    )
    assert (expected > 1) == (ratio > 1) and (expected < 1) == (ratio < 1)


def test_a_collapsed_sampler_has_no_spread() -> None:
    same = torch.zeros(4, 60, 7)
    found = spread_and_error(same, vectors())
    assert float(spread_error_ratio(float(found.spread.mean()), float(found.error.mean()))) == 0.0
    one = spread_and_error(same[:1], vectors())
    assert (one.spread == 0).all()
    torch.testing.assert_close(one.error, found.error)


def test_diversity_is_one_for_unrelated_samples_and_zero_for_equal_ones() -> None:
    truth = vectors(20_000, 6)
    draws = torch.stack([vectors(20_000, 6, seed=seed) for seed in (1, 2, 3)])
    spread = float(spread_and_error(draws, truth).spread.mean())
    variance = float(truth.var(dim=0).mean())
    assert float(diversity(spread, num_samples=3, total_variance=variance)) == pytest.approx(1.0, rel=0.02)
    assert float(diversity(0.0, num_samples=3, total_variance=variance)) == 0.0
    assert np.isnan(diversity(0.5, num_samples=3, total_variance=0.0))
