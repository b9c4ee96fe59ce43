"""Matrix products of few rows: x w^T beside w x^T, which `model/cpu_kernels.py` takes where it is faster."""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Row, alternate, device

# Output and input widths of the default network's products, and of one a quarter as wide.
SHAPES = ((7168, 1792), (9728, 1792), (1792, 4864), (1792, 1792), (1792, 448))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows_of_x", type=int, nargs="+", default=[64, 256, 512, 2048])
    parser.add_argument("--rounds", type=int, default=9)


@torch.no_grad()
def run(arguments: argparse.Namespace) -> list[Row]:
    return [_compare(count, n, k, arguments.rounds) for count in arguments.rows_of_x for n, k in SHAPES]


def _compare(rows: int, n: int, k: int, rounds: int) -> Row:
    x, w = torch.randn(rows, k, device=device()), torch.randn(n, k, device=device())
    ways = {
        "x w^T": partial(F.linear, x, w),
        "w x^T": partial(_from_the_left, x, w),
        "w x^T, copied": partial(_copied, x, w),
    }
    rates = {name: 2.0 * rows * n * k / s / 1e9 for name, s in alternate(ways, rounds).items()}
    return {"rows": rows, "outputs": n, "inputs": k} | {f"{name} GFLOP/s": r for name, r in rates.items()}


def _from_the_left(x: Tensor, w: Tensor) -> Tensor:
    return (w @ x.t()).t()


def _copied(x: Tensor, w: Tensor) -> Tensor:
    return _from_the_left(x, w).contiguous()
