"""From noise to tokens: the solver's steps over a model's velocity, with guidance, recorded on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from blip3o_dit.flow.path import AffineSource, time_grid
from blip3o_dit.flow.solvers import SOLVERS, Velocity, integrate, integrate_adaptive
from blip3o_dit.model.cuda_graphs import CUDAGraphs

if TYPE_CHECKING:
    from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel

# The modulations of all network calls are computed before the first one if they take no more than this. For
# more samples at a time reading their weights at every call costs little beside the rest.
MAX_MODULATION_BYTES = 512 * 2**20


class Guidance(NamedTuple):
    """Classifier-free guidance by `scale` in the steps that begin at low <= t < high."""

    scale: float
    low: float
    high: float

    def acts_at(self, t: float) -> bool:
        return self.low <= t and (t < self.high or self.high == 1.0)


def solve(
    model: BLIP3oDiTModel,
    x_0: Tensor,
    condition: Tensor,
    guidance: Guidance,
    steps: int,
    solver: str,
    *,
    recorder: CUDAGraphs | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Tensor:
    """x_0 [B, N, C], normalised conditions [B, L, C_eva] -> tokens [B, N, C] in the units of the data.

    With a recorder all kernels are launched together; `progress` wraps the steps.
    """
    grid = time_grid(steps, model.config.flow.time_shift).to(x_0.device)
    run = partial(_solve, model, guidance=guidance, steps=steps, solver=solver, progress=progress)
    if recorder is None:
        return run(x_0, condition, grid)
    return recorder.run(run, (x_0, condition, grid), key=(guidance, steps, solver))


def _solve(
    model: BLIP3oDiTModel,
    x_0: Tensor,
    condition: Tensor,
    grid: Tensor,
    *,
    guidance: Guidance,
    steps: int,
    solver: str,
    progress: Callable[[Iterable[int]], Iterable[int]] | None,
) -> Tensor:
    """Nothing here asks a GPU for a number or copies between devices, as a recording demands."""
    source = model.source_distribution(condition)
    times = SOLVERS[solver].call_times(grid)
    rows = len(times) * len(x_0) * (1 if guidance.scale == 1.0 else 2)
    known = times if rows * model.dit.modulation_bytes <= MAX_MODULATION_BYTES else None
    velocity_at = _guided_velocity(model, condition, source, guidance, known)
    x_1 = integrate(
        velocity_at(0.0),
        x_0,
        num_steps=steps,
        solver=solver,
        time_shift=model.config.flow.time_shift,
        velocity_of_step=velocity_at,
        progress=progress,
        grid=grid,
    )
    return model.tokens_of(x_1, source)


def solve_adaptively(
    model: BLIP3oDiTModel, x_0: Tensor, condition: Tensor, guidance: Guidance, tolerance: float
) -> Tensor:
    """As `solve`, by the solver that chooses its steps."""
    source = model.source_distribution(condition)
    velocity_at = _guided_velocity(model, condition, source, guidance)
    x_1, _ = integrate_adaptive(lambda x, t: velocity_at(float(t[0]))(x, t), x_0, tolerance=tolerance)
    return model.tokens_of(x_1, source)


def _guided_velocity(
    model: BLIP3oDiTModel,
    condition: Tensor,
    source: AffineSource,
    guidance: Guidance,
    times: Tensor | None = None,
) -> Callable[[float], Velocity]:
    """The time at which a step begins -> the velocity in that step."""
    velocity = model.make_velocity_fn(condition, source, guidance.scale, times)
    return lambda t: partial(velocity, guided=guidance.acts_at(t))
