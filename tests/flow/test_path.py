"""The path, its velocity and the three prediction types against closed forms and each other."""

from __future__ import annotations

import math

import pytest
import torch

from blip3o_dit.flow.config import PREDICTION_TYPES
from blip3o_dit.flow.loss import BLIP3oFlowMatchingLoss
from blip3o_dit.flow.path import (
    PATHS,
    CosinePath,
    LinearPath,
    PathSample,
    ProbabilityPath,
)
from blip3o_dit.flow.predictions import convert_prediction, preconditioning, velocity_scale
from blip3o_dit.flow.solvers import integrate

SIGMAS = [(1e-4, 1.0), (0.0, 1.0), (0.05, 2.0)]


def draws(batch: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_1 = torch.randn(batch, 4, 5, generator=generator, dtype=torch.float64)
    noise = torch.randn(batch, 4, 5, generator=generator, dtype=torch.float64)
    return x_1, noise, torch.linspace(0.06, 0.94, batch, dtype=torch.float64)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize(("sigma_min", "sigma_max"), SIGMAS)
def test_velocity_is_the_time_derivative_of_x_t(name: str, sigma_min: float, sigma_max: float) -> None:
    path = PATHS[name](sigma_min=sigma_min, sigma_max=sigma_max)
    x_1, noise, t = draws()
    step = 1e-2
    forward, backward = (path.sample(x_1, noise, t + s).x_t for s in (step, -step))
    difference = (forward - backward) / (2 * step)
    torch.testing.assert_close(path.sample(x_1, noise, t).velocity, difference, atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", PATHS)
def test_noise_is_at_zero_and_data_at_one(name: str) -> None:
    path = PATHS[name](sigma_min=1e-4, sigma_max=1.5)
    x_1, noise, _ = draws(2)
    start = path.sample(x_1, noise, torch.zeros(2))
    end = path.sample(x_1, noise, torch.ones(2))
    torch.testing.assert_close(start.x_t, 1.5 * noise.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(start.x_t, path.initial_point(noise), atol=1e-6, rtol=0)
    torch.testing.assert_close(end.x_t, x_1.float(), atol=1e-3, rtol=0)


def test_linear_path_is_conditional_optimal_transport() -> None:
    x_1, noise, t = draws()
    sample = LinearPath(sigma_min=0.1, sigma_max=2.0).sample(x_1, noise, t)
    time = t[:, None, None]
    expected = time * x_1 + (2.0 * (1 - time) + 0.1 * time) * noise
    torch.testing.assert_close(sample.x_t, expected.float())
    torch.testing.assert_close(sample.velocity, (x_1 + (0.1 - 2.0) * noise).float())


def test_cosine_path_preserves_variance() -> None:
    path = CosinePath(sigma_min=0.0, sigma_max=1.0)
    t = torch.linspace(0, 1, 7)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones(7))
    torch.testing.assert_close(path.alpha(torch.tensor(1 / 3)), torch.tensor(0.5))


def truths(sample: PathSample, path: ProbabilityPath) -> dict[str, torch.Tensor]:
    """What a perfect network of each prediction type puts out."""
    t = sample.t.reshape(-1, *[1] * (sample.x_t.ndim - 1))
    alpha, sigma = path.alpha(t), path.sigma(t)
    # F of the preconditioning, from x_1 and the noise instead of from its definition
    rotated = (sigma * sample.x_1 - alpha * sample.noise) / (alpha**2 + sigma**2).sqrt()
    return {
        "v_prediction": sample.velocity,
        "epsilon": sample.noise,
        "sample": sample.x_1,
        "preconditioned": rotated,
    }


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("source", PREDICTION_TYPES)
@pytest.mark.parametrize("target", PREDICTION_TYPES)
@pytest.mark.parametrize(("sigma_min", "sigma_max"), SIGMAS)
def test_true_predictions_convert_into_each_other(
    name: str, source: str, target: str, sigma_min: float, sigma_max: float
) -> None:
    path = PATHS[name](sigma_min=sigma_min, sigma_max=sigma_max)
    sample = path.sample(*draws())
    truth = truths(sample, path)
    converted = convert_prediction(
        truth[source], sample.x_t, sample.t, path, from_type=source, to_type=target
    )
    torch.testing.assert_close(converted, truth[target], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", PATHS)
def test_conversion_stays_finite_at_the_singular_ends(name: str) -> None:
    path = PATHS[name](sigma_min=0.0, sigma_max=1.0)
    x_1, noise, _ = draws(2)
    sample = path.sample(x_1, noise, torch.tensor([0.0, 1.0]))
    for source, wrong in (("epsilon", sample.noise + 0.01), ("sample", sample.x_1 + 0.01)):
        velocity = convert_prediction(
            wrong, sample.x_t, sample.t, path, from_type=source, to_type="v_prediction"
        )
        assert torch.isfinite(velocity).all()
        assert (velocity - sample.velocity).abs().max() < 8.0


def test_float32_whatever_comes_in() -> None:
    path = LinearPath()
    x_1, noise, t = (x.bfloat16() for x in draws())
    sample = path.sample(x_1, noise, t)
    assert {sample.x_t.dtype, sample.velocity.dtype, sample.t.dtype} == {torch.float32}
    times = torch.arange(1, 1001) / 1000
    shifted = path.sample(torch.ones(1000, 1), torch.zeros(1000, 1), times)
    assert shifted.x_t.unique().numel() == 1000  # bfloat16 would keep about half of them apart


@pytest.mark.parametrize("name", PATHS)
def test_sample_loss_is_the_error_of_the_implied_velocity(name: str) -> None:
    path = PATHS[name](sigma_min=1e-4, sigma_max=1.0)
    sample = path.sample(*draws())
    wrong = sample.x_1 + 0.1 * torch.randn(sample.x_1.shape, generator=torch.Generator().manual_seed(5))
    implied = convert_prediction(
        wrong, sample.x_t, sample.t, path, from_type="sample", to_type="v_prediction"
    )
    loss_fn = BLIP3oFlowMatchingLoss(prediction_type="sample", schedule_type=name)
    expected = (implied - sample.velocity).square().mean()
    found = loss_fn(wrong, sample).flow_matching_loss
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", PATHS)
def test_a_preconditioned_zero_samples_the_standard_normal(name: str) -> None:
    """Zero output is the exact velocity for x_1 ~ N(0, I): the flow is then the identity (in deviations)."""
    path = PATHS[name](sigma_min=0.0, sigma_max=1.0)
    x_0 = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return convert_prediction(
            torch.zeros_like(x), x, t, path, from_type="preconditioned", to_type="v_prediction"
        )

    x_1 = integrate(velocity, x_0, num_steps=200, solver="midpoint")
    torch.testing.assert_close(x_1, x_0, rtol=1e-3, atol=1e-3)
    t = torch.zeros(500)
    mean = convert_prediction(
        torch.zeros_like(x_0), x_0, t, path, from_type="preconditioned", to_type="sample"
    )
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_preconditioning_is_the_regression_of_the_velocity_on_x_t(name: str) -> None:
    path = PATHS[name](sigma_min=0.05, sigma_max=1.5)
    generator = torch.Generator().manual_seed(0)
    x_1, noise = (torch.randn(200_000, generator=generator) for _ in range(2))
    for time in (0.0, 0.2, 0.7, 1.0):
        sample = path.sample(x_1, noise, torch.full((200_000,), time))
        skip, out = preconditioning(torch.tensor(time), path)
        slope = (sample.velocity * sample.x_t).mean() / sample.x_t.square().mean()
        assert float(skip) == pytest.approx(float(slope), abs=0.02)
        left = (sample.velocity - slope * sample.x_t).std()
        assert float(out) == pytest.approx(float(left), rel=0.02)


def test_velocity_scale_is_one_over_one_minus_t_and_clamped() -> None:
    path = LinearPath(sigma_min=0.0, sigma_max=1.0)
    scale = velocity_scale(torch.tensor([0.0, 0.5, 0.9, 0.99, 1.0]), path)
    torch.testing.assert_close(scale, torch.tensor([1.0, 2.0, 10.0, 20.0, 20.0]))


def test_losses_are_zero_for_the_truth_and_known_for_a_known_error() -> None:
    x_1, noise, t = draws()
    for prediction_type in PREDICTION_TYPES:
        loss_fn = BLIP3oFlowMatchingLoss(prediction_type=prediction_type, sigma_min=0.0)
        sample = loss_fn.sample_path(x_1, noise, t)
        truth = truths(sample, loss_fn.path)
        assert loss_fn(truth[prediction_type], sample).loss < 1e-10
        wrong = loss_fn(truth[prediction_type] + 0.5, sample).loss
        weights = {
            "sample": (1 / (1 - t).clamp(min=0.05) ** 2).mean(),
            "preconditioned": (1 / (t**2 + (1 - t) ** 2)).mean(),
        }
        weight = weights.get(prediction_type, 1.0)
        assert float(wrong) == pytest.approx(0.25 * float(weight), rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_a_penalty_without_weight_has_no_backward_pass(weight: float) -> None:
    x_1, noise = torch.randn(2, 4, 3, 2)
    loss_fn = BLIP3oFlowMatchingLoss(regularization_weight=weight)
    prediction = torch.randn(4, 3, 2, requires_grad=True)
    output = loss_fn(prediction, loss_fn.sample_path(x_1, noise, torch.rand(4)))
    assert output.regularization_loss.requires_grad == (weight > 0)
    assert float(output.regularization_loss.detach()) == pytest.approx(
        float(prediction.detach().square().mean())
    )


def test_regularization_is_the_mean_square_of_the_output() -> None:
    x_1, noise, t = draws()
    loss_fn = BLIP3oFlowMatchingLoss(regularization_weight=0.1, sigma_min=1e-5, sigma_max=2.0)
    sample = loss_fn.sample_path(x_1, noise, t)
    output = loss_fn(sample.velocity, sample)
    assert float(output.flow_matching_loss) == 0
    torch.testing.assert_close(output.regularization_loss, sample.velocity.square().mean())
    torch.testing.assert_close(output.loss, 0.1 * output.regularization_loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sigma_min=1.0, sigma_max=1.0), r"sigma_min: expected a number in \[0.0, 1.0\)"),
        (dict(sigma_min=-0.1), r"sigma_min.*found -0.1"),
        (dict(sigma_max=math.inf), r"sigma_max.*found inf"),
        (
            dict(prediction_type="noise"),
            r"expected one of \('v_prediction', 'epsilon', 'sample', 'preconditioned'\)",
        ),
        (dict(schedule_type="karras"), r"expected one of \('linear', 'cosine'\), found 'karras'"),
        (dict(regularization_weight=-1.0), r"regularization_weight.*found -1.0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BLIP3oFlowMatchingLoss(**arguments)


def test_wrong_shapes_are_refused() -> None:
    loss_fn = BLIP3oFlowMatchingLoss()
    with pytest.raises(ValueError, match="noise has"):
        loss_fn.sample_path(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="expected t of shape"):
        loss_fn.sample_path(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))
    sample = loss_fn.sample_path(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="prediction has shape"):
        loss_fn(torch.zeros(2, 1), sample)
