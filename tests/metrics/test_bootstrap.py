"""Bootstrap intervals: coverage, pairing, half samples."""

from __future__ import annotations

import numpy as np
import pytest

from blip3o_dit.metrics import bootstrap as bootstrap_module
from blip3o_dit.metrics.bootstrap import Bootstrap, Estimate, from_half_samples, half_samples


def test_the_interval_of_a_mean_covers_it_nineteen_times_in_twenty() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        found = Bootstrap(80, replicates=300, seed=trial).mean(generator.normal(3.0, 2.0, 80))
        covered += found.low <= 3.0 <= found.high
    assert 0.90 <= covered / 200 <= 0.985


def test_the_interval_has_the_width_of_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    found = Bootstrap(2000).mean(values)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(2000), rel=0.1)
    assert found.value == values.mean()


def test_the_same_resamples_make_differences_paired() -> None:
    generator = np.random.default_rng(0)
    common = 10 * generator.normal(size=500)
    a, b = common + 0.1, common + 0.01 * generator.normal(size=500)
    bootstrap = Bootstrap(500)
    np.testing.assert_allclose(
        bootstrap.means(np.column_stack([a - b]))[:, 0],
        bootstrap.means(a[:, None])[:, 0] - bootstrap.means(b[:, None])[:, 0],
        atol=1e-9,
    )
    found = bootstrap.mean(a - b)
    assert 0.09 < found.low < 0.1 < found.high < 0.11


def test_resamples_that_are_kept_are_those_that_would_be_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.random.default_rng(0).normal(size=(60, 2))
    found = [Bootstrap(60, replicates=50, seed=seed).means(columns) for seed in (1, 2, 1)]
    monkeypatch.setattr(bootstrap_module, "KEPT", 0)
    drawn = [Bootstrap(60, replicates=50, seed=seed).means(columns) for seed in (1, 2, 1)]
    np.testing.assert_array_equal(found, drawn)
    assert not np.array_equal(found[0], found[1])


def test_a_function_of_means_and_a_median() -> None:
    generator = np.random.default_rng(0)
    columns = np.column_stack([generator.normal(2, 0.1, 300), generator.normal(4, 0.1, 300)])
    ratio = Bootstrap(300).function(columns, lambda m: m[..., 0] / m[..., 1])
    assert ratio.low < 0.5 < ratio.high and ratio.high - ratio.low < 0.01
    median = Bootstrap(300).median(columns[:, 0])
    assert median.low <= np.median(columns[:, 0]) <= median.high


def test_few_samples_have_no_interval() -> None:
    assert Bootstrap(19).mean(np.arange(19.0)) == Estimate(9.0)
    assert Bootstrap(19).median(np.arange(19.0)) == Estimate(9.0)
    assert from_half_samples(1.0, np.array([])) == Estimate(1.0)


def test_half_samples_scatter_as_resamples_do() -> None:
    values = np.random.default_rng(0).normal(size=400)
    replicates = np.array([values[rows].mean() for rows in half_samples(400, replicates=2000, seed=0)])
    assert replicates.std() == pytest.approx(values.std() / np.sqrt(400), rel=0.06)
    rows = next(half_samples(7, replicates=1, seed=0))
    assert len(rows) == 3 and len(set(rows.tolist())) == 3


def test_an_interval_stays_in_the_figures_range() -> None:
    found = from_half_samples(0.99, np.array([0.9, 1.0, 0.95, 1.0]), limits=(0.0, 1.0))
    assert found.high == 1.0 and found.low < 0.95


def test_json_has_no_nan() -> None:
    assert Estimate(float("nan"), None, float("inf")).to_json() == {"value": None, "low": None, "high": None}
