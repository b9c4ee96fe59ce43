"""Fixed-step solvers of dx/dt = v(x, t) from t = 0 to t = 1. n steps are n intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""v(x [B, ...], t [B]) -> [B, ...]"""


def euler_step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, dt: float) -> Tensor:
    """First order, one call of the velocity."""
    return x + dt * velocity(x, t)


def heun_step(velocity: Velocity, x: Tensor, t: Tensor, t_next: Tensor, dt: float) -> Tensor:
    """Second order (explicit trapezoid), two calls of the velocity."""
    slope = velocity(x, t)
    slope_next = velocity(x + dt * slope, t_next)
    return x + (0.5 * dt) * (slope + slope_next)


SOLVERS = {"euler": euler_step, "heun": heun_step}
CALLS_PER_STEP = {"euler": 1, "heun": 2}


def integrate(
    velocity: Velocity,
    x_0: Tensor,
    *,
    num_steps: int,
    solver: str = "euler",
    track: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Tensor:
    """Carry x_0 [B, ...] from t = 0 to t = 1 in equal steps; the state is float32.

    Args:
        velocity: v(x, t [B]).
        num_steps: number of intervals, >= 1. Costs `num_steps * CALLS_PER_STEP[solver]` calls.
        solver: "euler" or "heun".
        track: wraps the iterable of steps, for a progress bar.

    Raises:
        ValueError: for an unknown solver or num_steps < 1.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {tuple(SOLVERS)}, found {solver!r}")
    if num_steps < 1:
        raise ValueError(f"number of inference steps: expected >= 1, found {num_steps}")
    step = SOLVERS[solver]
    x = x_0.float()
    grid = torch.linspace(0.0, 1.0, num_steps + 1, device=x.device)
    times = grid[:, None].expand(-1, x.shape[0])
    steps: Iterable[int] = range(num_steps)
    for k in track(steps) if track else steps:
        x = step(velocity, x, times[k], times[k + 1], 1.0 / num_steps)
    return x
