"""Solvers against integrals with known answers, and their cost in calls."""

from __future__ import annotations

import math

import pytest
import torch

from blip3o_dit.flow.path import PATHS, shift_time
from blip3o_dit.flow.solvers import SOLVERS, integrate, integrate_adaptive


class Counted:
    def __init__(self, field) -> None:
        self.field, self.times = field, []

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.shape == x.shape[:1]
        self.times.append(float(t[0]))
        return self.field(x, t)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("num_steps", [1, 7])
def test_calls_are_those_claimed(solver: str, num_steps: int) -> None:
    field = Counted(lambda x, t: torch.zeros_like(x))
    integrate(field, torch.ones(3, 2), num_steps=num_steps, solver=solver)
    assert len(field.times) == num_steps * SOLVERS[solver].calls_per_step
    assert field.times[0] == 0.0
    if solver == "euler":
        assert field.times == pytest.approx([k / num_steps for k in range(num_steps)])


def test_euler_is_exact_for_a_constant_velocity_and_heun_for_a_linear_one() -> None:
    x_0 = torch.randn(4, 3)
    constant = integrate(lambda x, t: torch.full_like(x, 2.0), x_0, num_steps=3, solver="euler")
    torch.testing.assert_close(constant, x_0 + 2.0)
    ramp = integrate(lambda x, t: t[:, None].expand_as(x), x_0, num_steps=3, solver="heun")
    torch.testing.assert_close(ramp, x_0 + 0.5)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_order_of_convergence(solver: str, order: int) -> None:
    """dx/dt = x has x(1) = e x(0): halving the step divides the error by 2^order."""
    x_0 = torch.ones(1, 1)
    errors = [
        abs(float(integrate(lambda x, t: x, x_0, num_steps=n, solver=solver)) - math.e) for n in (16, 32)
    ]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


@pytest.mark.parametrize("name", PATHS)
def test_the_true_velocity_of_one_point_leads_from_noise_to_that_point(name: str) -> None:
    """For data that is a single point the velocity is known in closed form; follow it."""
    path = PATHS[name](sigma_min=1e-4, sigma_max=1.0)
    point = torch.tensor([[1.5, -0.5]])

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t[:, None]
        noise = (x - path.alpha(t) * point) / path.sigma(t)
        return path.alpha_derivative(t) * point + path.sigma_derivative(t) * noise

    end = integrate(velocity, path.initial_point(torch.randn(5, 2)), num_steps=400, solver="euler")
    torch.testing.assert_close(end, point.expand(5, 2), atol=2e-2, rtol=0)


def test_state_is_float32_and_bad_names_are_refused() -> None:
    out = integrate(lambda x, t: x.bfloat16(), torch.ones(2, 2).bfloat16(), num_steps=2)
    assert out.dtype == torch.float32
    with pytest.raises(ValueError, match=r"solver: expected one of \('euler', 'midpoint', 'heun'\)"):
        integrate(lambda x, t: x, torch.ones(1, 1), num_steps=1, solver="rk4")
    with pytest.raises(ValueError, match="expected >= 1, found 0"):
        integrate(lambda x, t: x, torch.ones(1, 1), num_steps=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_shifted_grid_still_integrates(solver: str) -> None:
    """dx/dt = 3 t^2 has x(1) = x(0) + 1, on any fine grid from 0 to 1."""
    field = Counted(lambda x, t: 3 * t[:, None] ** 2 * torch.ones_like(x))
    x_1 = integrate(field, torch.zeros(2, 1), num_steps=200, solver=solver, time_shift=3.0)
    torch.testing.assert_close(x_1, torch.ones(2, 1), rtol=0, atol=0.02)
    if solver == "euler":
        expected = shift_time(torch.arange(200) / 200, 3.0).tolist()
        assert field.times == pytest.approx(expected, abs=1e-6)


def test_the_adaptive_solver_agrees_with_many_steps() -> None:
    field = Counted(lambda x, t: torch.sin(5 * t)[:, None] * x)
    found, calls = integrate_adaptive(field, torch.ones(3, 2), tolerance=1e-6)
    assert calls == len(field.times) > 6
    exact = math.exp((1 - math.cos(5)) / 5)
    torch.testing.assert_close(found, torch.full((3, 2), exact), rtol=1e-4, atol=1e-4)
