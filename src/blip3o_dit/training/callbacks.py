"""Callbacks: the JSONL log, the curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from blip3o_dit.utils.atomic import write_atomically
from blip3o_dit.utils.json_files import finite_or_none
from blip3o_dit.utils.progress import working

LOG_FILE = "training_log.jsonl"
CURVES_FILE = "training_curves.png"


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
            with working("drawing the curves", lasting=False):
                draw_curves(read_log(folder / LOG_FILE), folder / CURVES_FILE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.on_save(args, state)


def read_log(file: Path) -> list[dict[str, Any]]:
    """The entries of a `training_log.jsonl`, none when there is no such file.

    The last line counts only if it ends: a killed run may have left a part of one.
    """
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def draw_curves(log: list[dict[str, Any]], path: Path) -> None:
    """Loss, one-call cosine, gradient norm and learning rate against the optimizer step, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.5), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, _PANELS.items(), strict=True):
        for name, color in zip(names, ("#0072b2", "#d55e00"), strict=False):
            points = [(entry["step"], entry[name]) for entry in log if entry.get(name) is not None]
            if points:
                steps, values = zip(*points, strict=True)
                label = "held out" if name.startswith("eval_") else "training"
                axes.plot(steps, values, color=color, label=label, marker=".", linewidth=1.2)
        axes.set(title=title, xlabel="optimizer step")
        axes.grid(alpha=0.3)
        if len(names) > 1 and axes.lines:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


_PANELS = {
    "loss": ("loss", "eval_loss"),
    "token cosine (training: one call; held out: generated)": (
        "cosine_similarity",
        "eval_cosine_similarity_mean",
    ),
    "gradient norm before clipping": ("grad_norm",),
    "learning rate": ("learning_rate",),
}
