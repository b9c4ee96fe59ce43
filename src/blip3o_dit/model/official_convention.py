"""The one place where this project's convention meets that of BLIP3-o and diffusers.

Here: t = 0 is noise, t = 1 is data, and the network predicts dx/dt (about data minus noise).
There: timestep 1000 is noise, 0 is data, and the network predicts dx/dsigma (noise minus data).
So the network embeds 1000 (1 - t), and weights change sides by the sign of their output layer.
"""

from __future__ import annotations

from torch import Tensor

OUTPUT_LAYER = "norm_out.linear_2"


def official_timestep(t: Tensor) -> Tensor:
    """t [B] in [0, 1] -> the noise level on the scale 0..1000 that the released weights embed."""
    return 1000.0 * (1.0 - t)


def flip_velocity_sign(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same network predicting the velocity of the other convention (its own inverse)."""
    return {
        name: -tensor if name.startswith(OUTPUT_LAYER + ".") else tensor
        for name, tensor in state_dict.items()
    }
