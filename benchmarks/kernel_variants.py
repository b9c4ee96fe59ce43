"""SwiGLU inside its product, beside the product and the pass after it: what a GPU has to answer.

Fused, a layer makes 19 passes over its activations instead of 21, and one launch less; but the product is
Triton's instead of cuBLAS's. `python -m benchmarks.kernel_variants` on a GPU times both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.measure import device
from blip3o_dit.model.cpu_kernels import FeedForward, pack_weights
from blip3o_dit.model.gpu_kernels import swiglu

# Rows, columns and depth of a tile, warps, stages: for few rows as many programs as an H100 has processors.
TILES = (
    (64, 32, 128, 4, 4),
    (64, 64, 64, 4, 4),
    (128, 64, 64, 4, 4),
    (128, 128, 64, 8, 3),
)


@triton.jit
def product_swiglu(
    x_ptr,
    gate_ptr,
    up_ptr,
    out_ptr,
    rows,
    inner,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """x [rows, width], gate and up weights [inner, width] -> silu(x gate^T) * x up^T [rows, inner]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        place = column[None, :].to(tl.int64) * width + depth[:, None]
        inside = (column < inner)[None, :] & (depth < width)[:, None]
        in_x = (row < rows)[:, None] & (depth < width)[None, :]
        x = tl.load(x_ptr + row[:, None].to(tl.int64) * width + depth[None, :], mask=in_x, other=0.0)
        gate = tl.dot(x, tl.load(gate_ptr + place, mask=inside, other=0.0), gate)
        up = tl.dot(x, tl.load(up_ptr + place, mask=inside, other=0.0), up)
    out = gate * tl.sigmoid(gate) * up
    tl.store(
        out_ptr + row[:, None].to(tl.int64) * inner + column[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=(row < rows)[:, None] & (column < inner)[None, :],
    )


def fused(feed_forward: FeedForward, x: Tensor, tile: tuple[int, int, int, int, int] = TILES[0]) -> Tensor:
    """As `gpu_kernels.swiglu`: [B, N, d] -> [B, N, inner]."""
    gate, up = feed_forward.linear_1.weight, feed_forward.linear_3.weight
    rows, (inner, width) = x.shape[0] * x.shape[1], gate.shape
    out = torch.empty(*x.shape[:-1], inner, dtype=x.dtype, device=x.device)
    high, wide, depth, warps, stages = tile
    product_swiglu[(triton.cdiv(rows, high), triton.cdiv(inner, wide))](
        x, gate, up, out, rows, inner, width,
        ROWS=high, COLUMNS=wide, DEPTH=depth, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


@torch.no_grad()
def measure() -> Iterator[dict[str, Any]]:
    """Microseconds at the default width, bfloat16, random numbers, for 1, 8 and 64 samples."""
    layer = FeedForward(1792, 4864).to(device(), torch.bfloat16)
    pack_weights([layer.linear_1.weight, layer.linear_3.weight])
    for batch in (1, 8, 64):
        x = torch.randn(batch, 64, 1792, device=device(), dtype=torch.bfloat16)
        row: dict[str, Any] = {
            "batch": batch,
            "product, then SwiGLU": _microseconds(lambda x=x: swiglu(layer, x)),
        }
        for tile in TILES:
            row[f"fused, tile {tile}"] = _microseconds(lambda x=x, tile=tile: fused(layer, x, tile))
        yield row


def _microseconds(function: Any) -> float:
    return 1000 * triton.testing.do_bench_cudagraph(function, rep=50)


if __name__ == "__main__":
    for found in measure():
        print(found)
