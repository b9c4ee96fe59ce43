"""Distribution distances against SciPy, scikit-learn and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.stats import wasserstein_distance
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from blip3o_dit.metrics.distances import (
    frechet_distance,
    median_square,
    mmd_from_distances,
    precision_recall_from_distances,
    squared_distances,
    wasserstein_per_channel,
)


def vectors(count: int, width: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(count, width, generator=generator) @ mixing + seed


def squares(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    a, b = a.double(), b.double()
    return squared_distances(a, a), squared_distances(b, b), squared_distances(a, b)


def mmd_rbf(a: Tensor, b: Tensor, bandwidth: float) -> float:
    return mmd_from_distances(*squares(a, b), bandwidth**2)


def precision_recall(reference: Tensor, generated: Tensor, k: int = 5) -> dict[str, float]:
    return precision_recall_from_distances(*squares(reference, generated), k=k)


@pytest.mark.parametrize(("n", "m", "width"), [(200, 150, 5), (12, 200, 20), (200, 12, 20), (10, 12, 20)])
def test_frechet_is_scipys_matrix_root(n: int, m: int, width: int) -> None:
    a, b = vectors(n, width).double(), vectors(m, width, seed=1).double()
    cov_a, cov_b = (np.cov(x.numpy(), rowvar=False) for x in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b + 1e-12 * np.eye(width)).real
    mean = float((a.mean(dim=0) - b.mean(dim=0)).square().sum())
    expected = mean + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-3 if min(n, m) <= width else 1e-6)


def test_frechet_between_gaussians_of_known_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(200_000, 3, generator=generator)
    b = 1.0 + 2.0 * torch.randn(200_000, 3, generator=generator)
    assert frechet_distance(a, b) == pytest.approx(3 * (1 + (2 - 1) ** 2), rel=0.01)


def test_frechet_of_a_set_with_itself_is_zero() -> None:
    for count in (4, 100):
        assert frechet_distance(vectors(count), vectors(count)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("bandwidth", [0.5, 3.0])
def test_mmd_is_the_unbiased_estimate_with_scikit_learns_kernel(bandwidth: float) -> None:
    a, b = vectors(40), vectors(30, seed=1)
    gamma = 1 / (2 * bandwidth**2)
    aa, bb, ab = (rbf_kernel(x.double(), y.double(), gamma=gamma) for x, y in ((a, a), (b, b), (a, b)))
    expected = (aa.sum() - 40) / (40 * 39) + (bb.sum() - 30) / (30 * 29) - 2 * ab.mean()
    assert mmd_rbf(a, b, bandwidth=bandwidth) == pytest.approx(expected, rel=1e-9)


def test_the_default_bandwidth_is_the_median_distance() -> None:
    a = vectors(41).double()
    median = float(torch.pdist(a).median())
    assert median_square(squared_distances(a, a)) == pytest.approx(median**2, rel=1e-6)
    assert median_square(torch.zeros(3, 3)) == 1.0


def test_mmd_between_gaussians_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2000, 2, generator=generator)
    b = torch.randn(2000, 2, generator=generator) + torch.tensor([1.0, 0.0])
    # E k(x, y) for x - y ~ N(shift, 2 I), bandwidth 1, in 2 dimensions: exp(-|shift|^2 / 6) / 3
    expected = 2 * (1 - np.exp(-1 / 6)) / 3
    assert mmd_rbf(a, b, bandwidth=1.0) == pytest.approx(expected, abs=0.02)


def test_precision_and_recall_are_those_of_balls_found_by_scikit_learn() -> None:
    truth, generated, k = vectors(80), 0.8 * vectors(60) + 0.4 * vectors(60, seed=2), 5
    radius_t, radius_g = (
        NearestNeighbors(n_neighbors=k + 1).fit(x.numpy()).kneighbors(x.numpy())[0][:, -1]
        for x in (truth, generated)
    )
    distance = torch.cdist(truth.double(), generated.double()).numpy()
    inside = distance < radius_t[:, None]
    found = precision_recall(truth, generated, k=k)
    assert found == pytest.approx(
        {
            "precision": inside.any(axis=0).mean(),
            "recall": (distance < radius_g[None]).any(axis=1).mean(),
            "density": inside.sum(axis=0).mean() / k,
            "coverage": (distance.min(axis=1) < radius_t).mean(),
        }
    )


def test_equal_distributions_have_high_coverage_and_density_one() -> None:
    generator = torch.Generator().manual_seed(0)
    truth, other = (torch.randn(2000, 4, generator=generator) for _ in range(2))
    found = precision_recall(truth, other)
    assert found["density"] == pytest.approx(1.0, abs=0.05)
    assert found["coverage"] == pytest.approx(1 - 0.5**5, abs=0.02)  # Naeem et al., equation 7
    assert min(found["precision"], found["recall"]) > 0.9


def test_a_dropped_mode_is_seen_by_recall_and_an_invented_one_by_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(300, 3, generator=generator)
    two = torch.cat([one[:150], one[150:] + 30])
    assert precision_recall(two, one)["recall"] == pytest.approx(0.5, abs=0.05)
    assert precision_recall(two, one)["precision"] > 0.9
    assert precision_recall(one, two)["precision"] == pytest.approx(0.5, abs=0.05)
    assert precision_recall(one, two)["recall"] > 0.9


@pytest.mark.parametrize("sizes", [(50, 50), (50, 30), (7, 64), (1, 3)])
def test_wasserstein_is_scipys(sizes: tuple[int, int]) -> None:
    a, b = vectors(sizes[0]), vectors(sizes[1], seed=1)
    expected = np.mean([wasserstein_distance(a[:, c].numpy(), b[:, c].numpy()) for c in range(5)])
    assert wasserstein_per_channel(a, b) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("function", [frechet_distance, wasserstein_per_channel])
def test_misfits_are_refused(function: object) -> None:
    with pytest.raises(ValueError, match="one width, found 5 and 4"):
        function(vectors(20), vectors(20, 4))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"at least . vectors"):
        function(vectors(20)[:0], vectors(20))  # type: ignore[operator]
