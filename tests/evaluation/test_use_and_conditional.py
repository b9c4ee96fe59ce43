"""Retrieval, neighbours, probe, energy score and spread against scikit-learn, SciPy and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import gammaln
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from blip3o_dit.metrics.fidelity import (
    LinearProbe,
    diversity,
    energy_score,
    neighbour_agreement,
    retrieval_ranks,
    spread_and_error,
    spread_error_ratio,
)


def vectors(count: int = 60, width: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


# Retrieval


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_ranks_are_those_of_scikit_learns_cosines(block: int) -> None:
    gallery = vectors()
    queries = gallery + 1.5 * vectors(seed=1)
    similarity = cosine_similarity(queries.numpy(), gallery.numpy())
    expected = 1 + (similarity > similarity.diagonal()[:, None]).sum(axis=1)
    assert retrieval_ranks(queries, gallery, block=block).tolist() == expected.tolist()


def test_a_perfect_query_ranks_first_whatever_its_length() -> None:
    gallery = vectors()
    assert (retrieval_ranks(5 * gallery, gallery) == 1).all()


def test_a_constant_gallery_ranks_everything_in_the_middle() -> None:
    ranks = retrieval_ranks(vectors(), torch.ones(60, 7))
    assert (ranks == 30.5).all()


def test_shuffled_queries_rank_by_chance() -> None:
    gallery = vectors(2000, 30)
    ranks = retrieval_ranks(gallery.roll(1, dims=0), gallery)
    assert float(ranks.mean()) == pytest.approx(1000.5, rel=0.05)


@pytest.mark.parametrize("block", [3, 1024])
def test_neighbour_agreement_is_that_of_scikit_learn(block: int) -> None:
    truth, k = vectors(), 6
    generated = truth + 0.8 * vectors(seed=1)
    true = torch.nn.functional.normalize(truth, dim=1).numpy()
    finder = NearestNeighbors(n_neighbors=k + 1).fit(true)
    expected = []
    for row in range(len(true)):
        query = torch.nn.functional.normalize(generated[row], dim=0).numpy()
        order = np.argsort(((true - query) ** 2).sum(axis=1))
        mine = [index for index in order if index != row][:k]
        theirs = finder.kneighbors(true[row : row + 1], return_distance=False)[0][1:]
        expected.append(len(set(mine) & set(theirs)) / k)
    found = neighbour_agreement(generated, truth, k=k, block=block)
    np.testing.assert_allclose(found.numpy(), expected)


def test_neighbours_of_the_truth_agree_and_of_noise_do_by_chance() -> None:
    truth = vectors(500, 20)
    assert (neighbour_agreement(truth, truth, k=10) == 1).all()
    by_chance = neighbour_agreement(vectors(500, 20, seed=5), truth, k=10)
    assert float(by_chance.mean()) == pytest.approx(10 / 499, rel=0.3)


@pytest.mark.parametrize("k", [0, 60])
def test_a_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="k: expected 1 to 59"):
        neighbour_agreement(vectors(), vectors(), k=k)


# The linear probe


def test_the_probe_is_scikit_learns_logistic_regression() -> None:
    centres = 1.2 * vectors(4, 6, seed=3)
    numbers = torch.arange(200) % 4
    features = (centres[numbers] + vectors(200, 6, seed=4)) * torch.tensor([1.0, 50.0, 0.01, 3.0, 1.0, 0.0])
    labels = [f"class {int(number)}" for number in numbers]
    probe = LinearProbe(features[:120], labels[:120], inverse_penalty=0.1)
    peer = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-8, max_iter=5000))
    peer.fit(features[:120].numpy(), labels[:120])
    assert probe.predict(features[120:]) == peer.predict(features[120:].numpy()).tolist()
    np.testing.assert_allclose(probe._weight.numpy().T[:, :5], peer[-1].coef_[:, :5], atol=2e-3)


def test_a_probe_needs_two_classes() -> None:
    with pytest.raises(ValueError, match="at least two classes, found \\['a'\\]"):
        LinearProbe(vectors(4), ["a"] * 4)


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
    assert float(diversity(spread, num_draws=3, total_variance=variance)) == pytest.approx(1.0, rel=0.02)
    assert float(diversity(0.0, num_draws=3, total_variance=variance)) == 0.0
    assert np.isnan(diversity(0.5, num_draws=3, total_variance=0.0))
