"""Small stores of correlated conditions and targets, for ridge regressions and baselines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.data.store import EmbeddingStore, StoreWriter

TRAIN = np.random.default_rng(0).permutation(80)[:60]
TEST = np.setdiff1d(np.arange(80), TRAIN)


def write(path: Path, eva: Tensor, clip: Tensor) -> EmbeddingStore:
    sizes = dict(num_tokens=eva.shape[1], condition_dim=eva.shape[2], target_dim=clip.shape[2])
    with StoreWriter(path, **sizes, dtype="float32", shard_size=16) as writer:
        writer.append(eva, clip, [{"key": str(row)} for row in range(len(eva))])
    return EmbeddingStore(path)


def correlated(offset: float = 0.5) -> tuple[Tensor, Tensor]:
    """Conditions of unlike scales that go together, noisy linear targets, another mean per position."""
    generator = torch.Generator().manual_seed(0)
    eva = torch.randn(80, 4, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    clip = eva @ torch.randn(6, 3, generator=generator) + torch.randn(80, 4, 3, generator=generator)
    clip = clip + 5 * torch.arange(4.0)[:, None]
    return offset + eva * torch.tensor([1.0, 10.0, 0.01, 3.0, 1.0, 0.1]), clip


def rows(tokens: Tensor) -> np.ndarray:
    return tokens.double().numpy().reshape(-1, tokens.shape[-1])
