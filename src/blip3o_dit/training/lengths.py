"""How long a run is and how often it says and saves something, where not given: docs/training-defaults.md.

All but the number of workers follow from the number of training samples and the samples of a step alone, so
that they are the same on every machine and for any number of processes.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

from blip3o_dit.training.arguments import use_cpu
from blip3o_dit.training.checkpoint import global_batch
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.extension import WARMUP_SHARE
from blip3o_dit.utils.distributed import cores

# Passes over the data, and the least steps: fewer than 30 batches are passed over more often.
PASSES, LEAST_STEPS = 10, 300
MOST_WARMUP = 1000
# So many log lines a run, evaluations and checkpoints, and how many steps lie between two.
LINES, MOST_BETWEEN_LINES = 100, 100
EVALUATIONS, BETWEEN_EVALUATIONS = 5, (10, 1000)
MOST_WORKERS = 4


def with_lengths(config: TrainingConfig, samples: int, processes: int = 1) -> TrainingConfig:
    """The configuration with a number for all that was not given, for so many training samples."""
    steps_of_pass = math.ceil(samples / global_batch(config, processes))
    passes: float = config.num_epochs or max(PASSES, math.ceil(LEAST_STEPS / steps_of_pass))
    if config.num_epochs is None and config.max_steps > 0:
        passes = round(config.max_steps / steps_of_pass, 4) or 1e-4
    steps = total_steps(replace(config, num_epochs=passes), samples, processes)
    between = min(max(steps // EVALUATIONS, BETWEEN_EVALUATIONS[0]), BETWEEN_EVALUATIONS[1])
    found: dict[str, Any] = {
        "num_epochs": passes,
        "warmup_steps": min(steps // WARMUP_SHARE, MOST_WARMUP),
        "logging_steps": min(max(steps // LINES, 1), MOST_BETWEEN_LINES),
        "eval_steps": between,
        "save_steps": between,
        "num_workers": _workers(config),
    }
    return replace(config, **{name: n for name, n in found.items() if getattr(config, name) is None})


def total_steps(config: TrainingConfig, samples: int, processes: int = 1) -> int:
    """Optimizer steps of a run whose lengths are numbers."""
    steps_of_pass = math.ceil(samples / global_batch(config, processes))
    given = config.extended_to or config.max_steps
    return given if given > 0 else math.ceil((config.num_epochs or 0) * steps_of_pass)


def _workers(config: TrainingConfig) -> int:
    """On a processor none: the network takes all cores, and reading a hundredth of the time."""
    if use_cpu(config):
        return 0
    here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return min(MOST_WORKERS, max(0, cores() // here - 1))
