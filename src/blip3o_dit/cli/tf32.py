"""The flag that lets float32 products on a GPU round their factors to TF32.

It is off unless asked for: float32 is what a figure of another precision or machine is compared with, and
TF32 keeps 10 bits of a factor's mantissa, where float32 keeps 23. bfloat16 keeps 7 and is faster still.
"""

from __future__ import annotations

import argparse

# Compute capability of the first GPUs with TF32 (Ampere).
MIN_CAPABILITY = (8, 0)


def add_tf32(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tf32", action="store_true", help="round the factors of float32 products to TF32, faster on a GPU"
    )


def use_tf32(device: str) -> None:
    """Let this process round so. Raises ValueError where no GPU with TF32 would be used."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        raise ValueError("--tf32: expected a GPU, found the CPU")
    found = torch.cuda.get_device_capability()
    if found < MIN_CAPABILITY:
        raise ValueError(
            "--tf32: expected compute capability {}.{} or newer, found {}.{}".format(*MIN_CAPABILITY, *found)
        )
    torch.set_float32_matmul_precision("high")
