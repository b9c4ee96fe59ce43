"""The report's plots, as <img> elements that hold their SVG in the page itself."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_dit.utils.pca_colors import pca_colors

# Okabe and Ito's palette, which color-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FAINT = "#8A8A8A"


def curve_plot(curves: Mapping[str, Sequence[Mapping[str, Any]]], baseline: tuple[str, float] | None) -> str:
    """Energy score against network calls, one line for each model and solver."""
    figure, axes = _figure(6.4, 3.6)
    for row, (name, points) in enumerate(curves.items()):
        for style, solver in enumerate(dict.fromkeys(point["solver"] for point in points)):
            of_solver = [point for point in points if point["solver"] == solver]
            calls = [point["network_calls"] for point in of_solver]
            axes.plot(
                calls,
                [point["energy_score"]["value"] for point in of_solver],
                color=COLORS[row % len(COLORS)],
                linestyle=("-", "--", ":", "-.")[style % 4],
                marker="os^D"[style % 4],
                markersize=4,
                label=f"{name}, {solver}" if len(curves) > 1 else solver,
            )
    if baseline is not None:
        axes.axhline(baseline[1], color=FAINT, linewidth=1, linestyle=(0, (1, 2)), label=baseline[0])
    axes.set_xscale("log", base=2)
    ticks = sorted({point["network_calls"] for points in curves.values() for point in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("network calls per sample")
    axes.set_ylabel("energy score (lower is better)")
    axes.legend(frameon=False, fontsize=9)
    return _image(figure, "Energy score against network calls")


def spread_plot(samplers: Sequence[Mapping[str, Any]]) -> str:
    """Error of the samples' mean against their spread, in bins of equal count; calibrated is the diagonal."""
    figure, axes = _figure(4.6, 4.0)
    high = 0.0
    for row, sampler in enumerate(samplers):
        spread = [point["spread"] for point in sampler["spread_error"]]
        error = [point["error"] for point in sampler["spread_error"]]
        high = max([high, *spread, *error])
        axes.plot(
            spread, error, marker="o", markersize=4, color=COLORS[row % len(COLORS)], label=sampler["name"]
        )
    axes.plot([0, 1.05 * high], [0, 1.05 * high], color=FAINT, linewidth=1, linestyle="--")
    axes.set_xlim(0, 1.05 * high)
    axes.set_ylim(0, 1.05 * high)
    axes.set_aspect("equal")
    axes.set_xlabel("spread of the samples")
    axes.set_ylabel("error of their mean")
    axes.legend(frameon=False, fontsize=9)
    return _image(figure, "Error against spread")


def position_plot(samplers: Sequence[Mapping[str, Any]]) -> str:
    """Maps of token cosine and R2 over the grid, a row for each sampler."""
    side = math.isqrt(len(samplers[0]["maps"]["cosine"]))
    figure, _ = _figure(6.4, 2.9 * len(samplers), axes=False)
    places = figure.subplots(len(samplers), 2, squeeze=False)
    for row, sampler in enumerate(samplers):
        for axes, (name, label) in zip(places[row], (("cosine", "token cosine"), ("r2", "R2")), strict=True):
            values = np.array(sampler["maps"][name]).reshape(side, side)
            image = axes.imshow(values, cmap="cividis")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"{sampler['name']}: {label}" if len(samplers) > 1 else label, fontsize=10)
            figure.colorbar(image, ax=axes, shrink=0.85)
    return _image(figure, "Token cosine and R2 over the grid")


def sample_plot(rows: Mapping[str, np.ndarray], images: Sequence[Any] | None, titles: Sequence[str]) -> str:
    """Token maps of a few samples, one row for each of `rows`, the reference tokens first.

    rows: name -> tokens [k, N, C]. images: RGB images or None, one for each sample.
    """
    reference = next(iter(rows.values()))
    count, side = len(reference), math.isqrt(reference.shape[1])
    shown = images is not None and any(image is not None for image in images)
    names = (["picture"] if shown else []) + list(rows)
    figure, _ = _figure(1.25 + 1.15 * count, 1.2 * len(names) + 0.35, axes=False)
    grid = figure.subplots(len(names), count, squeeze=False)
    for place in grid.flat:
        place.set_xticks([])
        place.set_yticks([])
        place.spines[:].set_visible(False)
    for column, title in enumerate(titles):
        grid[0, column].set_title(title, fontsize=8)
    for row, name in enumerate(names):
        label = grid[row, 0].set_ylabel(name, fontsize=9, rotation=0, ha="right", va="center")
        label.set_wrap(True)
        for column in range(count):
            if name in rows:
                colors = pca_colors(rows[name][column], reference).reshape(side, side, 3)
                grid[row, column].imshow(colors, interpolation="nearest")
            elif images is not None and images[column] is not None:
                grid[row, column].imshow(_thumbnail(images[column]))
    return _image(figure, "Token maps of a few samples")


def _thumbnail(image: Any) -> np.ndarray:
    """At most 112 pixels a side: it is part of the page."""
    copy = image.copy()
    copy.thumbnail((112, 112))
    return np.asarray(copy.convert("RGB"))


def _figure(width: float, height: float, *, axes: bool = True) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if not axes:
        return figure, None
    place = figure.subplots()
    place.spines[["top", "right"]].set_visible(False)
    place.grid(color="#E3E3E3", linewidth=0.6)
    place.set_axisbelow(True)
    return figure, place


def _image(figure: Any, description: str) -> str:
    """The figure as an <img> element that scales down with the page."""
    import matplotlib

    buffer = io.BytesIO()
    settings: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "report"}
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # none of it
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    content = base64.b64encode(buffer.getvalue()).decode()
    width = round(96 * figure.get_size_inches()[0])  # CSS pixels
    style = f"width:100%;max-width:{width}px;height:auto"
    return f'<img src="data:image/svg+xml;base64,{content}" alt="{description}" style="{style}">'
