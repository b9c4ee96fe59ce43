"""Times that training draws and grids that solvers walk."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kstest, norm

from blip3o_dit.flow.config import FlowMatchingConfig
from blip3o_dit.flow.path import shift_time, time_grid, training_times
from blip3o_dit.training.config import TrainingConfig

UNIFORM = torch.rand(20_000, generator=torch.Generator().manual_seed(0))


def test_uniform_times_are_the_draws() -> None:
    assert torch.equal(training_times(UNIFORM, FlowMatchingConfig()), UNIFORM)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.5)])
def test_logit_normal_times_have_a_normal_logit_of_the_noise_level(mean: float, std: float) -> None:
    config = FlowMatchingConfig(time_distribution="logit_normal", time_mean=mean, time_std=std)
    noise_level = 1.0 - training_times(UNIFORM, config).double()
    assert kstest(torch.logit(noise_level).numpy(), norm(mean, std).cdf).pvalue > 0.01


def test_the_ends_of_the_draw_stay_inside() -> None:
    config = FlowMatchingConfig(time_distribution="logit_normal", time_std=3.0, time_shift=5.0)
    times = training_times(torch.tensor([0.0, 1.0 - 2**-24]), config)
    assert torch.isfinite(times).all() and (times >= 0).all() and (times <= 1).all()


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
def test_training_times_are_shifted_after_they_are_drawn(distribution: str) -> None:
    plain = training_times(UNIFORM, FlowMatchingConfig(time_distribution=distribution))
    shifted = training_times(UNIFORM, FlowMatchingConfig(time_distribution=distribution, time_shift=3.0))
    assert torch.equal(shifted, shift_time(plain, 3.0)) and not torch.equal(shifted, plain)


@pytest.mark.parametrize("alpha", [0.43, 1.0, 3.46])
def test_the_shift_is_its_formula_in_the_noise_level(alpha: float) -> None:
    t = torch.linspace(0, 1, 11)
    s = 1 - t
    torch.testing.assert_close(1 - shift_time(t, alpha), alpha * s / (1 + (alpha - 1) * s))
    # logit(s') = logit(s) + log(alpha): the shift moves a logit-normal by log(alpha)
    inner = shift_time(t[1:-1], alpha)
    expected = torch.logit(s[1:-1]) + torch.log(torch.tensor(alpha))
    torch.testing.assert_close(torch.logit(1 - inner), expected, rtol=1e-4, atol=1e-4)


def test_a_grid_goes_from_zero_to_one() -> None:
    for alpha in (0.4, 1.0, 5.0):
        grid = time_grid(7, alpha)
        assert grid[0] == 0 and grid[-1] == 1 and (grid.diff() > 0).all()
    assert (time_grid(8, 4.0).diff()[0] < time_grid(8, 4.0).diff()[-1]).item()  # more steps near the noise


def test_the_shift_of_a_run_follows_its_data() -> None:
    flow = TrainingConfig(time_shift=0.0).flow_matching(num_tokens=64, condition_dim=1280, target_dim=768)
    assert flow.time_shift == pytest.approx((64 * 768 / 4096) ** 0.5)
    assert TrainingConfig(time_shift=2.0).flow_matching(num_tokens=64, target_dim=768).time_shift == 2.0
