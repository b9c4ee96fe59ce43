"""A run trained further than it was planned: `--extend_epochs`, `--extend_steps`.

The learning rate goes linearly from where it stands to its peak, and then falls as in any run (re-warming and
re-decaying: arXiv 2403.08763). Weights, averages, the optimizer's moments and the order of the data go on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from blip3o_dit.training.checkpoint import OPTIMIZER_NUMBERS, TRAINER_STATE_FILE
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.utils.json_files import read_json_object, short_repr
from blip3o_dit.utils.validation import is_number

WARMUP_SHARE = 20  # one step of warm-up in so many, unless given


def plan_extension(checkpoint: Path, saved: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The settings of an extension that begins at a checkpoint; none if it is under way already.

    So a command that extends a run can be given again after it was stopped.

    Raises:
        ValueError: both lengths are given, or the checkpoint does not say where it is.
    """
    epochs: Any = given.get("extend_epochs")
    steps: Any = given.get("extend_steps")
    if epochs is None and steps is None:
        return {}
    if epochs is not None and steps is not None:
        raise ValueError("extend_epochs and extend_steps: expected at most one of them, found both")
    wanted = {"extend_epochs": epochs, "extend_steps": steps}
    step, steps_per_epoch = _position(checkpoint / TRAINER_STATE_FILE)
    if step < saved["extended_to"] and all(saved[name] == value for name, value in wanted.items()):
        return {}
    more: int = steps or max(1, math.ceil(round(epochs * steps_per_epoch, 6)))
    return wanted | {
        "extended_at": step,
        "extended_to": step + more,
        "extended_rate": _rate(checkpoint / OPTIMIZER_NUMBERS),
        "extended_warmup": given.get("warmup_steps", more // WARMUP_SHARE),
    }


def extended_schedule(optimizer: Optimizer, config: TrainingConfig) -> ExtendedSchedule:
    """The learning rate of an extension, by the number of all steps of the run."""
    plain = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=config.extended_warmup,
        num_training_steps=config.extended_to - config.extended_at,
    )
    first = config.extended_rate / config.learning_rate if config.learning_rate else 0.0
    # A partial function, as the plain schedules are: a schedule's saved state tells functions apart.
    factor = partial(_factor, plain.lr_lambdas[0], config.extended_at, config.extended_warmup, first)
    return ExtendedSchedule(optimizer, factor)


class ExtendedSchedule(LambdaLR):
    """Keeps its own peak when it takes on the state of the schedule that it goes on from."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        peaks = self.base_lrs
        super().load_state_dict(state_dict)
        self.base_lrs = peaks
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            group["initial_lr"] = peak
        self.last_epoch -= 1  # and once more into the step that is next, whose rate is another one now
        self._step_count -= 1
        self.step()


def _factor(plain: Callable[[int], float], start: int, warmup: int, first: float, step: int) -> float:
    """The share of the peak in a step: from `first` to 1 in the warm-up, then the plain schedule's."""
    share = plain(max(0, step - start))
    return first + (1.0 - first) * share if step - start < warmup else share


def _position(file: Path) -> tuple[int, float]:
    """(step, steps per epoch) of a checkpoint."""
    state = read_json_object(file, non_finite=True)
    step: Any = state.get("global_step")
    epoch: Any = state.get("epoch")
    if type(step) is not int or step < 1 or not (is_number(epoch) and 0 < epoch < math.inf):
        raise ValueError(
            f"{file}: expected a step and an epoch above 0, found {short_repr(step)} and {short_repr(epoch)}"
        )
    return step, step / epoch


def _rate(file: Path) -> float:
    """The learning rate that a checkpoint's next step would have had."""
    schedule = read_json_object(file).get("scheduler")
    rates: Any = schedule.get("_last_lr") if isinstance(schedule, dict) else None
    if not isinstance(rates, list) or not rates or not (is_number(rates[0]) and 0 <= rates[0] < math.inf):
        raise ValueError(f"{file}: scheduler: expected the last learning rates, found {short_repr(rates)}")
    return float(rates[0])
