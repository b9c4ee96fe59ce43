"""The end of a training: when it comes, which weights are the model's, how much noise it samples from."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from blip3o_dit.model.calibration import Calibration
from blip3o_dit.training.base_trainer import ExactResumeTrainer
from blip3o_dit.training.calibration import HeldBack, calibrate, set_noise_scale
from blip3o_dit.training.checkpoint import best_saved

ENERGY = "eval_energy_score"

logger = logging.getLogger(__name__)


def finish(trainer: ExactResumeTrainer) -> None:
    """Save the model, with the averaged weights that are best for the samples held back, and calibrated to
    these; without such samples, as it is."""
    if trainer.held_back is not None:
        found = _choose_weights(trainer, trainer.held_back)
        scores = energy_scores(trainer.state.log_history)
        trainer.calibration = replace(found, steps=trainer.state.global_step, energy_scores=scores)
        set_noise_scale(trainer.unwrapped_model, found.noise_scale)
    trainer.save_final_model()
    if trainer.calibration is not None and trainer.is_world_process_zero():
        for line in trainer.calibration.sentences():
            logger.info("%s", line)


def _choose_weights(trainer: ExactResumeTrainer, held_back: HeldBack) -> Calibration:
    """The last weights, unless the averages of an earlier checkpoint had a better energy score when it was
    evaluated, and have it still when both are calibrated."""
    ema, output, last = trainer.ema, Path(trainer.config.output_dir), trainer.state.global_step
    best = trainer.processes.broadcast(best_saved(output, trainer.state.log_history, ENERGY))
    found = replace(_calibrated(trainer, held_back), weights_of=last)
    if ema is None or best in (None, last):
        return found
    ema.load(output / f"checkpoint-{best}")
    earlier = replace(_calibrated(trainer, held_back), weights_of=best)
    if earlier.after["energy_score"] < found.after["energy_score"]:
        return earlier
    ema.load(output / f"checkpoint-{last}")
    return found


def _calibrated(trainer: ExactResumeTrainer, held_back: HeldBack) -> Calibration:
    """For the averaged weights, if there are any."""
    model = trainer.unwrapped_model.eval()
    with nullcontext() if trainer.ema is None else trainer.ema.applied(model):
        return calibrate(model, held_back)


def energy_scores(log: list[dict[str, Any]]) -> list[list[float]]:
    """[step, energy score] of each evaluation, in the log of a run."""
    return [[entry["step"], entry[ENERGY]] for entry in log if isinstance(entry.get(ENERGY), float)]


class EarlyStop(TrainerCallback):
    """Ends a run after `patience` evaluations without a better energy score than before (None: never).

    What it goes by is in the log, so a run that is continued ends where an uninterrupted one does.

    Args:
        since: the step after which evaluations count: that at which a run was extended.
    """

    def __init__(self, patience: int | None, since: int = 0) -> None:
        self._patience, self._since = patience, since

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_training_stop = self._is_over(state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._is_over(state):
            control.should_training_stop = control.should_save = True

    def _is_over(self, state: TrainerState) -> bool:
        scores = [score for step, score in energy_scores(state.log_history) if step > self._since]
        if self._patience is None or not scores:
            return False
        return len(scores) - 1 - scores.index(min(scores)) >= self._patience
