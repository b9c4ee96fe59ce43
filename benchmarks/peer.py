"""What a user would put together instead: diffusers' Lumina class, its Euler scheduler, a loop by hand.

It has the weights of one of our models (through `conversion.py`), in the same memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, LuminaNextDiT2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.conversion import diffusers_config, to_diffusers_state_dict


class Peer(nn.Module):
    """`LuminaNextDiT2DModel` behind the projection of the condition, which the class itself has not.

    Args:
        share: use our model's memory for the weights; otherwise copy them, to be trained on its own.
        checkpointing: recompute every block in the backward pass, as BLIP3-o's training does.
    """

    def __init__(self, model: BLIP3oDiTModel, *, share: bool, checkpointing: bool = False) -> None:
        super().__init__()
        config = model.config
        with torch.device("meta"):
            self.lumina = LuminaNextDiT2DModel(**diffusers_config(config))
        weights = to_diffusers_state_dict(model)
        if not share:
            weights = {name: weight.clone() for name, weight in weights.items()}
        self.lumina.load_state_dict(weights, assign=True)
        d = config.model_dim
        linears = [nn.Linear(config.eva_embedding_size, d), nn.Linear(d, d)]
        self.projection = nn.Sequential(linears[0], nn.GELU(approximate="tanh"), linears[1])
        self.projection.to(model.device, model.dtype)
        for mine, theirs in zip((0, 2), ("linear_1", "linear_2"), strict=True):
            self.projection[mine].load_state_dict(getattr(model.dit.caption_projection, theirs).state_dict())
        self.grid, self.channels = config.input_size, config.in_channels
        self.rope = get_2d_rotary_pos_embed_lumina(config.head_dim, self.grid, self.grid).to(model.device)
        self.lumina.pad_token.requires_grad_(False)  # unused by the class
        if checkpointing:
            for layer in self.lumina.layers:
                layer.forward = _checkpointed(layer.forward)

    def forward(self, latents: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        """Latents [B, C, grid, grid], timestep [B] of 1000, projected condition [B, L, d]."""
        mask = torch.ones(condition.shape[:2], device=condition.device)
        return self.lumina(
            latents, timestep, condition, mask, self.rope, cross_attention_kwargs={}, return_dict=False
        )[0]

    @torch.no_grad()
    def generate(self, eva: Tensor, noise: Tensor, steps: int, guidance_scale: float = 1.0) -> Tensor:
        """Noise [B, N, C] -> tokens [B, N, C]; the condition is projected once, before the loop."""
        dtype, guided = self.lumina.dtype, guidance_scale != 1.0
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[1.0 - k / steps for k in range(steps)], device=noise.device)
        condition = torch.cat([torch.zeros_like(eva), eva]) if guided else eva
        projected = self.projection(condition.to(dtype))
        latents = self._image(noise)
        for timestep in scheduler.timesteps:
            both = torch.cat([latents, latents]) if guided else latents
            velocity = self(both.to(dtype), timestep.expand(len(both)), projected).float()
            if guided:
                null, conditional = velocity.chunk(2)
                velocity = null + guidance_scale * (conditional - null)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents.flatten(2).transpose(1, 2)

    def loss(self, eva: Tensor, clip: Tensor) -> Tensor:
        """Flow matching as in BLIP3-o's training loop: draw, interpolate, predict, compare."""
        image, t = self._image(clip), torch.rand(len(clip), device=clip.device)
        noise = torch.randn_like(image)
        sigma = t[:, None, None, None]
        noisy = (1 - sigma) * image + sigma * noise
        return F.mse_loss(self(noisy, 1000 * t, self.projection(eva)).float(), noise - image)

    def _image(self, tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).reshape(-1, self.channels, self.grid, self.grid)


def _checkpointed(forward):  # type: ignore[no-untyped-def]
    def recomputed(*inputs, **named):  # type: ignore[no-untyped-def]
        return checkpoint(forward, *inputs, use_reentrant=False, **named)

    return recomputed
