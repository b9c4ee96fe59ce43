"""A store whose tokens say what is in its pictures, and a small decoder of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.decoder.config import DecoderConfig, DecoderTrainingConfig
from blip3o_dit.decoder.network import TokenDecoder

SIZE, GRID = 12, 3


def painted_store(folder: Path, *, samples: int = 48, condition: int = 12) -> tuple[EmbeddingStore, Path]:
    """A store of 3x3 tokens, 8 wide, and the folder of its pictures, 12 pixels a side.

    The square of 4 pixels at a token has the colour of its first three numbers, and a token is far from zero
    mean and unit scale.
    """
    generator = torch.Generator().manual_seed(3)
    colours = torch.randint(40, 216, (samples, GRID, GRID, 3), generator=generator, dtype=torch.uint8)
    images = folder / "painted"
    images.mkdir(parents=True)
    for number, squares in enumerate(colours.numpy()):
        picture = squares.repeat(SIZE // GRID, axis=0).repeat(SIZE // GRID, axis=1)
        Image.fromarray(picture).save(images / f"{number:02d}.png")
    others = torch.randn(samples, GRID**2, 5, generator=generator)
    clip = 5.0 + 0.2 * torch.cat([colours.flatten(1, 2) / 64.0, others], dim=-1)
    eva = clip.repeat(1, 1, 2)[..., :condition] + 0.1 * torch.randn(
        samples, GRID**2, condition, generator=generator
    )
    path = folder / "store"
    with StoreWriter(path, num_tokens=9, condition_dim=condition, target_dim=8, dtype="float32") as writer:
        writer.append(eva, clip, [{"key": f"{number:02d}.png"} for number in range(samples)])
    return EmbeddingStore(path), images


def tiny_decoder_training(**changes: Any) -> DecoderTrainingConfig:
    """Some steps of one narrow layer on the CPU."""
    settings: dict[str, Any] = dict(
        picture_size=SIZE,
        width=16,
        num_layers=1,
        num_heads=2,
        steps=40,
        batch_size=12,
        learning_rate=2e-2,
        noise=0.1,
        device="cpu",
    )
    return DecoderTrainingConfig(**(settings | changes))


def random_decoder(**changes: Any) -> TokenDecoder:
    """For the tokens of `painted_store`, with no weight at zero."""
    sizes: dict[str, Any] = dict(
        num_tokens=GRID**2, channels=8, picture_size=SIZE, width=16, num_layers=1, num_heads=2
    )
    torch.manual_seed(0)
    decoder = TokenDecoder(DecoderConfig(**(sizes | changes)))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return decoder.eval()


def picture_at(path: Path) -> np.ndarray:
    """uint8 [S, S, 3]."""
    return np.asarray(Image.open(path))
