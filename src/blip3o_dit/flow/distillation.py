"""Few steps instead of many: what a student is taught. It knows a teacher only as a velocity v(x, t).

A student of n Euler steps carries x from t_k to t_(k+1) in one call, so what it must predict at (x, t_k) is
the teacher's average velocity over the interval,

    u = (x(t_(k+1)) - x(t_k)) / (t_(k+1) - t_k),  x(t) the teacher's own path through x at t_k.

It is found by several teacher steps inside the interval, on states that the teacher reaches: knowledge
distillation (Luhman and Luhman, arXiv 2101.02388), cut into n pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from blip3o_dit.flow.solvers import SOLVERS, Velocity
from blip3o_dit.flow.timesteps import time_grid


@dataclass(frozen=True)
class DistillationTarget:
    """Where a student stands and what it must say there. Shapes: `t` [B]; `x`, `velocity` [B, ...]."""

    t: Tensor
    x: Tensor
    velocity: Tensor


@torch.no_grad()
def trajectory_targets(
    teacher: Velocity,
    x_0: Tensor,
    *,
    student_steps: int,
    teacher_steps: int,
    solver: str = "heun",
    time_shift: float = 1.0,
) -> list[DistillationTarget]:
    """Follow the teacher from noise to data, and note each of the student's intervals on the way.

    Args:
        x_0: source samples [B, ...].
        student_steps: intervals of the student, of `time_grid(student_steps, time_shift)`.
        teacher_steps: the teacher's steps inside each of them.

    Returns: `student_steps` lessons of B samples each.
    """
    grid = time_grid(student_steps * teacher_steps, time_shift).to(x_0.device)
    step, x = SOLVERS[solver], x_0.float()
    targets = []
    for first in range(0, len(grid) - 1, teacher_steps):
        before, times = x, grid[first : first + teacher_steps + 1]
        for t, after in pairwise(times):
            x = step(teacher, x, t.expand(len(x)), after - t)
        start, end = times[0], times[-1]
        targets.append(DistillationTarget(start.expand(len(x)), before, (x - before) / (end - start)))
    return targets
