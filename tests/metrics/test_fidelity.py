"""Fidelity metrics against NumPy, scikit-learn and cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from torch import Tensor

from blip3o_dit.metrics.fidelity import FidelitySums

NAMES = {
    "cosine_similarity_mean",
    "cosine_similarity_std",
    "pooled_cosine_similarity_mean",
    "l2_distance_mean",
    "l2_distance_std",
    "norm_ratio_mean",
    "r2",
}


def pair(count: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randn(count, 4, 5, generator=generator) * torch.tensor([1.0, 2.0, 0.1, 5.0, 1.0]) + 0.5
    return target + 0.7 * torch.randn(target.shape, generator=generator), target


def column_means(tokens: Tensor) -> Tensor:
    return tokens.double().mean(dim=(0, 1))


def fidelity(generated: Tensor, target: Tensor, mean: Tensor) -> dict[str, float]:
    sums = FidelitySums(mean)
    sums.add(generated, target)
    return sums.result()


def by_numpy(generated: Tensor, target: Tensor, mean: Tensor) -> dict[str, float]:
    """The definitions again, token by token."""
    x_hat, x, m = (tokens.double().numpy() for tokens in (generated, target, mean))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))

    tokens = [(a, b) for sample in zip(x_hat, x, strict=True) for a, b in zip(*sample, strict=True)]
    cosines = [cosine(a, b) for a, b in tokens]
    distances = [np.sqrt(((a - b) ** 2).sum()) for a, b in tokens]
    r2 = [
        1 - ((x_hat[..., c] - x[..., c]) ** 2).sum() / ((x[..., c] - m[c]) ** 2).sum()
        for c in range(x.shape[2])
    ]
    return {
        "cosine_similarity_mean": np.mean(cosines),
        "cosine_similarity_std": np.std(cosines),
        "pooled_cosine_similarity_mean": np.mean(
            [cosine(a.mean(axis=0), b.mean(axis=0)) for a, b in zip(x_hat, x, strict=True)]
        ),
        "l2_distance_mean": np.mean(distances),
        "l2_distance_std": np.std(distances),
        "norm_ratio_mean": np.mean([np.linalg.norm(a) / np.linalg.norm(b) for a, b in tokens]),
        "r2": np.mean(r2),
    }


def test_metrics_are_those_of_numpy() -> None:
    generated, target = pair()
    mean = torch.linspace(-1, 1, 5)
    found = fidelity(generated, target, mean)
    assert set(found) == NAMES
    assert all(type(value) is float for value in found.values())
    assert found == pytest.approx(by_numpy(generated, target, mean), rel=1e-9)


def test_r2_is_that_of_scikit_learn_when_the_training_mean_is_the_targets_own() -> None:
    generated, target = pair()
    expected = r2_score(target.flatten(0, 1).numpy(), generated.flatten(0, 1).numpy())
    assert fidelity(generated, target, column_means(target))["r2"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sizes", [[1] * 30, [7, 7, 7, 7, 2], [29, 1], [30, 0]])
def test_streamed_metrics_are_those_of_the_whole(sizes: list[int]) -> None:
    generated, target = pair()
    mean = torch.linspace(-1, 1, 5)
    sums = FidelitySums(mean)
    for a, b in zip(generated.split(sizes), target.split(sizes), strict=True):
        sums.add(a, b)
    assert sums.result() == pytest.approx(fidelity(generated, target, mean), rel=1e-9)


def test_the_states_of_several_processes_add_up() -> None:
    generated, target = pair()
    mean = torch.linspace(-1, 1, 5)
    processes = [FidelitySums(mean) for _ in range(3)]
    for rank, process in enumerate(processes):
        process.add(generated[rank::3], target[rank::3])
    together = FidelitySums(mean)
    together.state = sum(process.state for process in processes)
    assert together.result() == pytest.approx(fidelity(generated, target, mean), rel=1e-9)


def test_a_perfect_generation() -> None:
    _, target = pair()
    found = fidelity(target, target, column_means(target))
    assert found == pytest.approx(
        {
            "cosine_similarity_mean": 1.0,
            "cosine_similarity_std": 0.0,
            "pooled_cosine_similarity_mean": 1.0,
            "l2_distance_mean": 0.0,
            "l2_distance_std": 0.0,
            "norm_ratio_mean": 1.0,
            "r2": 1.0,
        },
        abs=1e-7,
    )


def test_the_training_mean_has_r2_zero_whatever_the_target() -> None:
    _, target = pair()
    for mean in (column_means(target).float(), torch.linspace(-3, 3, 5)):
        found = fidelity(mean.expand_as(target), target, mean)
        assert found["r2"] == pytest.approx(0.0, abs=1e-12)


def test_a_constant_can_score_high_on_cosine_and_low_on_r2() -> None:
    target = 10 + 0.1 * torch.randn(30, 4, 5)
    found = fidelity(torch.full_like(target, 10.0), target, column_means(target))
    assert found["cosine_similarity_mean"] > 0.999
    assert found["r2"] < 0.01


@pytest.mark.parametrize("factor", [0.25, 2.0])
def test_a_scaled_generation_keeps_its_direction_only(factor: float) -> None:
    _, target = pair()
    found = fidelity(factor * target, target, torch.zeros(5))
    lengths = target.double().norm(dim=-1)
    assert found["cosine_similarity_mean"] == pytest.approx(1.0, abs=1e-7)
    assert found["pooled_cosine_similarity_mean"] == pytest.approx(1.0, abs=1e-7)
    assert found["norm_ratio_mean"] == pytest.approx(factor, rel=1e-6)
    assert found["l2_distance_mean"] == pytest.approx(abs(factor - 1) * float(lengths.mean()), rel=1e-6)
    assert found["l2_distance_std"] == pytest.approx(
        abs(factor - 1) * float(lengths.std(correction=0)), rel=1e-6
    )
    assert found["r2"] == pytest.approx(1 - (factor - 1) ** 2, rel=1e-6)


def test_the_opposite_direction() -> None:
    _, target = pair()
    found = fidelity(-target, target, torch.zeros(5))
    assert found["cosine_similarity_mean"] == pytest.approx(-1.0, abs=1e-7)
    assert found["r2"] == pytest.approx(-3.0, rel=1e-6)


def test_another_samples_tokens_are_worse_than_the_mean() -> None:
    target = torch.randn(2000, 4, 5)
    found = fidelity(target.roll(1, dims=0), target, torch.zeros(5))
    assert found["cosine_similarity_mean"] == pytest.approx(0.0, abs=0.03)
    assert found["r2"] == pytest.approx(-1.0, abs=0.05)
    assert found["norm_ratio_mean"] > 1


def test_swapped_tokens_of_one_sample_show_in_every_metric_but_the_pooled_one() -> None:
    target = torch.randn(50, 4, 5)
    found = fidelity(target.flip(1), target, torch.zeros(5))
    assert found["pooled_cosine_similarity_mean"] == pytest.approx(1.0, abs=1e-6)
    assert found["cosine_similarity_mean"] < 0.2
    assert found["r2"] < -0.5


def test_each_channel_counts_alike_in_r2() -> None:
    target = torch.randn(50, 4, 2) * torch.tensor([100.0, 0.01])
    generated = target.clone()
    generated[..., 1] = column_means(target)[1]
    assert fidelity(generated, target, column_means(target))["r2"] == pytest.approx(0.5, abs=1e-6)


def test_a_channel_that_never_varies_is_left_out_of_r2() -> None:
    generated, target = pair()
    whole = fidelity(generated, target, column_means(target))["r2"]
    constant = torch.full((30, 4, 1), 0.5)
    with_constant = [torch.cat([generated, constant + 1], dim=2), torch.cat([target, constant], dim=2)]
    assert fidelity(*with_constant, column_means(with_constant[1]))["r2"] == pytest.approx(whole, rel=1e-9)
    assert np.isnan(fidelity(constant + 1, constant, torch.tensor([0.5]))["r2"])


def test_half_precision_is_measured_in_float64() -> None:
    target = (300 * torch.randn(20, 4, 64)).half()
    generated = (target + 100 * torch.randn(20, 4, 64)).half()
    found = fidelity(generated, target, torch.zeros(64, dtype=torch.half))
    assert found == pytest.approx(by_numpy(generated, target, torch.zeros(64)), rel=1e-9)


def test_a_zero_token_has_cosine_zero_and_length_zero() -> None:
    _, target = pair()
    found = fidelity(torch.zeros_like(target), target, torch.zeros(5))
    assert (found["cosine_similarity_mean"], found["norm_ratio_mean"]) == (0.0, 0.0)
    assert found["r2"] == pytest.approx(0.0, abs=1e-12)


def test_no_sample_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="expected at least one sample"):
        FidelitySums(torch.zeros(5)).result()


@pytest.mark.parametrize("shape", [(30, 4, 4), (29, 4, 5), (4, 5), (30, 20)])
def test_shapes_that_differ_are_refused_with_both(shape: tuple[int, ...]) -> None:
    _, target = pair()
    with pytest.raises(ValueError, match=rf"found \[{shape[0]}, .*\] and \[30, 4, 5\]"):
        FidelitySums(torch.zeros(5)).add(torch.zeros(shape), target)
    with pytest.raises(ValueError, match="one shape"):
        fidelity(target.flatten(1), target.flatten(1), torch.zeros(20))
