"""The training log and its curves, read and drawn without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip3o_dit.utils.json_files import escaped, parse_json
from blip3o_dit.utils.validation import is_number

LOG_FILE = "training_log.jsonl"
CURVES_FILE = "training_curves.png"

Log = Sequence[Mapping[str, Any]]

TRAINING, HELD_OUT = "#0072b2", "#d55e00"
# Of several runs, each has one of these (Okabe and Ito's, without their yellow).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
# By title: label of the axis, what training logs, and what an evaluation does.
_PANELS = {
    "loss": ("loss", "loss", "eval_loss"),
    "token cosine (training: one call; held out: generated)": (
        "cosine",
        "cosine_similarity",
        "eval_cosine_similarity_mean",
    ),
    "R2 of generated tokens, held out": ("R2", None, "eval_r2"),
    "gradient norm before clipping": ("gradient norm", "grad_norm", None),
    "learning rate": ("learning rate", "learning_rate", None),
    "samples a second": ("samples a second", "samples_per_second", None),
}


def read_log(file: Path) -> list[dict[str, Any]]:
    """The entries of a `training_log.jsonl`, none when there is no such file.

    The last line counts only if it ends: a killed run may have left a part of one.

    Raises:
        ValueError: naming the line that is no JSON object.
    """
    if not file.is_file():
        return []
    entries = []
    for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        entry = parse_json(f"{file}: line {number}", line, non_finite=True)
        if not isinstance(entry, dict):
            raise ValueError(f"{file}: line {number}: expected an object, found a {type(entry).__name__}")
        entries.append(entry)
    return entries


def draw_curves(log: Log, path: Path) -> None:
    """Loss, cosine, R2, gradient norm, learning rate and speed against the optimizer step, as a PNG."""
    draw_runs({"": log}, path)


def draw_runs(logs: Mapping[str, Log], path: Path) -> None:
    """The same curves of several runs by name, a color each: training solid, held-out samples dashed."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(13, 6.8), layout="constrained")
    several = len(logs) > 1
    panels = figure.subplots(2, 3, sharex=True).flat
    for axes, (title, (label, *names)) in zip(panels, _PANELS.items(), strict=True):
        for number, log in enumerate(logs.values()):
            color = _color(number, len(logs))
            for name, own, style in zip(names, (TRAINING, HELD_OUT), ("-", "--"), strict=True):
                _plot(axes, log, name, color=color if several else own, linestyle=style)
        axes.set(title=title, xlabel="optimizer step", ylabel=label)
        axes.title.set_fontsize(10)
        axes.tick_params(labelbottom=True)
        axes.ticklabel_format(useOffset=False)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        if not axes.lines:
            axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes, color="0.5")
    kinds: Any = (("training", "-", TRAINING), ("held out", "--", HELD_OUT))
    handles = [
        Line2D([], [], color="0.3" if several else own, linestyle=style, label=kind)
        for kind, style, own in kinds
    ]
    if several:
        handles = [
            Line2D([], [], color=_color(number, len(logs)), linewidth=3, label=_label(name))
            for number, name in enumerate(logs)
        ] + handles
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
    figure.savefig(path, dpi=120)


def _color(number: int, count: int) -> Any:
    from matplotlib import colormaps

    return COLORS[number] if count <= len(COLORS) else colormaps["turbo"](number / (count - 1))


def _plot(axes: Any, log: Log, name: str | None, **style: Any) -> None:
    """A figure of the log against the step; a single point is seen by its marker."""
    here = [entry for entry in log if name is not None and is_number(entry.get(name)) and "step" in entry]
    points = [(entry["step"], entry[str(name)]) for entry in here]
    if points:
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, marker=".", markersize=4, linewidth=1.2, **style)


def _label(name: str) -> str:
    """A run's name as it is: no mathematics between dollars, and a leading underscore hides nothing."""
    return escaped(name).replace("$", r"\$")
