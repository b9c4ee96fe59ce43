"""Checks on how a program was launched."""

from __future__ import annotations

import os

# Where launchers say how many processes there are: torchrun and accelerate, MPI's, and srun.
SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")


def check_launch(world_size: int) -> None:
    """Refuse a launch whose processes would each work alone into the same folder.

    Raises:
        ValueError: when the launcher started another number of processes than the program sees.
    """
    name, launched = launched_processes()
    if launched != world_size:
        raise ValueError(
            f"{name}: the launcher started {launched} processes, this program sees {world_size}; "
            "on a machine without GPUs set ACCELERATE_USE_CPU=true, or use "
            "torchrun --standalone --nproc_per_node N (WORLD_SIZE=1 says that each is to work alone)"
        )


def check_alone(program: str) -> None:
    """Refuse (ValueError) to run in several processes a program that knows only one."""
    name, launched = launched_processes()
    if launched != 1:
        raise ValueError(f"{name}: {program} works in one process, the launcher started {launched}")


def launched_processes() -> tuple[str, int]:
    """The variable in which the launcher says how many processes it started, and the number."""
    name = next((name for name in SIZES if os.environ.get(name)), SIZES[0])
    value = os.environ.get(name) or "1"
    if not value.isdecimal():
        raise ValueError(f"{name}: expected a number of processes, found {value!r}")
    return name, int(value)
