"""Probability paths between noise and data, and what a network may predict on them.

The one convention of this project (others are converted in `model/official_convention.py`):

* t in [0, 1]; x_0 is the source (noise) at t = 0, x_1 is the data at t = 1, v = dx/dt.
* x_t = alpha(t) x_1 + sigma(t) eps with eps ~ N(0, I).

Everything here is float32, whatever dtype the network computes in.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o_dit.flow.config import PREDICTION_TYPES, FlowMatchingConfig, check_sigmas
from blip3o_dit.flow.timesteps import time_grid
from blip3o_dit.utils.validation import check_name

# Near t = 1 the noise, and near t = 0 the data, cannot be read off x_t: the division by sigma / sigma_max
# or alpha stops here. The value is JiT's (arXiv 2511.13720).
MIN_SCALE = 0.05


@dataclass(frozen=True)
class PathSample:
    """One draw on a path. The network's input and the loss both read this object.

    Shapes: `t` [B]; `x_1`, `noise`, `x_t`, `velocity` [B, ...], all float32.
    """

    t: Tensor
    x_1: Tensor
    noise: Tensor
    x_t: Tensor
    velocity: Tensor


class ProbabilityPath(ABC):
    """x_t = alpha(t) x_1 + sigma(t) eps, and its velocity.

    Args:
        sigma_min: noise left at t = 1, in units of the (standardised) data.
        sigma_max: noise at t = 0.
        grid: for a distilled model the times of its steps, from 0 to 1; its velocity is the average one
            from t to the next of them.

    Raises:
        ValueError: unless 0 <= sigma_min < sigma_max.
    """

    def __init__(
        self, *, sigma_min: float = 1e-4, sigma_max: float = 1.0, grid: Tensor | None = None
    ) -> None:
        check_sigmas(sigma_min, sigma_max)
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max
        self.grid = grid

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

    def source(self, noise: Tensor) -> Tensor:
        """x_0 = sigma(0) eps: where sampling starts, the same as where training starts."""
        return self.sigma_max * noise.float()

    def sample(self, x_1: Tensor, noise: Tensor, t: Tensor) -> PathSample:
        """Put data [B, ...] and noise [B, ...] on the path at times t [B]."""
        if x_1.shape != noise.shape:
            raise ValueError(f"x_1 has shape {tuple(x_1.shape)}, noise has {tuple(noise.shape)}")
        if t.shape != x_1.shape[:1]:
            raise ValueError(f"expected t of shape {tuple(x_1.shape[:1])}, found {tuple(t.shape)}")
        x_1, noise, t = x_1.float(), noise.float(), t.float()
        time = _expand(t, x_1)
        return PathSample(
            t=t,
            x_1=x_1,
            noise=noise,
            x_t=self.alpha(time) * x_1 + self.sigma(time) * noise,
            velocity=self.alpha_derivative(time) * x_1 + self.sigma_derivative(time) * noise,
        )


class LinearPath(ProbabilityPath):
    """Conditional optimal transport: alpha = t, sigma = sigma_max (1 - t) + sigma_min t.

    Lipman et al. 2023 (arXiv 2210.02747), equation 22; BLIP3-o's (arXiv 2505.09568) for sigma_min = 0.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return t

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * (1.0 - t) + self.sigma_min * t

    def alpha_derivative(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma_derivative(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.sigma_min - self.sigma_max)


class CosinePath(ProbabilityPath):
    """Trigonometric: alpha = sin(pi t / 2), sigma = sigma_min + (sigma_max - sigma_min) cos(pi t / 2).

    Variance preserving for sigma_min = 0, sigma_max = 1 and data of unit variance (SiT, arXiv 2401.08740).
    """

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min + (self.sigma_max - self.sigma_min) * torch.cos(t * (math.pi / 2))

    def alpha_derivative(self, t: Tensor) -> Tensor:
        return (math.pi / 2) * torch.cos(t * (math.pi / 2))

    def sigma_derivative(self, t: Tensor) -> Tensor:
        return -(math.pi / 2) * (self.sigma_max - self.sigma_min) * torch.sin(t * (math.pi / 2))


PATHS: dict[str, type[ProbabilityPath]] = {"linear": LinearPath, "cosine": CosinePath}


def make_path(config: FlowMatchingConfig) -> ProbabilityPath:
    """The path that a configuration trains on, and that sampling must follow."""
    grid = time_grid(config.student_steps, config.time_shift) if config.student_steps else None
    return PATHS[config.schedule_type](sigma_min=config.sigma_min, sigma_max=config.sigma_max, grid=grid)


def convert_prediction(
    prediction: Tensor,
    x_t: Tensor,
    t: Tensor,
    path: ProbabilityPath,
    *,
    from_type: str,
    to_type: str,
    min_scale: float = MIN_SCALE,
) -> Tensor:
    """Turn any prediction type into any other, given x_t and t; float32.

    "preconditioned" is F in v = c_skip(t) x_t + c_out(t) F, where c_skip x_t is the best guess of v and c_out
    the deviation of what it leaves, for x_1 ~ N(0, I) independent of the condition. A network that puts out
    zero then samples that Gaussian exactly, and F has unit variance at all times. It is EDM's
    preconditioning (Karras et al., arXiv 2206.00364, appendix B.6) written for a velocity.

    x_t and the prediction determine x_1 and eps, and these determine everything else. Reading the data off
    a predicted noise divides by alpha (zero at t = 0), reading the noise off predicted data divides by
    sigma (almost zero at t = 1): both divisors are kept at or above `min_scale`.

    Args:
        prediction, x_t: [B, ...]. t: [B].
        from_type, to_type: one of `PREDICTION_TYPES`.

    Returns: [B, ...] float32.

    Raises:
        ValueError: for an unknown prediction type.
    """
    check_name("from_type", from_type, PREDICTION_TYPES)
    check_name("to_type", to_type, PREDICTION_TYPES)
    prediction, x_t = prediction.float(), x_t.float()
    if from_type == to_type:
        return prediction
    time = _expand(t.float(), x_t)
    if from_type == "preconditioned":
        skip, out = preconditioning(time, path)
        prediction, from_type = skip * x_t + out * prediction, "v_prediction"
    if to_type == from_type:
        return prediction
    x_1, noise = _endpoints(prediction, x_t, time, path, from_type, min_scale)
    if to_type == "sample":
        return x_1
    if to_type == "epsilon":
        return noise
    velocity = path.alpha_derivative(time) * x_1 + path.sigma_derivative(time) * noise
    if to_type == "v_prediction":
        return velocity
    skip, out = preconditioning(time, path)
    return (velocity - skip * x_t) / out


def preconditioning(t: Tensor, path: ProbabilityPath) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of "preconditioned": regression of v on x_t for x_1 ~ N(0, I), and its residual's std.

    c_skip = (alpha alpha' + sigma sigma') / (alpha^2 + sigma^2),
    c_out = |alpha sigma' - alpha' sigma| / (alpha^2 + sigma^2)^(1/2).

    For a distilled model c_skip x_t is the average velocity of the same Gaussian up to the next time t' of
    its grid, ((var(t') / var(t))^(1/2) - 1) / (t' - t) with var = alpha^2 + sigma^2: a network that puts out
    zero still samples that Gaussian exactly, in however few steps.
    """
    alpha, sigma = path.alpha(t), path.sigma(t)
    variance = alpha.square() + sigma.square()
    out = -_determinant(t, path) / variance.sqrt()
    if path.grid is None:
        return (alpha * path.alpha_derivative(t) + sigma * path.sigma_derivative(t)) / variance, out
    grid = path.grid.to(t.device)
    end = grid[torch.searchsorted(grid, t + 1e-5, right=True).clamp(max=len(grid) - 1)]
    ratio = ((path.alpha(end).square() + path.sigma(end).square()) / variance).sqrt()
    return (ratio - 1.0) / (end - t).clamp(min=1e-6), out


def velocity_scale(t: Tensor, path: ProbabilityPath, min_scale: float = MIN_SCALE) -> Tensor:
    """|dv/dx_1| at fixed x_t: the factor between an error in x_1 and the error of the velocity it implies.

    v = (sigma' x_t + (alpha' sigma - alpha sigma') x_1) / sigma, so for the linear path with sigma_min = 0
    the factor is 1 / (1 - t), kept finite as JiT does (arXiv 2511.13720).
    """
    sigma = path.sigma(t).clamp(min=min_scale * path.sigma_max)
    return -_determinant(t, path) / sigma


def _endpoints(
    prediction: Tensor, x_t: Tensor, time: Tensor, path: ProbabilityPath, source: str, floor: float
) -> tuple[Tensor, Tensor]:
    """(x_1, eps) from x_t = alpha x_1 + sigma eps and the prediction."""
    alpha, sigma = path.alpha(time), path.sigma(time)
    if source == "sample":
        noise = (x_t - alpha * prediction) / sigma.clamp(min=floor * path.sigma_max)
        return prediction, noise
    if source == "epsilon":
        return (x_t - sigma * prediction) / alpha.clamp(min=floor), prediction
    determinant = _determinant(time, path)
    x_1 = (path.sigma_derivative(time) * x_t - sigma * prediction) / determinant
    noise = (alpha * prediction - path.alpha_derivative(time) * x_t) / determinant
    return x_1, noise


def _determinant(t: Tensor, path: ProbabilityPath) -> Tensor:
    """alpha sigma' - alpha' sigma: negative on all of [0, 1] for both paths, as sigma_max > sigma_min."""
    return path.alpha(t) * path.sigma_derivative(t) - path.alpha_derivative(t) * path.sigma(t)


def _expand(t: Tensor, like: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (like.ndim - 1))
