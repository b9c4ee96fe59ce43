"""Callbacks: console lines, the JSONL log, the curves."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerState, TrainingArguments

from blip3o_dit.training.curves import CURVES_FILE, LOG_FILE, draw_curves, read_log
from blip3o_dit.utils.atomic import write_atomically
from blip3o_dit.utils.json_files import finite_or_none

logger = logging.getLogger(__name__)


class ConsoleCallback(ProgressCallback):
    """The Trainer's progress bar, with log lines a person can read under it."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, *_: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(format_log_line(state.global_step, logs))


class JSONLogCallback(TrainerCallback):
    """Appends every logged dict, with its step, to `training_log.jsonl` in the output folder."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        file = Path(args.output_dir or "") / LOG_FILE
        # What an interrupted run logged after the checkpoint it resumes from happens again; so does the end.
        kept = [e for e in read_log(file) if e["step"] <= state.global_step and "train_runtime" not in e]
        write_atomically(file, "".join(json.dumps(finite_or_none(entry)) + "\n" for entry in kept).encode())

    def on_log(
        self, args: TrainingArguments, state: TrainerState, *_: Any, logs: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and logs:
            with open(Path(args.output_dir or "") / LOG_FILE, "a") as file:
                file.write(json.dumps(finite_or_none({"step": state.global_step, **logs})) + "\n")


class CurvesCallback(TrainerCallback):
    """Redraws `training_curves.png` from the log at every checkpoint and at the end."""

    def __init__(self) -> None:
        self._drawn_at = -1  # optimizer step

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.global_step != self._drawn_at:
            self._drawn_at = state.global_step
            folder = Path(args.output_dir or "")
            draw_curves(read_log(folder / LOG_FILE), folder / CURVES_FILE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.on_save(args, state)


def format_log_line(step: int, logs: dict[str, Any]) -> str:
    """One line: the step, then name value pairs with four significant digits."""
    hidden = ("epoch", "total_flos", "eval_steps_per_second", "eval_samples_per_second")
    values = [
        f"{name.removeprefix('eval_')} {value:.4g}"
        for name, value in logs.items()
        if isinstance(value, int | float) and name not in hidden
    ]
    kind = "eval" if any(name.startswith("eval_") for name in logs) else "train"
    return f"[{kind}] step {step} epoch {logs.get('epoch', 0):.2f} | " + " | ".join(values)
