"""Pooling against a loop, and the numbers in its refusals."""

from __future__ import annotations

import pytest
import torch

from blip3o_dit.data.pooling import pool_tokens


@pytest.mark.parametrize(("grid", "side"), [(16, 8), (6, 3), (6, 2), (4, 4), (5, 1)])
def test_each_token_is_the_mean_of_its_window(grid: int, side: int) -> None:
    tokens = torch.randn(2, grid * grid, 3)
    window = grid // side
    found = pool_tokens(tokens, side * side)
    cells = tokens.reshape(2, grid, grid, 3)
    for row in range(side):
        for column in range(side):
            rows, columns = (slice(i * window, (i + 1) * window) for i in (row, column))
            expected = cells[:, rows, columns].mean(dim=(1, 2))
            torch.testing.assert_close(found[:, row * side + column], expected)


@pytest.mark.parametrize(
    ("patches", "tokens", "message"),
    [
        (256, 60, "expected a square number, found 60"),
        (257, 64, r"patch tokens: expected a square number .* found 257"),
        (256, 49, "16x16 patches does not pool evenly into 7x7 = 49"),
        (16, 64, "4x4 patches does not pool evenly into 8x8 = 64"),
        (16, 0, "expected a square number, found 0"),
    ],
)
def test_what_does_not_pool_is_refused_with_the_numbers(patches: int, tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pool_tokens(torch.zeros(1, patches, 2), tokens)
