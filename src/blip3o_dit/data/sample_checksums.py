"""A CRC-32 for each sample of a shard, so that reading a sample checks it without reading the whole shard."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

NAME, DTYPE = "crc32", torch.int64


def sample_checksums(eva: Tensor, clip: Tensor) -> Tensor:
    """Of each sample's bytes, eva's and then clip's, as they are stored: [n, L, C_eva], [n, N, C] -> [n]."""
    return torch.tensor([sample_checksum(*sample) for sample in zip(eva, clip, strict=True)], dtype=DTYPE)


def sample_checksum(eva: Tensor, clip: Tensor) -> int:
    return zlib.crc32(_bytes_of(clip), zlib.crc32(_bytes_of(eva)))


def _bytes_of(tokens: Tensor) -> memoryview:
    return memoryview(tokens.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
