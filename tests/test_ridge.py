"""Ridge regressions against NumPy and scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge
from torch import Tensor

from blip3o_dit.data.store import EmbeddingStore
from blip3o_dit.normal_equations import PENALTIES
from blip3o_dit.ridge import NeighbourhoodRidge, TokenRidge
from tests.helpers.baseline_data import TEST, TRAIN, correlated, rows, write


@pytest.fixture
def store(tmp_path: Path) -> EmbeddingStore:
    return write(tmp_path / "s", *correlated())


@pytest.mark.parametrize("penalty", [None, 0.1])
@pytest.mark.parametrize("kind", [TokenRidge, NeighbourhoodRidge])
def test_the_ridge_that_gives_the_residuals_has_not_seen_them(
    store: EmbeddingStore, kind: Any, penalty: float | None
) -> None:
    """Two maps: the final one of all samples, and the one of the others alone, with the same penalty."""
    held_back, rest = TRAIN[:20], TRAIN[20:]
    final, before = kind.fit_with_holdout(store, rest, validation=held_back, penalty=penalty)
    alone = kind.fit(store, rest, penalty=final.penalty)
    assert before.penalty == final.penalty
    torch.testing.assert_close(before.weight, alone.weight)
    everything = kind.fit(store, np.concatenate([rest, held_back]), penalty=final.penalty)
    eva = store.fetch(TEST)[0]
    if kind is TokenRidge:  # the other's mean outside the grid is that of the samples it was fitted on first
        torch.testing.assert_close(final.predict(eva), everything.predict(eva), rtol=1e-4, atol=1e-4)
    assert (final.predict(eva) - before.predict(eva)).abs().mean() > 1e-3


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
