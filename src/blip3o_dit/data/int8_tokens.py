"""Tokens in one byte a number: a scale for each token, and whole numbers from -127 to 127.

On disk a token of width C is C + 4 bytes, its numbers and then its scale in float32, a 127th of the largest.
Tokens that were read and are stored again have the same bytes: fl(fl(127 s) / 127) = s for each scale s that
is such a quotient, which was tried for every significand.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "int8"
_LARGEST, _SCALE_BYTES = 127, 4


def width_on_disk(width: int, dtype: str) -> int:
    """Numbers of a token of this width, as a store of this dtype holds it."""
    return width + _SCALE_BYTES if dtype == NAME else width


def quantized(tokens: Tensor) -> Tensor:
    """[n, N, C] -> int8 [n, N, C + 4]. The error is at most 1/254 of a token's largest value."""
    tokens = tokens.float()
    scale = tokens.abs().amax(dim=-1, keepdim=True) / _LARGEST  # [n, N, 1]
    whole = (tokens / scale.where(scale > 0, 1.0)).round().clamp(-_LARGEST, _LARGEST)
    return torch.cat([whole.to(torch.int8), scale.view(torch.int8)], dim=-1)


def restored(stored: Tensor) -> Tensor:
    """The reverse, float32: [..., N, C + 4] -> [..., N, C]."""
    width = stored.shape[-1] - _SCALE_BYTES
    return stored[..., :width].float() * stored[..., width:].contiguous().view(torch.float32)
