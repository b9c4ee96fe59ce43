"""Baselines against NumPy and scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import LinearRegression, Ridge
from torch import Tensor

from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.evaluation.baselines import (
    NearestNeighbours,
    PositionMean,
    Procrustes,
    ResidualGaussian,
    TrainingMean,
    split_validation,
)
from blip3o_dit.ridge import PENALTIES, NeighbourhoodRidge, TokenRidge

TRAIN = np.random.default_rng(0).permutation(80)[:60]
TEST = np.setdiff1d(np.arange(80), TRAIN)


def write(path: Path, eva: Tensor, clip: Tensor) -> EmbeddingStore:
    sizes = dict(num_tokens=eva.shape[1], condition_dim=eva.shape[2], target_dim=clip.shape[2])
    with StoreWriter(path, **sizes, dtype="float32", shard_size=16) as writer:
        writer.append(eva, clip, [{"key": str(row)} for row in range(len(eva))])
    return EmbeddingStore(path)


def correlated(offset: float = 0.5) -> tuple[Tensor, Tensor]:
    """Conditions of unlike scales that go together, noisy linear targets, another mean per position."""
    generator = torch.Generator().manual_seed(0)
    eva = torch.randn(80, 4, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    clip = eva @ torch.randn(6, 3, generator=generator) + torch.randn(80, 4, 3, generator=generator)
    clip = clip + 5 * torch.arange(4.0)[:, None]
    return offset + eva * torch.tensor([1.0, 10.0, 0.01, 3.0, 1.0, 0.1]), clip


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return write(tmp_path / "s", *correlated())


def rows(tokens: Tensor) -> np.ndarray:
    return tokens.double().numpy().reshape(-1, tokens.shape[-1])


@pytest.mark.parametrize("penalty", [None, 0.1])
@pytest.mark.parametrize("kind", [TokenRidge, NeighbourhoodRidge])
def test_the_ridge_that_gives_the_residuals_has_not_seen_them(
    store: EmbeddingStore, kind: Any, penalty: float | None
) -> None:
    """Two maps: the final one of all samples, and the one of the others alone, with the same penalty."""
    held_back, rest = TRAIN[:20], TRAIN[20:]
    final, before = kind.fit_twice(store, rest, validation=held_back, penalty=penalty)
    alone = kind.fit(store, rest, penalty=final.penalty)
    assert before.penalty == final.penalty
    torch.testing.assert_close(before.weight, alone.weight)
    everything = kind.fit(store, np.concatenate([rest, held_back]), penalty=final.penalty)
    eva = store.fetch(TEST)[0]
    if kind is TokenRidge:  # the other's mean outside the grid is that of the samples it was fitted on first
        torch.testing.assert_close(final.predict(eva), everything.predict(eva), rtol=1e-4, atol=1e-4)
    assert (final.predict(eva) - before.predict(eva)).abs().mean() > 1e-3


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


# Ridge regression per token


def by_scikit_learn(store: EmbeddingStore, penalty: float) -> np.ndarray:
    """Ridge on standardised conditions of the training tokens; its alpha is penalty x number of tokens.

    (covariance + penalty diag(variance)) W = cross-covariance, times n and in units of the deviations, is
    (Z^T Z + n penalty I) W_Z = Z^T X.
    """
    eva, clip = store.fetch(TRAIN)
    mean, deviation = rows(eva).mean(axis=0), rows(eva).std(axis=0)
    deviation[np.ptp(rows(eva), axis=0) == 0] = 1.0
    model = Ridge(alpha=penalty * len(rows(eva))).fit((rows(eva) - mean) / deviation, rows(clip))
    return model.predict((rows(store.fetch(TEST)[0]) - mean) / deviation).reshape(20, 4, 3)


@pytest.mark.parametrize("penalty", [1e-6, 1e-3, 0.1, 10.0])
def test_ridge_is_that_of_scikit_learn_on_standardised_conditions(
    store: EmbeddingStore, penalty: float
) -> None:
    predicted = TokenRidge.fit(store, TRAIN, penalty=penalty).predict(store.fetch(TEST)[0])
    np.testing.assert_allclose(predicted.numpy(), by_scikit_learn(store, penalty), rtol=1e-4, atol=1e-4)


def test_the_default_penalty_is_a_thousandth_of_the_variance(store: EmbeddingStore) -> None:
    default, named = TokenRidge.fit(store, TRAIN), TokenRidge.fit(store, TRAIN, penalty=1e-3)
    assert torch.equal(default.weight, named.weight)
    assert torch.equal(default.bias, named.bias)


def test_without_penalty_it_is_least_squares(store: EmbeddingStore) -> None:
    eva, clip = store.fetch(TRAIN)
    expected = LinearRegression().fit(rows(eva), rows(clip)).predict(rows(store.fetch(TEST)[0]))
    predicted = TokenRidge.fit(store, TRAIN, penalty=0.0).predict(store.fetch(TEST)[0])
    np.testing.assert_allclose(rows(predicted), expected, rtol=1e-4, atol=1e-4)


def test_a_huge_penalty_predicts_the_mean(store: EmbeddingStore) -> None:
    predicted = TokenRidge.fit(store, TRAIN, penalty=1e9).predict(store.fetch(TEST)[0])
    expected = rows(store.fetch(TRAIN)[1]).mean(axis=0)
    np.testing.assert_allclose(rows(predicted), np.broadcast_to(expected, (80, 3)), rtol=1e-5)


def test_ridge_recovers_an_exact_linear_map(tmp_path: Path) -> None:
    eva = torch.randn(80, 4, 6)
    weight, bias = torch.randn(6, 3), torch.randn(3)
    found = TokenRidge.fit(write(tmp_path / "s", eva, eva @ weight + bias), np.arange(80), penalty=1e-9)
    torch.testing.assert_close(found.weight, weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.bias - found.origin @ found.weight, bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_ridge_does_not_depend_on_the_batch_size(store: EmbeddingStore, batch_size: int) -> None:
    reference = TokenRidge.fit(store, TRAIN)
    found = TokenRidge.fit(store, TRAIN, batch_size=batch_size)
    torch.testing.assert_close(found.weight, reference.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.bias, reference.bias, rtol=1e-5, atol=1e-6)


def test_ridge_does_not_depend_on_the_units_of_the_condition(tmp_path: Path, store: EmbeddingStore) -> None:
    eva, clip = correlated()
    units = torch.tensor([1.0, 1e3, 1e-3, 50.0, 0.2, 1.0])
    other = write(tmp_path / "other", eva * units, clip)
    torch.testing.assert_close(
        TokenRidge.fit(other, TRAIN, penalty=0.1).predict(other.fetch(TEST)[0]),
        TokenRidge.fit(store, TRAIN, penalty=0.1).predict(store.fetch(TEST)[0]),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("offset", [30.0, 300.0])
def test_ridge_bears_an_offset_of_the_condition(tmp_path: Path, offset: float) -> None:
    eva, clip = torch.randn(80, 4, 6) + offset, torch.randn(80, 4, 3)
    store = write(tmp_path / "s", eva, clip)
    predicted = TokenRidge.fit(store, TRAIN, penalty=0.1).predict(store.fetch(TEST)[0])
    np.testing.assert_allclose(predicted.numpy(), by_scikit_learn(store, 0.1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("constant", [0.0, 0.7, 5 / 3, 333.3])
def test_a_condition_channel_that_never_varied_gets_no_weight(tmp_path: Path, constant: float) -> None:
    eva, clip = correlated()
    eva[..., 4] = constant
    store = write(tmp_path / "s", eva, clip)
    baseline = TokenRidge.fit(store, TRAIN)
    predicted = baseline.predict(store.fetch(TEST)[0])
    np.testing.assert_allclose(predicted.numpy(), by_scikit_learn(store, 1e-3), rtol=1e-4, atol=1e-4)
    assert float(baseline.weight[4].abs().max()) < 1e-3


def test_half_precision_conditions_are_predicted_in_float32(store: EmbeddingStore) -> None:
    baseline = TokenRidge.fit(store, TRAIN)
    half = store.fetch(TEST)[0].half()
    assert torch.equal(baseline.predict(half), baseline.predict(half.float()))


# The penalty


def test_the_penalty_is_the_one_that_does_best_on_validation_samples(store: EmbeddingStore) -> None:
    fit, validation = TRAIN[:40], TRAIN[40:]
    found = TokenRidge.fit(store, fit, validation=validation)
    eva, clip = store.fetch(validation)
    variance = rows(clip).var(axis=0)

    def error(penalty: float) -> float:
        predicted = TokenRidge.fit(store, fit, penalty=penalty).predict(eva)
        return float((((rows(predicted) - rows(clip)) ** 2).mean(axis=0) / variance).mean())

    assert found.penalty == min(PENALTIES, key=error)
    both = TokenRidge.fit(store, TRAIN, penalty=found.penalty)
    torch.testing.assert_close(found.weight, both.weight, rtol=1e-4, atol=1e-5)


def test_samples_are_split_into_fit_and_validation() -> None:
    fit, validation = split_validation(TRAIN, most=50, seed=0)
    assert (len(fit), len(validation)) == (45, 5)
    assert set(fit) | set(validation) <= set(TRAIN) and not set(fit) & set(validation)
    assert [len(part) for part in split_validation(TRAIN[:1], most=50, seed=0)] == [1, 0]


# The 3x3 neighbourhood


def grid_data(width: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Targets that are the sum of a token, twice its right neighbour and minus three times the one below."""
    eva = 2.0 + torch.randn(80, 9, width, generator=torch.Generator().manual_seed(0))
    grid = torch.nn.functional.pad((eva - eva.mean(dim=(0, 1))).reshape(80, 3, 3, width), (0, 0, 1, 1, 1, 1))
    centre, right, below = grid[:, 1:4, 1:4], grid[:, 1:4, 2:5], grid[:, 2:5, 1:4]
    return eva, (centre + 2 * right - 3 * below).flatten(1, 2)[..., :2] + 7, eva


def test_a_map_of_the_neighbourhood_is_recovered(tmp_path: Path) -> None:
    eva, clip, _ = grid_data()
    store = write(tmp_path / "s", eva, clip)
    everything = np.arange(80)
    found = NeighbourhoodRidge.fit(store, everything, penalty=1e-9)
    torch.testing.assert_close(found.predict(eva), clip, rtol=1e-4, atol=1e-3)
    alone = TokenRidge.fit(store, everything, penalty=1e-9).predict(eva)
    assert float((alone - clip).square().mean()) > 1.0


def test_wide_neighbours_enter_by_their_principal_components(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eva, clip, _ = grid_data(width=6)
    store = write(tmp_path / "s", eva * torch.tensor([9.0, 8, 1e-3, 1e-3, 1e-3, 1e-3]), clip)
    monkeypatch.setattr("blip3o_dit.ridge.MAX_RIDGE_FEATURES", 6 + 8 * 2)
    found = NeighbourhoodRidge.fit(store, np.arange(80), penalty=1e-9)
    assert found.components.shape == (6, 2)
    assert float(found.components[:2].square().sum()) == pytest.approx(2.0, rel=1e-4)
    assert len(found.weight) == 6 + 8 * 2
    assert float((found.predict(store.fetch(np.arange(80))[0]) - clip).square().mean()) < 0.01


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
    guess = found.predict(store.fetch(TEST)[0]).numpy()
    np.testing.assert_allclose(guess, clip[nearest].mean(axis=1), rtol=1e-5, atol=1e-5)
    drawn = found.sample(store.fetch(TEST)[0], TEST.tolist(), seed=0, sample_number=0).numpy()
    assert all(any(np.array_equal(drawn[i], clip[j]) for j in nearest[i]) for i in range(20))
    again = found.sample(store.fetch(TEST[5:6])[0], TEST[5:6].tolist(), seed=0, sample_number=0).numpy()
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
