"""Tables and figure of what `python -m benchmarks quality` measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

Row = dict[str, Any]
COLORS = {"paper": "#d55e00", "default": "#0072b2", "ridge": "#999999", "ridge 3x3": "#444444"}


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def chosen(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def average(rows: Sequence[Row], name: str) -> float:
    return float(np.mean([row[name] for row in rows])) if rows else float("nan")


def spread(rows: Sequence[Row], name: str, digits: int = 3) -> str:
    """Mean over seeds, and the range when there are several."""
    values = [row[name] for row in rows if name in row]
    if not values:
        return "-"
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def curve(rows: list[Row], set_name: str, recipe: str, figure: str) -> tuple[list[int], list[float]]:
    found = chosen(rows, kind="curve", set=set_name, recipe=recipe)
    steps = sorted({row["step"] for row in found})
    return steps, [average(chosen(found, step=step), figure) for step in steps]


def steps_to_reach(rows: list[Row], set_name: str, figure: str) -> str:
    """First measured step at which the default recipe is as good as the paper's is at its end."""
    _, paper = curve(rows, set_name, "paper", figure)
    sign = -1 if figure == "energy" else 1
    for step, value in zip(*curve(rows, set_name, "default", figure), strict=True):
        if sign * value >= sign * paper[-1]:
            return str(step)
    return "not reached"


def recipes_table(rows: list[Row], sets: list[str]) -> str:
    lines = [
        "| data | | R2 of one call | energy score | spread / error | Frechet |",
        "|---|---|---|---|---|---|",
    ]
    for name in sets:
        own = chosen(rows, set=name)
        last = max((row["step"] for row in chosen(own, kind="curve")), default=0)
        short = chosen(own, kind="short", recipe="default")
        groups = [(kind, chosen(own, kind="ridge", recipe=kind)) for kind in ("ridge", "ridge 3x3")]
        groups += [(f"default, run of {short[0]['step']} steps", short)] if short else []
        groups += [
            (f"{recipe}, {last} steps", chosen(own, kind="curve", recipe=recipe, step=last))
            for recipe in ("paper", "default")
        ]
        for label, found in groups:
            cells = [spread(found, figure) for figure in ("r2", "energy", "spread_error", "frechet")]
            lines.append(f"| {name} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reach_table(rows: list[Row], sets: list[str]) -> str:
    lines = [
        "| data | paper's last step | default reaches its energy score by | its R2 by | seconds of both |",
        "|---|---|---|---|---|",
    ]
    for name in sets:
        steps, _ = curve(rows, name, "paper", "energy")
        if not steps:
            continue
        both = [
            average(chosen(rows, kind="curve", set=name, recipe=recipe, step=steps[-1]), "seconds")
            for recipe in ("paper", "default")
        ]
        reached = [steps_to_reach(rows, name, figure) for figure in ("energy", "r2")]
        lines.append(f"| {name} | {steps[-1]} | {' | '.join(reached)} | {both[0]:.0f} / {both[1]:.0f} |")
    return "\n".join(lines)


def ablation_table(rows: list[Row], sets: list[str]) -> str:
    """Short runs of the first seed, on the sets where there is more than the default recipe's."""
    rows = chosen(rows, kind="short", seed=0)
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    shown = [name for name in sets if len(chosen(rows, set=name)) > 1]
    lines = [
        "| recipe | " + " | ".join(f"{name}: R2 | energy" for name in shown) + " |",
        "|---|" + "---|---|" * len(shown),
    ]
    for recipe in names:
        cells = []
        for name in shown:
            found = chosen(rows, set=name, recipe=recipe)
            cells += [spread(found, "r2"), spread(found, "energy")]
        lines.append(f"| {recipe} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def calls_table(rows: list[Row], sets: list[str]) -> str:
    """Energy scores, and their distance to that of 50 Euler calls."""
    shown = [name for name in sets if chosen(rows, kind="calls", set=name)]
    keys = dict.fromkeys(
        (row["kind"], row["recipe"], row["calls"]) for row in rows if row["kind"] in ("calls", "student")
    )
    lines = ["| network calls | | " + " | ".join(shown) + " |", "|---|---|" + "---|" * len(shown)]
    for kind, recipe, calls in keys:
        cells = []
        for name in shown:
            reference = average(chosen(rows, kind="calls", set=name, recipe="euler", calls=50), "energy")
            found = chosen(rows, kind=kind, set=name, recipe=recipe, calls=calls)
            value = average(found, "energy")
            cells.append(f"{value:.4f} ({100 * (value / reference - 1):+.1f} %)" if found else "-")
        label = recipe if kind == "calls" else f"student, {recipe}"
        lines.append(f"| {calls} | {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def modes_table(rows: list[Row]) -> str:
    lines = [
        "| | network calls | modes found | worst relative error of a frequency | between modes |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if "covered" in row:
            label = f"{row['recipe']}, seed {row['seed']}"
            label = f"student, {label}" if row["kind"] == "student" else label
            shares = [f"{100 * row[name]:.1f} %" for name in ("covered", "worst_frequency_error")]
            between = f"{100 * row['between_modes']:.2f} %"
            lines.append(f"| {label} | {row['calls']} | {shares[0]} | {shares[1]} | {between} |")
    return "\n".join(lines)


def optimizers_table(rows: list[Row], sets: list[str]) -> str:
    """Each optimizer at each learning rate; and when it is as good as AdamW's best run is at its end."""
    rows = chosen(rows, kind="optimizer")
    steps = sorted({row["step"] for row in rows})
    shown = " | ".join(f"step {step}" for step in steps)
    lines = [
        f"| data | optimizer | learning rate | energy score: {shown} | R2 of one call | processor seconds "
        "| AdamW's best energy score: step | second |",
        "|---|---|---" + "|---" * len(steps) + "|---|---|---|---|",
    ]
    for name in sets:
        own = chosen(rows, set=name)
        curves = {
            (recipe, rate): [chosen(own, recipe=recipe, learning_rate=rate, step=step) for step in steps]
            for recipe, rate in sorted({(row["recipe"], row["learning_rate"]) for row in own})
        }
        goal = min((average(c[-1], "energy") for (r, _), c in curves.items() if r == "adamw"), default=0.0)
        for (recipe, rate), points in curves.items():
            cells = [f"{average(point, 'energy'):.4f}" for point in points]
            cells += [f"{average(points[-1], 'r2'):.4f}", f"{average(points[-1], 'seconds'):.0f}"]
            good = [point for point in points if average(point, "energy") <= goal]
            cells += [str(good[0][0]["step"]), f"{average(good[0], 'seconds'):.0f}"] if good else ["-", "-"]
            lines.append(f"| {name} | {recipe} | {rate:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[Row], sets: list[str], path: Path) -> None:
    """Energy score and R2 against the step, mean and range over seeds, with both ridges as lines.

    A point is what was measured; a curve without its first points was not measured there.
    """
    figure = Figure(figsize=(3.4 * len(sets), 6.2), layout="constrained")
    panels = figure.subplots(2, len(sets), squeeze=False, sharex=True)
    for column, name in enumerate(sets):
        for axes, (measure, label) in zip(
            panels[:, column],
            (("energy", "energy score (standard deviations)"), ("r2", "R2 of one call")),
            strict=True,
        ):
            for kind in ("ridge", "ridge 3x3"):
                value = average(chosen(rows, kind="ridge", set=name, recipe=kind), measure)
                axes.axhline(value, color=COLORS[kind], linestyle="--", linewidth=1, label=kind)
            for recipe in ("paper", "default"):
                steps, means = curve(rows, name, recipe, measure)
                found = chosen(rows, kind="curve", set=name, recipe=recipe)
                seeds = [[row[measure] for row in chosen(found, step=step)] for step in steps]
                low, high = [min(values) for values in seeds], [max(values) for values in seeds]
                axes.plot(steps, means, color=COLORS[recipe], marker=".", label=recipe)
                axes.fill_between(steps, low, high, color=COLORS[recipe], alpha=0.2, linewidth=0)
            axes.set(title=name, xscale="log", ylabel=label)
            axes.grid(alpha=0.3)
            if measure == "r2":
                axes.set(xlabel="optimizer step")
                axes.set_ylim(bottom=max(-0.1, axes.get_ylim()[0]))
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False
    )
    figure.savefig(path, dpi=110)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality-table", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--figure", type=Path, help="write the curves here, as a PNG")
    arguments = parser.parse_args(words)
    rows = read(arguments.file)
    sets = list(dict.fromkeys(row["set"] for row in rows))
    for table in (recipes_table, reach_table, ablation_table, calls_table):
        print(table(rows, sets), end="\n\n")
    print(modes_table(rows), end="\n\n")
    print(optimizers_table(rows, sets))
    if arguments.figure:
        plot(rows, sets, arguments.figure)
    return 0
