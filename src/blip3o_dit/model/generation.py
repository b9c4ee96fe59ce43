"""From noise to tokens: the solver's steps over a model's velocity, with guidance, recorded on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from blip3o_dit.flow.config import ANY_STEPS
from blip3o_dit.flow.path import time_grid
from blip3o_dit.flow.solvers import ADAPTIVE_SOLVER, SOLVERS, integrate, integrate_adaptive
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.cuda_graphs import CUDAGraphs
from blip3o_dit.utils.validation import check_finite_number, check_interval, check_name, checked_integer

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

    def in_steps(self, steps: int, time_shift: float) -> list[bool]:
        """Whether it acts in each of so many steps."""
        return [self.acts_at(t) for t in time_grid(steps, time_shift).tolist()[:-1]]


def checked_sampling(
    config: BLIP3oDiTConfig,
    num_inference_steps: int | None,
    solver: str | None,
    guidance_scale: float,
    guidance_interval: tuple[float, float],
) -> tuple[str, int, Guidance]:
    """The solver, its steps and the guidance, with the model's defaults where nothing is asked for.

    Raises:
        ValueError: for names and values that do not fit, or that this model was not trained for.
    """
    check_finite_number("guidance_scale", guidance_scale)
    if guidance_scale != 1.0 and config.flow.condition_dropout == 0.0:
        raise ValueError(
            "guidance_scale: expected 1 because this model was trained with condition_dropout 0 "
            f"and does not know the null condition, found {guidance_scale}"
        )
    low, high = check_interval("guidance_interval", guidance_interval)
    solver = config.default_solver if solver is None else solver
    check_name("solver", solver, (*SOLVERS, ADAPTIVE_SOLVER))
    steps = config.default_steps
    if num_inference_steps is not None:
        steps = checked_integer("num_inference_steps", num_inference_steps, low=1)
    own = config.flow.student_steps
    # A distilled model knows average velocities, and those of an older version only over their own steps.
    if own and (solver != "euler" or own not in (ANY_STEPS, steps)):
        raise ValueError(
            f"num_inference_steps: expected {own} with solver euler, which this model was taught, found "
            f"{steps} with {solver}"
        )
    return solver, steps, Guidance(guidance_scale, low, high)


def solve(
    model: BLIP3oDiTModel,
    names: Tensor,
    eva: Tensor,
    guidance: Guidance,
    steps: int,
    solver: str,
    noise_scale: float = 1.0,
    *,
    recorder: CUDAGraphs | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Tensor:
    """The noise's names and conditions [B, L, C_eva] -> tokens [B, N, C], both in the units of the data.

    With a recorder all kernels are launched together; `progress` wraps the steps. The inputs are on any
    device, the tokens on the model's.
    """
    how = dict(guidance=guidance, steps=steps, solver=solver, noise_scale=noise_scale)
    run: Callable[..., Tensor] = partial(_solve, model, **how, progress=progress)  # type: ignore[arg-type]
    if recorder is None:
        return run(names, eva)
    return recorder.run(run, (names, eva), model.device, key=tuple(how.values()))


def _solve(
    model: BLIP3oDiTModel,
    names: Tensor,
    eva: Tensor,
    *,
    guidance: Guidance,
    steps: int,
    solver: str,
    noise_scale: float,
    progress: Callable[[Iterable[int]], Iterable[int]] | None,
) -> Tensor:
    """Given inputs on the model's device, nothing here copies between devices or asks a GPU for a number, as
    a recording demands."""
    noise, shift = model.noise_of(names), model.config.flow.time_shift
    times = SOLVERS[solver].call_times(time_grid(steps, shift, noise.device))
    rows = len(times) * len(noise) * (1 if guidance.scale == 1.0 else 2)
    known = times if rows * model.dit.modulation_bytes <= MAX_MODULATION_BYTES else None
    guided = guidance.in_steps(steps, shift)
    return tokens_from_noise(
        model, noise, eva, guidance.scale, guided, solver, noise_scale, times=known, progress=progress
    )


def tokens_from_noise(
    model: BLIP3oDiTModel,
    noise: Tensor,
    eva: Tensor,
    guidance_scale: float,
    guided: Sequence[bool],
    solver: str,
    noise_scale: float,
    *,
    times: Tensor | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] | None = None,
) -> Tensor:
    """As `solve`, of the noise itself [B, N, C]: N(0, 1) in float32; this is what is exported.

    Args:
        guided: one for each step, whether guidance acts in it.
        times: of all calls, if their modulations shall be computed before the first one.
    """
    x_0, condition = model.initial_state(noise, eva, noise_scale)
    source = model.source_distribution(condition)
    velocity = model.make_velocity_fn(condition, source, guidance_scale, times, steps=len(guided))
    x_1 = integrate(
        velocity,
        x_0,
        num_steps=len(guided),
        solver=solver,
        time_shift=model.config.flow.time_shift,
        velocity_of_step=lambda step: partial(velocity, guided=guided[step]),
        progress=progress,
    )
    return model.tokens_of(x_1, source)


def solve_adaptively(
    model: BLIP3oDiTModel,
    names: Tensor,
    eva: Tensor,
    guidance: Guidance,
    tolerance: float,
    noise_scale: float,
) -> Tensor:
    """As `solve`, by the solver that chooses its steps."""
    x_0, condition = model.initial_state(model.noise_of(names), eva, noise_scale)
    source = model.source_distribution(condition)
    velocity = model.make_velocity_fn(condition, source, guidance.scale)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        return velocity(x, t, guided=guidance.acts_at(float(t[0])))

    x_1, _ = integrate_adaptive(guided, x_0, tolerance=tolerance)
    return model.tokens_of(x_1, source)
