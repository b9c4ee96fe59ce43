"""Solvers of dx/dt = v(x, t) from t = 0 to t = 1. n steps are n intervals of a grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blip3o_dit.flow.path import time_grid
from blip3o_dit.utils.validation import package_missing

if TYPE_CHECKING:
    from torch import Tensor

# v(x [B, ...], t [B]) -> [B, ...]
Velocity = Callable[["Tensor", "Tensor"], "Tensor"]


def euler_step(velocity: Velocity, x: Tensor, t: Tensor, dt: Tensor) -> Tensor:
    """First order, one call of the velocity. t [B], dt a scalar."""
    return x + dt * velocity(x, t)


def midpoint_step(velocity: Velocity, x: Tensor, t: Tensor, dt: Tensor) -> Tensor:
    """Second order, two calls of the velocity, none of them at the step's end."""
    return x + dt * velocity(x + 0.5 * dt * velocity(x, t), t + 0.5 * dt)


def heun_step(velocity: Velocity, x: Tensor, t: Tensor, dt: Tensor) -> Tensor:
    """Second order (explicit trapezoid), two calls of the velocity."""
    slope = velocity(x, t)
    return x + 0.5 * dt * (slope + velocity(x + dt * slope, t + dt))


@dataclass(frozen=True)
class Solver:
    """`step(velocity, x, t [B], dt)` carries x over one interval.

    `stages`: where in the interval it calls the velocity, from 0 to 1.
    """

    step: Callable[[Velocity, Tensor, Tensor, Tensor], Tensor]
    stages: tuple[float, ...]

    @property
    def calls_per_step(self) -> int:
        return len(self.stages)

    def call_times(self, grid: Tensor) -> Tensor:
        """The times of all calls, in their order, given the ends of the intervals [n + 1]."""
        times = grid.new_empty(len(grid) - 1, len(self.stages))
        for i, stage in enumerate(self.stages):
            times[:, i] = grid[:-1] + stage * grid.diff()
        return times.flatten()


SOLVERS = {
    "euler": Solver(euler_step, stages=(0.0,)),
    "midpoint": Solver(midpoint_step, stages=(0.0, 0.5)),
    "heun": Solver(heun_step, stages=(0.0, 1.0)),
}
ADAPTIVE_SOLVER = "dopri5"


def integrate(
    velocity: Velocity,
    x_0: Tensor,
    *,
    num_steps: int,
    solver: str = "euler",
    time_shift: float = 1.0,
    velocity_of_step: Callable[[int], Velocity] | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Tensor:
    """Carry x_0 [B, ...] from t = 0 to t = 1 along `time_grid`; the state is float32.

    Args:
        velocity_of_step: a step's number, from 0 -> the velocity for all of its stages, in place of
            `velocity`.
        num_steps: number of intervals, >= 1. Costs `num_steps * SOLVERS[solver].calls_per_step` calls.
        progress: wraps the iterable of steps, for a progress bar.

    Raises:
        ValueError: for an unknown solver or num_steps < 1.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {tuple(SOLVERS)}, found {solver!r}")
    if num_steps < 1:
        raise ValueError(f"number of inference steps: expected >= 1, found {num_steps}")
    step = SOLVERS[solver].step
    x = x_0.float()
    grid = time_grid(num_steps, time_shift, x.device)
    times, lengths = grid[:, None].expand(-1, x.shape[0]), grid.diff()
    for k in progress(range(num_steps)) if progress else range(num_steps):
        field = velocity_of_step(k) if velocity_of_step else velocity
        x = step(field, x, times[k], lengths[k])
    return x


def integrate_adaptive(velocity: Velocity, x_0: Tensor, *, tolerance: float = 1e-4) -> tuple[Tensor, int]:
    """As `integrate` by Dormand and Prince's method of order 5, through torchdiffeq; for reference.

    The step size is chosen for the whole batch, so a sample depends (within the tolerance, the relative and
    absolute error per step) on its batch. Returns x_1 and the number of velocity calls.

    Raises:
        ValueError: when torchdiffeq is not installed.
    """
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise package_missing("solver dopri5", "torchdiffeq") from None
    calls = 0

    def slope(t: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return velocity(x, t.expand(x.shape[0]))

    x = x_0.float()
    ends = time_grid(1).to(x.device)
    return odeint(slope, x, ends, rtol=tolerance, atol=tolerance, method=ADAPTIVE_SOLVER)[-1], calls
