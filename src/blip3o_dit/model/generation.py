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
    names: Tensor,
    eva: Tensor,
    guidance: Guidance,
    steps: int,
    solver: str,
    *,
    recorder: CUDAGraphs | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Tensor:
    """The noise's names and conditions [B, L, C_eva] -> tokens [B, N, C], both in the units of the data.

    With a recorder all kernels are launched together; `progress` wraps the steps. The inputs are on any
    device, the tokens on the model's.
    """
    run = partial(_solve, model, guidance=guidance, steps=steps, solver=solver, progress=progress)
    if recorder is None:
        return run(names, eva)
    return recorder.run(run, (names, eva), model.device, key=(guidance, steps, solver))


def _solve(
    model: BLIP3oDiTModel,
    names: Tensor,
    eva: Tensor,
    *,
    guidance: Guidance,
    steps: int,
    solver: str,
    progress: Callable[[Iterable[int]], Iterable[int]] | None,
) -> Tensor:
    """Given inputs on the model's device, nothing here copies between devices or asks a GPU for a number, as
    a recording demands."""
    x_0, condition = model.initial_state(names, eva)
    source = model.source_distribution(condition)
    shift = model.config.flow.time_shift
    times = SOLVERS[solver].call_times(time_grid(steps, shift, x_0.device))
    rows = len(times) * len(x_0) * (1 if guidance.scale == 1.0 else 2)
    known = times if rows * model.dit.modulation_bytes <= MAX_MODULATION_BYTES else None
    velocity_at = _guided_velocity(model, condition, source, guidance, known, steps)
    x_1 = integrate(
        velocity_at(0.0),
        x_0,
        num_steps=steps,
        solver=solver,
        time_shift=shift,
        velocity_of_step=velocity_at,
        progress=progress,
    )
    return model.tokens_of(x_1, source)


def solve_adaptively(
    model: BLIP3oDiTModel, names: Tensor, eva: Tensor, guidance: Guidance, tolerance: float
) -> Tensor:
    """As `solve`, by the solver that chooses its steps."""
    x_0, condition = model.initial_state(names, eva)
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
    steps: int = 1,
) -> Callable[[float], Velocity]:
    """The time at which a step begins -> the velocity in that step."""
    velocity = model.make_velocity_fn(condition, source, guidance.scale, times, steps)
    return lambda t: partial(velocity, guided=guidance.acts_at(t))
