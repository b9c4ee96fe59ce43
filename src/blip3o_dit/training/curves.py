"""The training log and its curves, read and drawn without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG_FILE = "training_log.jsonl"
CURVES_FILE = "training_curves.png"


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
