"""Probability paths between noise and data, times on them, and informed sources in place of the noise.

The one convention of this project (others are converted in `model/conversion.py`):

* t in [0, 1]; x_0 is the source (noise) at t = 0, x_1 is the data at t = 1, v = dx/dt.
* x_t = alpha(t) x_1 + sigma(t) eps with eps ~ N(0, I).

Times are drawn, and the solver's grid is laid out, in the noise level s = 1 - t. The shift
s' = alpha s / (1 + (alpha - 1) s) moves them towards noise for alpha > 1 (Esser et al., arXiv 2403.03206,
equation 23; alpha = sqrt(N d / 4096) for N tokens of d numbers is RAE's, arXiv 2510.11690): the more numbers
a sample has, the more noise it takes to hide them.

Everything here is float32, whatever dtype the network computes in. Importing this imports no torch: the
command line reads the names of paths, predictions and solvers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from blip3o_dit.utils.validation import check_range

if TYPE_CHECKING:
    from torch import Tensor, device

    from blip3o_dit.flow.config import FlowMatchingConfig  # it lists `PATHS`


@dataclass(frozen=True)
class PathPoint:
    """Points x_t [B, ...] on a path at t [B], and the velocity [B, ...] there; float32."""

    t: Tensor
    x_t: Tensor
    velocity: Tensor


Points = TypeVar("Points", bound=PathPoint)


@dataclass(frozen=True)
class PathSample(PathPoint):
    """Points on the path between data x_1 and noise: what the network's input and the loss are made from."""

    x_1: Tensor
    noise: Tensor


class ProbabilityPath(ABC):
    """x_t = alpha(t) x_1 + sigma(t) eps, and its velocity; sigma_max is sigma(0), sigma_min sigma(1).

    Raises:
        ValueError: unless 0 <= sigma_min < sigma_max.
    """

    def __init__(self, *, sigma_min: float = 1e-4, sigma_max: float = 1.0) -> None:
        check_sigmas(sigma_min, sigma_max)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data at t."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise at t."""

    @abstractmethod
    def alpha_derivative(self, t: Tensor) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def sigma_derivative(self, t: Tensor) -> Tensor:
        """d sigma / dt."""

    def initial_point(self, noise: Tensor) -> Tensor:
        """x_0 = sigma(0) eps: where sampling starts, the same as where training starts."""
        return self.sigma_max * noise.float()

    def sample(self, x_1: Tensor, noise: Tensor, t: Tensor) -> PathSample:
        """Put data [B, ...] and noise [B, ...] on the path at times t [B]."""
        if x_1.shape != noise.shape:
            raise ValueError(f"x_1 has shape {tuple(x_1.shape)}, noise has {tuple(noise.shape)}")
        if t.shape != x_1.shape[:1]:
            raise ValueError(f"expected t of shape {tuple(x_1.shape[:1])}, found {tuple(t.shape)}")
        x_1, noise, t = x_1.float(), noise.float(), t.float()
        time = expand_times(t, x_1)
        return PathSample(
            t=t,
            x_t=self.alpha(time) * x_1 + self.sigma(time) * noise,
            velocity=self.velocity(x_1, noise, time),
            x_1=x_1,
            noise=noise,
        )

    def velocity(self, x_1: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """dx_t / dt = alpha' x_1 + sigma' eps; t of a shape that multiplies x_1."""
        return self.alpha_derivative(t) * x_1 + self.sigma_derivative(t) * noise

    def determinant(self, t: Tensor) -> Tensor:
        """alpha sigma' - alpha' sigma: negative on all of [0, 1] for both paths, as sigma_max > sigma_min."""
        return self.alpha(t) * self.sigma_derivative(t) - self.alpha_derivative(t) * self.sigma(t)


class LinearPath(ProbabilityPath):
    """Conditional optimal transport: alpha = t, sigma = sigma_max (1 - t) + sigma_min t.

    Lipman et al. 2023 (arXiv 2210.02747), equation 22; BLIP3-o's (arXiv 2505.09568) for sigma_min = 0.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * (1.0 - t) + self.sigma_min * t

    def alpha_derivative(self, t: Tensor) -> Tensor:
        return t.new_ones(t.shape)

    def sigma_derivative(self, t: Tensor) -> Tensor:
        return t.new_full(t.shape, self.sigma_min - self.sigma_max)


class CosinePath(ProbabilityPath):
    """Trigonometric: alpha = sin(pi t / 2), sigma = sigma_min + (sigma_max - sigma_min) cos(pi t / 2).

    Variance preserving for sigma_min = 0, sigma_max = 1 and data of unit variance (SiT, arXiv 2401.08740).
    """

    def alpha(self, t: Tensor) -> Tensor:
        return (t * (math.pi / 2)).sin()

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min + (self.sigma_max - self.sigma_min) * (t * (math.pi / 2)).cos()

    def alpha_derivative(self, t: Tensor) -> Tensor:
        return (math.pi / 2) * (t * (math.pi / 2)).cos()

    def sigma_derivative(self, t: Tensor) -> Tensor:
        return -(math.pi / 2) * (self.sigma_max - self.sigma_min) * (t * (math.pi / 2)).sin()


PATHS: dict[str, type[ProbabilityPath]] = {"linear": LinearPath, "cosine": CosinePath}


def make_path(config: FlowMatchingConfig) -> ProbabilityPath:
    """The path that a configuration trains on, and that sampling must follow."""
    return PATHS[config.schedule_type](sigma_min=config.sigma_min, sigma_max=config.sigma_max)


@dataclass(frozen=True)
class AffineSource:
    """An informed source: the paths of one batch start at x_0 = R(c) + s eps instead of at pure noise.

    Conditional flow matching allows any source distribution q_0(x | c) (Tong et al., arXiv 2302.00482). Here
    R is a ridge regression of the training targets on the conditions and s its residual's standard deviation,
    in the network's (standardised) units: R(c) [B, N, C], s [C] per channel or [B, N, C] where it is
    predicted too; None and None for pure noise.

    A path from x_0 to x_1 is, in the coordinates y = (x - R(c)) / s, an ordinary path from pure noise to the
    standardised residual. So the flow (path, loss, solver, conversions) works on y and knows nothing of R,
    and the network is shown x = R(c) + s y.
    """

    mean: Tensor | None = None
    std: Tensor | None = None

    def to_flow(self, x: Tensor) -> Tensor:
        """The network's units -> the flow's, y = (x - R(c)) / s."""
        return x if self.mean is None or self.std is None else (x - self.mean) / self.std

    def from_flow(self, y: Tensor) -> Tensor:
        """The flow's units -> the network's, x = R(c) + s y."""
        return y if self.mean is None or self.std is None else self.mean + self.std * y

    def repeat(self, times: int) -> AffineSource:
        """The same batch, so many times one after the other."""
        mean, std = (
            x.repeat(times, 1, 1) if x is not None and x.ndim == 3 else x for x in (self.mean, self.std)
        )
        return AffineSource(mean, std)


@dataclass(frozen=True)
class FlowBatch(Generic[Points]):
    """Samples on their path in the flow's units, and all that the network needs to predict there.

    `sample` has t [B] and x_t [B, N, C]; `condition` [B, L, C_eva] is normalised, zero where it was dropped.
    """

    sample: Points
    source: AffineSource
    condition: Tensor

    @property
    def network_input(self) -> Tensor:
        """x_t in the network's units, [B, N, C]."""
        return self.source.from_flow(self.sample.x_t)

    def predict(self, model: Callable[..., Tensor]) -> Tensor:
        """What the model, or whatever wraps it for several processes, predicts; [B, N, C], float32."""
        return model(self.network_input, self.sample.t, self.condition, self.source.mean)


def shift_time(t: Tensor, alpha: float) -> Tensor:
    """t in [0, 1] -> t', by the shift of the noise level; 0 and 1 stay."""
    if alpha == 1.0:
        return t
    # 1 - alpha s / (1 + (alpha - 1) s) with s = 1 - t, written so that 0 and 1 are met exactly
    return t / (alpha + (1.0 - alpha) * t)


def training_times(uniform: Tensor, config: FlowMatchingConfig) -> Tensor:
    """Times from uniform numbers in [0, 1) [B], by the inverse distribution function; float32 in [0, 1].

    `logit_normal` samples the noise level s with logit(s) ~ N(time_mean, time_std^2) (arXiv 2403.03206,
    equation 19); the shift comes on top.
    """
    import torch

    t = uniform.float()
    if config.time_distribution == "logit_normal":
        # clamped by a float32 step, or an exact 0 would give minus infinity
        normal = torch.special.ndtri((1.0 - t).double().clamp(1e-7, 1 - 1e-7))
        t = 1.0 - torch.sigmoid(config.time_mean + config.time_std * normal).float()
    return shift_time(t, config.time_shift)


def time_grid(num_steps: int, alpha: float = 1.0, device: device | None = None) -> Tensor:
    """num_steps + 1 times from 0 to 1: equal steps, shifted as training shifts its times; float32.

    Computed on the device, by default the CPU, and not copied there, which a CUDA graph does not allow.
    """
    import torch

    return shift_time(torch.linspace(0.0, 1.0, num_steps + 1, device=device), alpha)


def step_ends(t: Tensor, grid: Tensor) -> Tensor:
    """Where the steps that begin at t end: the next times of a grid [n + 1], which has t up to rounding."""
    passed = (grid <= t[..., None] + 1e-5).sum(dim=-1)  # as searchsorted, which ONNX does not have
    return grid[passed.clamp(max=len(grid) - 1)]


def expand_times(t: Tensor, like: Tensor) -> Tensor:
    """Times [B] -> [B, 1, ...], which multiply `like` [B, ...]."""
    return t.reshape(-1, *[1] * (like.ndim - 1))


def check_sigmas(sigma_min: float, sigma_max: float) -> None:
    """Raises ValueError unless 0 <= sigma_min < sigma_max < infinity."""
    check_range("sigma_max", sigma_max, 0.0, math.inf)
    check_range("sigma_min", sigma_min, 0.0, sigma_max)
