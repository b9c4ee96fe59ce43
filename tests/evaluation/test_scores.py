"""The evaluation as a whole on constructed samplers, and against theory on linear-Gaussian data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from blip3o_dit.evaluation import scores
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.evaluation.predictions import collect_predictions
from blip3o_dit.evaluation.reference import ReferenceSet, collect_reference
from blip3o_dit.utils.stateless_random import stateless_normal
from tests.helpers.linear_gaussian import LinearGaussian
from tests.helpers.stores import write_linear_store

CONFIG = EvaluationConfig(
    batch_size=64, draw_samples=400, distribution_samples=800, bootstrap=200, half_samples=10
)


def no_progress(items: Iterable[Any], name: str) -> Iterable[Any]:
    return items


@dataclass
class Sampler:
    """A sampler whose samples are a function of (mean, noise): what a test wants to see measured."""

    data: LinearGaussian
    transform: Callable[[Tensor, Tensor, Tensor], Tensor]
    name: str = "sampler"
    about: str = ""
    is_model: bool = True
    calls: int = 0
    random: bool = True

    def predict_mean(self, eva: Tensor, indices: Sequence[int]) -> Tensor:
        return self.data.mean(eva)

    def sample(self, eva: Tensor, indices: Sequence[int], sample_number: int) -> Tensor:
        shape = (self.data.num_tokens, self.data.target_dim)
        noise = stateless_normal(indices, shape, seed=5, stream="sampler", counter=sample_number)
        return self.transform(self.data.mean(eva), noise @ self.data.factor.T, self.data.fetch(indices)[1])


DATA = LinearGaussian(num_samples=1200, num_tokens=4, condition_dim=6, target_dim=6)
MEAN, STD = DATA._clip.mean(dim=(0, 1)), DATA._clip.std(dim=(0, 1), correction=0)
HELD_OUT = np.arange(600)


@pytest.fixture(scope="module")
def reference() -> ReferenceSet:
    return collect_reference(DATA, HELD_OUT, mean=MEAN, std=STD, config=CONFIG, progress=no_progress)


CASES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "perfect": lambda mean, noise, true: mean + noise,
    "mean": lambda mean, noise, true: mean,
    "constant": lambda mean, noise, true: MEAN.expand_as(mean),
    "shuffled": lambda mean, noise, true: (mean + noise).roll(1, dims=0),
    "truth": lambda mean, noise, true: true,
    "truth plus noise": lambda mean, noise, true: true + 0.5 * STD * noise,
    "over-dispersed": lambda mean, noise, true: mean + 2 * noise,
    "half spread": lambda mean, noise, true: mean + 0.5 * noise,
}


@pytest.fixture(scope="module")
def measured(reference: ReferenceSet) -> dict[str, dict[str, Any]]:
    found = {}
    for name, transform in CASES.items():
        predictions = collect_predictions(Sampler(DATA, transform, name=name), reference, no_progress)
        found[name] = scores.score(predictions, reference)
    return found


def value(measured: dict[str, Any], case: str, path: str) -> float:
    group, name = path.split(".")
    return measured[case]["metrics"][group][name]["value"]


# Each row: in this figure, the first case must be clearly better than the second.
BETTER = [
    ("conditional.energy_score", "down", "perfect", "mean"),
    ("conditional.energy_score", "down", "perfect", "over-dispersed"),
    ("conditional.energy_score", "down", "perfect", "half spread"),
    ("conditional.energy_score", "down", "perfect", "shuffled"),
    ("conditional.energy_score", "down", "mean", "constant"),
    ("conditional.token_energy_score", "down", "perfect", "mean"),
    ("sample.r2", "up", "mean", "perfect"),  # R2 and cosine prefer the average: why they are not enough
    ("sample.cosine_similarity_mean", "up", "mean", "perfect"),
    ("sample.r2", "up", "truth", "truth plus noise"),
    ("sample.r2", "up", "perfect", "shuffled"),
    ("use.recall_at_1", "up", "truth", "perfect"),
    ("use.recall_at_10", "up", "perfect", "shuffled"),
    ("use.reverse_recall_at_10", "up", "perfect", "shuffled"),
    ("use.median_rank", "down", "perfect", "shuffled"),
    ("use.neighbour_agreement", "up", "perfect", "shuffled"),
    ("tokens.frechet", "down", "perfect", "mean"),
    ("tokens.frechet", "down", "perfect", "over-dispersed"),
    ("tokens.mmd", "down", "perfect", "mean"),
    ("tokens.recall", "up", "perfect", "constant"),
    ("tokens.coverage", "up", "perfect", "over-dispersed"),
    ("tokens.precision", "up", "perfect", "over-dispersed"),
    ("tokens.wasserstein", "down", "perfect", "mean"),
    ("pooled.frechet", "down", "perfect", "over-dispersed"),
]


@pytest.mark.parametrize(("path", "direction", "good", "bad"), BETTER)
def test_each_figure_reacts_the_right_way(
    measured: dict[str, Any], path: str, direction: str, good: str, bad: str
) -> None:
    better, worse = value(measured, good, path), value(measured, bad, path)
    assert (better - worse if direction == "up" else worse - better) > 0.02 * abs(worse), (better, worse)


def test_figures_with_a_known_value(measured: dict[str, Any]) -> None:
    assert value(measured, "truth", "sample.r2") == pytest.approx(1.0)
    assert value(measured, "truth", "use.recall_at_1") == 1.0
    assert value(measured, "truth", "use.neighbour_agreement") == 1.0
    assert value(measured, "truth", "tokens.frechet") == pytest.approx(0.0, abs=1e-6)
    assert value(measured, "truth", "tokens.wasserstein") == 0.0
    assert value(measured, "constant", "sample.r2") == pytest.approx(0.0, abs=1e-5)
    assert value(measured, "constant", "use.reverse_median_rank") == pytest.approx(300.5)
    assert value(measured, "mean", "conditional.spread_error_ratio") == 0.0
    assert value(measured, "mean", "conditional.diversity") == 0.0
    # shuffled within a batch, so over samples as good as unrelated: the token sets stay the same
    assert value(measured, "shuffled", "tokens.wasserstein") < 0.1
    assert value(measured, "half spread", "conditional.spread_error_ratio") < 0.6
    assert value(measured, "over-dispersed", "conditional.spread_error_ratio") > 1.3


def mean_root(eigenvalues: np.ndarray) -> float:
    """E sqrt(sum of lambda_i z_i^2), z standard normal, by its one-dimensional integral."""

    def integrand(s: float) -> float:
        return (1 - np.prod((1 + 2 * eigenvalues * s) ** -0.5)) * s**-1.5

    low, high = quad(integrand, 0, 1)[0], quad(integrand, 1, np.inf)[0]
    return (low + high) / (2 * np.sqrt(np.pi))


@pytest.fixture(scope="module")
def theory() -> dict[str, float]:
    """What the exact posterior sampler must score, in closed form."""
    factor = (DATA.factor / STD[:, None]).double().numpy()
    eigenvalues = np.linalg.eigvalsh(factor @ factor.T)
    joint = np.tile(eigenvalues, DATA.num_tokens)
    return {
        # |x - y| for two draws is that of a Gaussian with twice the covariance; the score is half of it
        "energy_score": mean_root(2 * joint) / 2 / np.sqrt(len(joint)),
        "token_energy_score": mean_root(2 * eigenvalues) / 2 / np.sqrt(len(eigenvalues)),
        "spread_error_ratio": 1.0,
    }


@pytest.mark.parametrize("name", ["energy_score", "token_energy_score", "spread_error_ratio"])
def test_the_exact_posterior_sampler_scores_what_theory_says(
    measured: dict[str, Any], theory: dict[str, float], name: str
) -> None:
    found = measured["perfect"]["metrics"]["conditional"][name]
    assert found["low"] - 1e-3 <= theory[name] <= found["high"] + 1e-3
    assert found["value"] == pytest.approx(theory[name], rel=0.03)


def test_spread_and_error_agree_bin_by_bin(measured: dict[str, Any]) -> None:
    bins = measured["perfect"]["spread_error"]
    assert sum(point["samples"] for point in bins) == 400
    for point in bins[1:-1]:
        assert point["error"] == pytest.approx(point["spread"], rel=0.2)


def test_intervals_hold_the_value(measured: dict[str, Any]) -> None:
    for group in measured["perfect"]["metrics"].values():
        for name, found in group.items():
            if found["low"] is not None:
                assert found["low"] <= found["value"] <= found["high"], name


def test_real_vs_real_is_small_and_a_perfect_sampler_is_near_it(
    reference: ReferenceSet, measured: dict[str, Any]
) -> None:
    real = scores.real_vs_real(reference, DATA, np.arange(600, 1200))
    assert real["samples"] == 600
    assert real["tokens"]["coverage"]["value"] > 0.9
    assert real["tokens"]["frechet"]["value"] < 0.5 * value(measured, "mean", "tokens.frechet")
    assert value(measured, "perfect", "tokens.frechet") < 2 * real["tokens"]["frechet"]["value"]


def test_paired_differences_have_the_right_sign(reference: ReferenceSet) -> None:
    predictions = {
        name: collect_predictions(Sampler(DATA, CASES[name], name=name), reference, no_progress)
        for name in ("perfect", "half spread")
    }
    found = scores.paired_differences(predictions["perfect"], predictions["half spread"], reference)
    assert set(found) >= {"sample.r2", "conditional.energy_score", "best_guess.r2"}
    score = found["conditional.energy_score"]
    assert score["low"] < score["value"] < score["high"] < 0
    assert found["best_guess.r2"]["value"] == pytest.approx(0.0, abs=1e-12)
    assert found["sample.r2"]["high"] < 0  # half the spread is nearer to the truth


def test_differences_are_paired_by_sample(reference: ReferenceSet) -> None:
    """A method against itself with a little added: nearly constant differences, whatever the samples."""

    def a_little_off(*arguments: Any) -> Tensor:
        return CASES["perfect"](*arguments) + 0.01

    pair = [
        collect_predictions(Sampler(DATA, transform), reference, no_progress)
        for transform in (CASES["perfect"], a_little_off)
    ]
    found = scores.paired_differences(pair[0], pair[1], reference)
    first, second = (scores.score(predictions, reference)["metrics"] for predictions in pair)
    for group, name in (
        ("sample", "r2"),
        ("conditional", "energy_score"),
        ("sample", "cosine_similarity_mean"),
    ):
        one, other, paired = first[group][name], second[group][name], found[f"{group}.{name}"]
        assert paired["value"] == pytest.approx(one["value"] - other["value"], abs=1e-9)
        assert paired["low"] < paired["value"] < paired["high"]
        assert paired["high"] - paired["low"] < 0.2 * (one["high"] - one["low"])


def test_the_batch_size_changes_nothing() -> None:
    figures = []
    for batch_size in (1, 7, 64):
        config = EvaluationConfig(batch_size=batch_size, draw_samples=10, bootstrap=20, half_samples=4)
        reference = collect_reference(
            DATA, HELD_OUT[:30], mean=MEAN, std=STD, config=config, progress=no_progress
        )
        predictions = collect_predictions(Sampler(DATA, CASES["perfect"]), reference, no_progress)
        described = scores.score(predictions, reference)
        figures.append({**described["metrics"]["sample"], **described["metrics"]["conditional"]})
    for other in figures[1:]:
        for name, estimate in figures[0].items():
            assert other[name]["value"] == pytest.approx(estimate["value"], rel=1e-5), name


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_samples_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"expected at least 2 samples to evaluate, found {count}"):
        collect_reference(DATA, HELD_OUT[:count], mean=MEAN, std=STD, config=CONFIG, progress=no_progress)


def test_nan_is_refused_by_sample(reference: ReferenceSet) -> None:
    bad = LinearGaussian(num_samples=50, num_tokens=4, condition_dim=6, target_dim=6)
    bad._clip[7, 2, 3] = float("nan")
    with pytest.raises(ValueError, match="clip: expected finite numbers, found NaN or infinity in sample 7"):
        collect_reference(bad, np.arange(50), mean=MEAN, std=STD, config=CONFIG, progress=no_progress)
    broken = Sampler(DATA, lambda mean, noise, true: mean / 0 * 0, name="broken")
    with pytest.raises(ValueError, match="broken: generated tokens: expected finite numbers"):
        collect_predictions(broken, reference, no_progress)


@pytest.mark.parametrize("name", ["batch_size", "draws", "draw_samples", "bootstrap"])
def test_settings_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least"):
        EvaluationConfig(**{name: 0})


def test_the_kept_tokens_are_those_of_the_source(tmp_path: Path) -> None:
    store = write_linear_store(tmp_path / "s")
    config = EvaluationConfig(batch_size=5, distribution_samples=100)
    reference = collect_reference(
        store, np.arange(3, 40), mean=torch.zeros(8), std=torch.ones(8), config=config, progress=no_progress
    )
    clip = store.fetch(np.arange(3, 40))[1]
    assert (
        len(set(zip(reference.token_rows.tolist(), reference.token_positions.tolist(), strict=True))) == 100
    )
    assert torch.equal(reference.tokens, clip[reference.token_rows, reference.token_positions])
    torch.testing.assert_close(reference.pooled, clip.mean(dim=1))
