"""Small embedding stores for tests."""

from __future__ import annotations

from pathlib import Path

import torch

from blip3o_dit.data.store import EmbeddingStore, StoreWriter


def write_linear_store(
    path: Path, *, samples: int = 48, tokens: int = 9, condition: int = 12, target: int = 8
) -> EmbeddingStore:
    """Targets are a linear map of the conditions plus noise, both far from zero mean and unit scale."""
    generator = torch.Generator().manual_seed(7)
    eva = 3.0 + torch.randn(samples, tokens, condition, generator=generator)
    matrix = torch.randn(condition, target, generator=generator)
    clip = 0.05 * (eva @ matrix + 0.3 * torch.randn(samples, tokens, target, generator=generator))
    records = [{"key": f"sample-{i}", "caption": f"caption {i}"} for i in range(samples)]
    writer = StoreWriter(
        path, num_tokens=tokens, condition_dim=condition, target_dim=target, dtype="float32", shard_size=10
    )
    with writer:
        writer.append(eva, clip, records)
    return EmbeddingStore(path)
