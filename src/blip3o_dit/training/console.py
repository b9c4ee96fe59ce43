"""What a person sees of a training: one line a logging interval, a bar, and about how long it will take.

Everything else that is measured is in `training_log.jsonl`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from blip3o_dit.utils.durations import in_words
from blip3o_dit.utils.progress import Bar, has_terminal

COLUMNS = 80
TIMED_STEPS = 2  # after the first one, which also loads kernels and fills caches

logger = logging.getLogger(__name__)


class ConsoleCallback(TrainerCallback):
    """Log lines, and under them a bar in a terminal.

    Args:
        evaluation_cost: steps that an evaluation takes as long as.
    """

    def __init__(self, evaluation_cost: float = 0.0) -> None:
        self._evaluation_cost = evaluation_cost
        self._bar: Bar | None = None
        self._ends: list[float] = []  # of the first steps, in seconds
        self._first = 0  # step that these begin with

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self._ends, self._first = [], state.global_step + 1
        if state.is_world_process_zero and has_terminal() and state.global_step < state.max_steps:
            self._bar = Bar("training", state.max_steps, "step", done=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update()
        if len(self._ends) <= TIMED_STEPS:
            self._ends.append(time.monotonic())
            left = state.max_steps - state.global_step
            if len(self._ends) > TIMED_STEPS and left and state.is_world_process_zero:
                seconds = (self._ends[-1] - self._ends[0]) / TIMED_STEPS
                evaluations = evaluations_left(args, state.global_step, state.max_steps)
                logger.info(estimate(left, seconds, evaluations, self._evaluation_cost * seconds))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, *_: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs and {"loss", "eval_loss"} & set(logs):
            logger.info(log_line(state.global_step, state.max_steps, logs, self._left(state)))

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """The bar goes."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _left(self, state: TrainerState) -> float | None:
        """Seconds until the last step, by all that was done since the first one; None while nobody knows."""
        taken = state.global_step - self._first
        if not self._ends or taken < 1:
            return None
        return (time.monotonic() - self._ends[0]) / taken * (state.max_steps - state.global_step)


@contextmanager
def closing_bar(trainer: Trainer) -> Iterator[None]:
    """Around a training: its bar goes, also where an error ends it."""
    try:
        yield
    finally:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ConsoleCallback):
                callback.close()


def log_line(step: int, steps: int, logs: dict[str, Any], seconds_left: float | None = None) -> str:
    """One line of at most 80 columns: the step, and of training or of held-out samples what matters most.

    What is least important, at its end, is left out where numbers are so long that it does not fit.
    """
    held_out = "eval_loss" in logs
    prefix, mean = ("eval_", "_mean") if held_out else ("", "")
    named = {"loss": "loss", "cosine": f"cosine_similarity{mean}", "R2": "r2", "energy": "energy_score"}
    parts = [f"step {step}/{steps}"]
    for label, name in named.items():
        value = logs.get(prefix + name)
        if value is not None:
            shown = _number(value, places=3 if label in ("cosine", "R2") else None)
            parts.append(f"{_OF_HELD_OUT.get(label, '') if held_out else ''}{label} {shown}")
    if not held_out and logs.get("seconds_per_step"):
        parts.append(f"{_seconds(logs['seconds_per_step'])}/step")
        if seconds_left:
            parts.append(f"{in_words(seconds_left)} left")
    while len("  ".join(parts)) > COLUMNS:
        parts.pop()
    return "  ".join(parts)


# Of generated samples: in training these are of the estimate that one call makes from a point on the path.
_OF_HELD_OUT = {"loss": "held out: ", "cosine": "samples: "}


def estimate(steps: int, seconds: float, evaluations: int, seconds_each: float) -> str:
    """One line: how long so many steps and evaluations will take."""
    total = steps * seconds + evaluations * seconds_each
    line = f"about {in_words(total)} to go: {steps} steps of {_seconds(seconds)}"
    if evaluations:
        line += f", {evaluations} evaluation{'s' * (evaluations > 1)} of about {in_words(seconds_each)}"
    return line


def evaluations_left(args: TrainingArguments, step: int, steps: int) -> int:
    """Evaluations that come after this step, one of them after the last."""
    if args.eval_strategy == "no" or not args.eval_steps:
        return 0
    return math.ceil(steps / args.eval_steps) - math.floor(step / args.eval_steps)


def _number(value: float, places: int | None) -> str:
    """Four significant digits, or so many after the point of what lies near [-1, 1]; never wide."""
    if places is not None and abs(value) < 10:
        return f"{value:.{places}f}"
    if places is None and (value == 0 or 1e-3 <= abs(value) < 1e5):
        return f"{value:.4g}"
    return f"{value:.1e}"


def _seconds(seconds: float) -> str:
    """Two significant digits."""
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
