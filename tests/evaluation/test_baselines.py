"""Baselines against NumPy and SciPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.evaluation.baselines import (
    NearestNeighbours,
    PositionMean,
    Procrustes,
    ResidualGaussian,
    TrainingMean,
    split_validation,
)
from tests.helpers.baseline_data import TEST, TRAIN, correlated, rows, write


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return write(tmp_path / "s", *correlated())


def test_samples_are_split_into_fit_and_validation() -> None:
    fit, validation = split_validation(TRAIN, max_samples=50, seed=0)
    assert (len(fit), len(validation)) == (45, 5)
    assert set(fit) | set(validation) <= set(TRAIN) and not set(fit) & set(validation)
    assert [len(part) for part in split_validation(TRAIN[:1], max_samples=50, seed=0)] == [1, 0]


@pytest.mark.parametrize("size", [1, 4, 30, 100])
def test_validation_takes_whole_groups(size: int) -> None:
    """As many as make a tenth; of one group it takes samples."""
    groups = np.arange(200) // size
    fit, validation = split_validation(np.arange(100), max_samples=90, seed=1, groups=groups)
    assert len(fit) + len(validation) == 90 and len(fit) and 9 <= len(validation) < 9 + size
    assert size == 100 or not set(groups[fit]) & set(groups[validation])
    if size in (1, 100):
        plain = split_validation(np.arange(100), max_samples=90, seed=1)
        assert all(np.array_equal(a, b) for a, b in zip((fit, validation), plain, strict=True))


# The mean of each position


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_the_position_mean_is_that_of_numpy(store: EmbeddingStore, batch_size: int) -> None:
    baseline = PositionMean.fit(store, TRAIN, batch_size=batch_size)
    expected = store.fetch(TRAIN)[1].double().numpy().mean(axis=0)
    np.testing.assert_allclose(baseline.mean.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_the_position_mean_ignores_the_condition(store: EmbeddingStore) -> None:
    baseline = PositionMean.fit(store, TRAIN)
    eva, _ = store.fetch(TEST)
    predicted = baseline.predict(eva)
    assert predicted.shape == (20, 4, 3)
    assert predicted.dtype == torch.float32
    assert torch.equal(predicted, baseline.predict(100 * eva.flip(0)))
    assert torch.equal(predicted[7], baseline.mean)


def test_the_position_mean_is_summed_in_float64(tmp_path: Path) -> None:
    clip = 1e4 + 0.01 * torch.randn(80, 4, 3)
    baseline = PositionMean.fit(write(tmp_path / "s", clip, clip), np.arange(80), batch_size=1)
    expected = clip.double().numpy().mean(axis=0).astype(np.float32)
    assert np.array_equal(baseline.mean.numpy(), expected)


# Procrustes, means and neighbours


def test_procrustes_is_scipys_when_the_widths_agree(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    eva, noise = (torch.randn(80, 4, 5, generator=generator) for _ in range(2))
    clip = 3.0 * eva @ torch.linalg.qr(torch.randn(5, 5, generator=generator))[0] + 0.3 * noise + 1
    found = Procrustes.fit(write(tmp_path / "s", eva, clip), np.arange(80))
    a, b = (rows(x) - rows(x).mean(axis=0) for x in (eva, clip))
    rotation, trace = orthogonal_procrustes(a, b)
    scale = trace / (a**2).sum()
    assert found.scale == pytest.approx(scale, rel=1e-5)
    expected = scale * a @ rotation + rows(clip).mean(axis=0)
    np.testing.assert_allclose(rows(found.predict(eva)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("wide", "narrow"), [(6, 3), (3, 6)])
def test_procrustes_between_unequal_widths_is_orthonormal(tmp_path: Path, wide: int, narrow: int) -> None:
    generator = torch.Generator().manual_seed(0)
    eva, clip = torch.randn(80, 4, wide, generator=generator), torch.randn(80, 4, narrow, generator=generator)
    weight = (found := Procrustes.fit(write(tmp_path / "s", eva, clip), np.arange(80))).weight / found.scale
    gram = weight.T @ weight if wide >= narrow else weight @ weight.T
    torch.testing.assert_close(gram, torch.eye(min(wide, narrow)), atol=1e-4, rtol=0)


def test_the_training_mean_is_one_token(store: EmbeddingStore) -> None:
    predicted = TrainingMean.fit(store, TRAIN).predict(store.fetch(TEST)[0])
    expected = np.broadcast_to(rows(store.fetch(TRAIN)[1]).mean(axis=0), (80, 3))
    np.testing.assert_allclose(rows(predicted), expected, rtol=1e-5)


def test_nearest_neighbours_are_found_by_the_mean_token(store: EmbeddingStore) -> None:
    found = NearestNeighbours.fit(store, TRAIN, k=3)
    eva, clip = (side.numpy() for side in store.fetch(TRAIN))
    pooled = eva.mean(axis=1) - eva.mean(axis=(0, 1))
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    query = store.fetch(TEST)[0].numpy().mean(axis=1) - eva.mean(axis=(0, 1))
    nearest = np.argsort(-(query / np.linalg.norm(query, axis=1, keepdims=True)) @ unit.T, axis=1)[:, :3]
    guess = found.predict_mean(store.fetch(TEST)[0], TEST.tolist()).numpy()
    np.testing.assert_allclose(guess, clip[nearest].mean(axis=1), rtol=1e-5, atol=1e-5)
    drawn = found.sample(store.fetch(TEST)[0], TEST.tolist(), sample_number=0).numpy()
    assert all(any(np.array_equal(drawn[i], clip[j]) for j in nearest[i]) for i in range(20))
    again = found.sample(store.fetch(TEST[5:6])[0], TEST[5:6].tolist(), sample_number=0).numpy()
    assert np.array_equal(again[0], drawn[5])


# The residual


def test_the_residual_gaussian_has_the_residuals_covariance(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    positions, channels = (torch.randn(4, 4, generator=generator), torch.randn(3, 3, generator=generator))
    clip = 5 + positions @ torch.randn(4000, 4, 3, generator=generator) @ channels
    store = write(tmp_path / "s", torch.zeros(4000, 4, 2), clip)
    everything = np.arange(4000)
    mean = PositionMean.fit(store, everything)
    std = clip.std(dim=(0, 1))
    residual = ResidualGaussian.fit(mean, store, everything, scale=std)
    drawn = residual.sample(range(20_000), seed=0, sample_number=0).flatten(1)
    expected = torch.cov((clip - mean.mean).flatten(1).T)
    torch.testing.assert_close(torch.cov(drawn.T), expected, atol=0.08 * float(expected.max()), rtol=0)
    assert not torch.equal(
        residual.sample([3], seed=0, sample_number=0), residual.sample([3], seed=0, sample_number=1)
    )


def test_an_exact_prediction_leaves_nothing(tmp_path: Path) -> None:
    clip = torch.ones(30, 4, 3)
    store = write(tmp_path / "s", torch.zeros(30, 4, 2), clip)
    mean = PositionMean.fit(store, np.arange(30))
    residual = ResidualGaussian.fit(mean, store, np.arange(30), scale=torch.ones(3))
    assert (residual.sample([0, 1], seed=0, sample_number=0) == 0).all()
