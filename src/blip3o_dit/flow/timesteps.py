"""Timestep sampling for training, and the solver's time grid.

Both are written in the noise level s = 1 - t. The shift s' = alpha s / (1 + (alpha - 1) s) moves them towards
noise for alpha > 1 (Esser et al., arXiv 2403.03206, equation 23; alpha = sqrt(N d / 4096) for N tokens of d
numbers is RAE's, arXiv 2510.11690): the more numbers a sample has, the more noise it takes to hide them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # it imports the solvers, and they the grid
    from blip3o_dit.flow.config import FlowMatchingConfig


def shift_time(t: Tensor, alpha: float) -> Tensor:
    """t in [0, 1] -> t', by the shift of the noise level; 0 and 1 stay."""
    # 1 - alpha s / (1 + (alpha - 1) s) with s = 1 - t, written so that 0 and 1 are met exactly
    return t / (alpha + (1.0 - alpha) * t)


def training_times(uniform: Tensor, config: FlowMatchingConfig) -> Tensor:
    """Times from uniform numbers in [0, 1) [B], by the inverse distribution function; float32 in [0, 1].

    `logit_normal` samples the noise level s with logit(s) ~ N(time_mean, time_std^2) (arXiv 2403.03206,
    equation 19); the shift comes on top.
    """
    t = uniform.float()
    if config.time_distribution == "logit_normal":
        # clamped by a float32 step, or an exact 0 would give minus infinity
        normal = torch.special.ndtri((1.0 - t).double().clamp(1e-7, 1 - 1e-7))
        t = 1.0 - torch.sigmoid(config.time_mean + config.time_std * normal).float()
    return shift_time(t, config.time_shift)


def time_grid(num_steps: int, alpha: float = 1.0) -> Tensor:
    """num_steps + 1 times from 0 to 1: equal steps, shifted as training shifts its times; float32."""
    return shift_time(torch.linspace(0.0, 1.0, num_steps + 1), alpha)
