"""Fewer tokens of a picture: means over windows of its grid."""

from __future__ import annotations

import math

from torch import Tensor


def pool_tokens(tokens: Tensor, num_tokens: int) -> Tensor:
    """Mean over square windows: [B, G * G, C] -> [B, num_tokens, C], both grids row-major.

    16x16 patches become 8x8 tokens by 2x2 means, as in BLIP3-o (arXiv 2505.09568).

    Raises:
        ValueError: for token counts that are no squares, or a grid that does not pool evenly; says both.
    """
    grid, side = math.isqrt(tokens.shape[1]), math.isqrt(num_tokens)
    if grid * grid != tokens.shape[1]:
        raise ValueError(f"patch tokens: expected a square number (an n x n grid), found {tokens.shape[1]}")
    if side < 1 or side * side != num_tokens:
        raise ValueError(f"tokens: expected a square number, found {num_tokens}")
    if side > grid or grid % side:
        raise ValueError(
            f"tokens: a grid of {grid}x{grid} patches does not pool evenly into {side}x{side} = {num_tokens}"
        )
    window = grid // side
    cells = tokens.unflatten(1, (side, window, side, window))  # [B, side, window, side, window, C]
    return cells.mean(dim=(2, 4)).flatten(1, 2)
