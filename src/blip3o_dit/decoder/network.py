"""The decoder: a small transformer from target tokens to pictures, and the loss that it learns by."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_dit.decoder.config import DecoderConfig

# Sides of the squares whose means are compared: fine detail, and where things are.
SCALES = (1, 2, 4)


class TokenDecoder(nn.Module):
    """Target tokens [B, N, C], in the units of the data, -> pictures [B, 3, S, S] in 0..1.

    Standardises the tokens by the statistics of the training data, mixes them in pre-norm transformer layers
    (torch's own), and paints a patch of pixels from each, which a convolution smooths at the seams. Before
    training it paints the mean picture.
    """

    token_mean: Tensor  # [C]
    token_std: Tensor  # [C]
    mean_picture: Tensor  # [3, S, S]

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.about: dict[str, Any] = {}  # of its training: what config.json says
        width, split, patch = config.width, config.split, config.patch
        self.register_buffer("token_mean", torch.zeros(config.channels))
        self.register_buffer("token_std", torch.ones(config.channels))
        self.register_buffer("mean_picture", torch.full((3, config.picture_size, config.picture_size), 0.5))
        self.embed = nn.Linear(config.channels, split**2 * width)
        self.position = nn.Parameter(0.02 * torch.randn(config.num_tokens * split**2, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, config.num_heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.paint = nn.Linear(width, 3 * patch**2)
        last = nn.Conv2d(16, 3, 3, padding=1)
        self.smooth = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), last)
        for parameter in (*self.paint.parameters(), *last.parameters()):
            nn.init.zeros_(parameter)

    def standardize(self, tokens: Tensor) -> Tensor:
        """[B, N, C] in the units of the data -> what `forward` takes."""
        tokens = tokens.float()
        if self.config.normalize_embeddings:
            tokens = F.normalize(tokens, dim=-1)
        return (tokens - self.token_mean) / self.token_std

    def forward(self, tokens: Tensor) -> Tensor:
        """Standardised tokens [B, N, C] -> pictures [B, 3, S, S], which may leave 0..1."""
        grid, split, patch = self.config.grid, self.config.split, self.config.patch
        x = self.embed(tokens).unflatten(2, (split**2, -1))  # [B, N, k k, d]
        x = x.flatten(1, 2) + self.position  # [B, N k k, d]
        for layer in self.layers:
            x = layer(x)
        x = self.paint(self.norm(x))  # [B, N k k, 3 p p]
        x = x.view(-1, grid, grid, split, split, 3, patch, patch).permute(0, 5, 1, 3, 6, 2, 4, 7)
        picture = self.mean_picture + x.reshape(-1, *self.mean_picture.shape)  # [B, 3, S, S]
        return picture + self.smooth(picture)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens [B, N, C] in the units of the data -> pictures, uint8 [B, S, S, 3], on the CPU.

        Raises:
            ValueError: tokens of another shape.
        """
        expected = (self.config.num_tokens, self.config.channels)
        if tokens.dim() != 3 or tuple(tokens.shape[1:]) != expected:
            raise ValueError(
                f"tokens: expected [B, {expected[0]}, {expected[1]}], found {list(tokens.shape)}"
            )
        picture = self(self.standardize(tokens.to(self.token_mean.device)))
        return (255 * picture.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).cpu()


def picture_loss(found: Tensor, true: Tensor, *, edges: float) -> Tensor:
    """L1 between pictures [B, 3, S, S] in 0..1, and `edges` times that between the steps from pixel to pixel.

    Both are means over pictures of which squares of 1, 2 and 4 pixels became one (`SCALES`).
    """
    losses = []
    for scale in (scale for scale in SCALES if scale < true.shape[-1]):
        a, b = (F.avg_pool2d(picture, scale) for picture in (found, true))
        steps = sum((a.diff(dim=axis) - b.diff(dim=axis)).abs().mean() for axis in (2, 3))
        losses.append((a - b).abs().mean() + edges * steps)
    return torch.stack(losses).mean()
