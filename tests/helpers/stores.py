"""Small embedding stores for tests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from blip3o_dit.data.manifest import MANIFEST
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


def without_sample_checksums(path: Path) -> Path:
    """The store at `path` as older versions wrote it."""
    manifest = json.loads((path / MANIFEST).read_text())
    for entry in manifest["shards"]:
        file = path / entry["file"]
        tensors = load_file(file)
        save_file({name: tensors[name].clone() for name in ("eva", "clip")}, file)
        entry |= {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path
