"""Checks on how a program was launched."""

from __future__ import annotations

import os


def check_launch(world_size: int) -> None:
    """Refuse a launch whose processes would each work alone into the same folder.

    Raises:
        ValueError: when the launcher started another number of processes than the program sees.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != world_size:
        raise ValueError(
            f"WORLD_SIZE: the launcher started {launched} processes, this program sees {world_size}; "
            "on a machine without GPUs set ACCELERATE_USE_CPU=true, or use "
            "torchrun --standalone --nproc_per_node N"
        )
