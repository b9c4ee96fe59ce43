"""What a run writes, said before it is written."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.memory import FLOAT32, GIB, count_weights, optimizer_bytes

logger = logging.getLogger(__name__)


def model_bytes(config: TrainingConfig, model: BLIP3oDiTConfig) -> int:
    """Weights and averaged weights, as the output folder holds them in the end."""
    weights, _ = count_weights(model)
    each = 2 if config.memory == "low" else FLOAT32
    return weights * each * (2 if config.ema_decay else 1)


def checkpoint_bytes(config: TrainingConfig, model: BLIP3oDiTConfig) -> int:
    """A checkpoint: weights, averages in float32, and the optimizer's state."""
    weights, _ = count_weights(model)
    each = (2 if config.memory == "low" else FLOAT32) + (FLOAT32 if config.ema_decay else 0)
    return weights * each + optimizer_bytes(config, model)


def check_disk(config: TrainingConfig, model: BLIP3oDiTConfig, steps: int) -> None:
    """Refuse a run whose first checkpoint and model do not fit, and warn of one whose checkpoints together
    do not, before anything is built.

    Args:
        steps: optimizer steps that are still to be taken.

    Raises:
        ValueError: with what it writes and what there is.
    """
    folder = Path(config.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    each, final = checkpoint_bytes(config, model), model_bytes(config, model)
    if each + final > free:
        raise ValueError(
            f"{config.output_dir}: expected {(each + final) / GIB:.1f} GiB of free disk for a checkpoint and "
            f"the model, found {free / GIB:.1f} GiB: give an --output_dir on another disk, or a "
            "smaller --size"
        )
    assert config.save_steps is not None
    count = math.ceil(steps / config.save_steps)
    # With a limit one more is kept, the best, and one more is there while it is written.
    kept = min(count, config.save_total_limit + 2) if config.save_total_limit else count
    if kept * each + final > free:
        logger.warning(
            f"{config.output_dir}: {kept} checkpoints of {each / GIB:.1f} GiB do not fit on this disk "
            f"({free / GIB:.1f} GiB are free): --save_total_limit keeps the newest ones, --save_steps saves "
            "fewer"
        )
