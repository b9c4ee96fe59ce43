"""The demo's picture: what was generated beside what is true, the training curve and the scores."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from blip3o_dit.utils.pca_colors import pca_colors

# Okabe and Ito's palette, which colour-blind readers can tell apart; the truth is the dark grey.
METHOD_COLOURS = ("#3A3A3A", "#0072B2", "#E69F00", "#999999", "#CC79A7", "#56B4E9")
CURVE_COLOURS = ("#009E73", "#D55E00", "#3A3A3A", "#CC79A7")
INK, FAINT, GRID = "#222222", "#8A8A8A", "#E3E3E3"
TITLE_SIZE, TEXT_SIZE, SMALL_SIZE = 12, 10, 9


def draw_demo_figure(
    path: str | Path,
    *,
    pictures: np.ndarray,
    labels: Sequence[int],
    rows: Mapping[str, np.ndarray],
    decoded: Mapping[str, np.ndarray],
    training_curve: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    metrics: Mapping[str, Mapping[str, float]],
    title_note: str,
) -> None:
    """Draw the demo's figure as a PNG of 1600 x 1200 pixels.

    pictures: uint8 [k, 32, 32, 3]; labels: [k]; eight of them fit well.
    rows: name -> tokens [k, N, W] in display order, N a row-major square grid. The true tokens come
        first; the colours of all rows are fitted on them alone.
    decoded: the same names -> the tokens as pictures, uint8 [k, S, S, 3]; under the tokens.
    training_curve: name -> (steps, losses); losses are shown on a logarithmic axis.
    metrics: method -> {metric: value}; one bar chart for each metric, in order of appearance. A
        method that lacks a metric has no bar there. A name has one colour in `rows` and `metrics`.
    title_note: one line at the bottom.

    Raises ValueError when pictures, labels and rows do not agree in shape.
    """
    rows = {name: np.asarray(tokens, dtype=np.float64) for name, tokens in rows.items()}
    _check_shapes(pictures, labels, rows, decoded)
    names = list(dict.fromkeys([*rows, *metrics]))
    colours = {name: METHOD_COLOURS[i % len(METHOD_COLOURS)] for i, name in enumerate(names)}

    figure = Figure(figsize=(12.8, 9.6), dpi=125, facecolor="white")
    left, right = figure.add_gridspec(
        1, 2, width_ratios=(1.7, 1), left=0.09, right=0.985, top=0.905, bottom=0.07, wspace=0.255
    )
    upper, lower = right.subgridspec(2, 1, height_ratios=(1.05, 1), hspace=0.42)
    _draw_tokens(figure, left, pictures, labels, rows, decoded, colours)
    _draw_curve(figure, upper, training_curve)
    _draw_metrics(figure, lower, metrics, colours)
    figure.text(0.5, 0.028, title_note, ha="center", va="center", fontsize=TEXT_SIZE, color=INK)
    FigureCanvasAgg(figure).print_png(path)


def _check_shapes(
    pictures: np.ndarray,
    labels: Sequence[int],
    rows: Mapping[str, np.ndarray],
    decoded: Mapping[str, np.ndarray],
) -> None:
    if not rows:
        raise ValueError("rows: expected at least the true tokens, found none")
    true = next(iter(rows.values()))
    if true.ndim != 3 or math.isqrt(true.shape[1]) ** 2 != true.shape[1] or true.shape[2] < 3:
        raise ValueError(f"rows: expected tokens [k, N, W], N a square and W >= 3, found {true.shape}")
    for name, tokens in rows.items():
        if tokens.shape != true.shape:
            raise ValueError(f"rows[{name!r}]: expected {true.shape}, found {tokens.shape}")
    if {name: len(found) for name, found in decoded.items()} != {name: len(true) for name in rows}:
        raise ValueError(f"decoded: expected {len(true)} pictures of each of {list(rows)}, found others")
    if len(pictures) != len(true) or len(labels) != len(true):
        raise ValueError(
            f"expected {len(true)} pictures and labels, as in rows, "
            f"found {len(pictures)} pictures and {len(labels)} labels"
        )


def _draw_tokens(
    figure: Figure,
    place: SubplotSpec,
    pictures: np.ndarray,
    labels: Sequence[int],
    rows: Mapping[str, np.ndarray],
    decoded: Mapping[str, np.ndarray],
    colours: Mapping[str, str],
) -> None:
    """One column for each digit: its picture, then each row's tokens of it, above what they decode to."""
    true = next(iter(rows.values()))  # [k, N, W]
    side = math.isqrt(true.shape[1])
    pairs = place.subgridspec(1 + len(rows), 1, height_ratios=(1, *(2.06,) * len(rows)), hspace=0.13)
    cells = pairs[0].subgridspec(1, len(true), wspace=0.08)
    for column, picture in enumerate(pictures):
        cell = _image_cell(figure, cells[0, column], picture)
        cell.set_title(str(labels[column]), fontsize=TEXT_SIZE, color=INK, pad=4)
        if column == 0:
            _name_row(cell, "picture", None)
    for row, (name, tokens) in enumerate(rows.items(), start=1):
        maps = pca_colors(tokens, true).reshape(-1, side, side, 3)  # [k, side, side, 3]
        cells = pairs[row].subgridspec(2, len(true), hspace=0.06, wspace=0.08)
        for column, (colour_map, picture) in enumerate(zip(maps, decoded[name], strict=True)):
            cell = _image_cell(figure, cells[0, column], colour_map)
            _image_cell(figure, cells[1, column], picture)
            if column == 0:
                _name_row(cell, name, colours[name], height=2.06)
    _panel_title(
        figure, place, f"Held-out digits: their {side}x{side} tokens, and the pictures these decode to"
    )


def _image_cell(figure: Figure, place: SubplotSpec, image: np.ndarray) -> Axes:
    """An axes with the image [H, W, 3], its pixels left square, and nothing else."""
    axes = figure.add_subplot(place)
    axes.imshow(image, interpolation="nearest")
    axes.set_axis_off()
    return axes


def _name_row(cell: Axes, name: str, colour: str | None, *, height: float = 1.0) -> None:
    """The row's name left of its first cell, with the colour its bars have, if it has any.

    height: of the row, in cells, from the first one's upper edge.
    """
    cell.text(
        -0.17,
        1 - height / 2,
        textwrap.fill(name, 13),
        transform=cell.transAxes,
        ha="right",
        va="center",
        fontsize=TEXT_SIZE,
        color=INK,
    )
    if colour is not None:
        cell.plot(
            [-0.09, -0.09], [1 - height, 1], transform=cell.transAxes, color=colour, lw=3.5, clip_on=False
        )


def _draw_curve(
    figure: Figure,
    place: SubplotSpec,
    training_curve: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> None:
    """Loss over steps, one line for each name."""
    axes = figure.add_subplot(place)
    for i, (name, (steps, losses)) in enumerate(training_curve.items()):
        colour = CURVE_COLOURS[i % len(CURVE_COLOURS)]
        axes.plot(steps, losses, color=colour, lw=1.6, label=name, solid_joinstyle="round")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 10 * low:  # powers of ten alone would put one number or none on the axis
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_xlabel("optimizer step", fontsize=TEXT_SIZE, color=INK)
    axes.set_ylabel("loss", fontsize=TEXT_SIZE, color=INK)
    axes.legend(frameon=False, fontsize=TEXT_SIZE, labelcolor=INK)
    _plain(axes)
    _panel_title(figure, place, "Loss")


def _draw_metrics(
    figure: Figure,
    place: SubplotSpec,
    metrics: Mapping[str, Mapping[str, float]],
    colours: Mapping[str, str],
) -> None:
    """One horizontal bar chart for each metric, side by side; the methods are named at the left."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    charts = place.subgridspec(1, max(len(names), 1), wspace=0.12)
    for i, name in enumerate(names):
        axes = figure.add_subplot(charts[i])
        _draw_bars(axes, {m: values.get(name) for m, values in metrics.items()}, colours)
        axes.set_title(name, fontsize=TEXT_SIZE, color=INK, loc="left", pad=6)
        if i:
            axes.tick_params(labelleft=False)
    _panel_title(figure, place, "Scores on held-out digits")


def _draw_bars(axes: Axes, values: Mapping[str, float | None], colours: Mapping[str, str]) -> None:
    """One bar for each method, from zero, with its value printed at its end."""
    for row, (method, value) in enumerate(values.items()):
        if value is None:
            continue
        axes.barh(row, value, height=0.62, color=colours[method])
        axes.annotate(
            f"{value:.3f}",
            (max(value, 0), row),  # right of zero even for a bar that goes left: one free margin
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL_SIZE,
            color=INK,
        )
    axes.axvline(0, color=FAINT, lw=0.8)
    shown = [value for value in values.values() if value is not None]
    low, high = min([0.0, *shown]), max([1.0, *shown])
    axes.set_xlim(low, high + 0.5 * (high - low))  # a third of the width for the printed values
    axes.set_ylim(len(values) - 0.5, -0.5)  # the first method on top
    axes.set_yticks(range(len(values)), [textwrap.fill(method, 13) for method in values])
    axes.set_xticks([])  # the values are printed
    _plain(axes)
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_visible(False)


def _panel_title(figure: Figure, place: SubplotSpec, title: str) -> None:
    """The title at the panel's left edge, clear of what stands directly above its axes."""
    box = place.get_position(figure)
    figure.text(box.x0, box.y1 + 0.036, title, ha="left", fontsize=TITLE_SIZE, color=INK)


def _plain(axes: Axes) -> None:
    """No box and no tick marks, in the figure's colours and sizes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(which="both", length=0, labelsize=SMALL_SIZE, labelcolor=INK)
