"""The report's plots, as <img> elements that hold their SVG in the page itself."""

from __future__ import annotations

import base64
import io
import math
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np

from blip3o_dit.utils.json_files import escaped
from blip3o_dit.utils.pca_colors import pca_colors

# Okabe and Ito's palette, which color-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FAINT = "#8A8A8A"

MAX_LABEL, MAX_TITLE = 40, 18

Plot = TypeVar("Plot", bound=Callable[..., str])


def _plain_text(plot: Plot) -> Plot:
    """Names and keys are shown as they are: "$" begins no formula, and what no font has is no warning."""

    @wraps(plot)
    def plain(*arguments: Any, **options: Any) -> str:
        import matplotlib

        with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            return plot(*arguments, **options)

    return cast("Plot", plain)


def _label(name: str) -> str:
    """A name for a plot, whose legend leaves out those that begin with an underscore."""
    text = escaped(name)
    text = text if len(text) <= MAX_LABEL else f"{text[: MAX_LABEL // 2]}...{text[-MAX_LABEL // 2 :]}"
    return f" {text}" if text.startswith("_") else text


@_plain_text
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
                label=_label(f"{name}, {solver}" if len(curves) > 1 else solver),
            )
    if baseline is not None:
        axes.axhline(baseline[1], color=FAINT, linewidth=1, linestyle=(0, (1, 2)), label=_label(baseline[0]))
    axes.set_xscale("log", base=2)
    ticks = sorted({point["network_calls"] for points in curves.values() for point in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="network calls per sample", ylabel="energy score (lower is better)")
    axes.legend(frameon=False, fontsize=9)
    return _image(figure, "Energy score against network calls")


@_plain_text
def spread_plot(samplers: Sequence[Mapping[str, Any]]) -> str:
    """Error of the samples' mean against their spread, in bins of equal count; calibrated is the diagonal."""
    figure, axes = _figure(4.6, 4.0)
    high = 0.0
    for row, sampler in enumerate(samplers):
        spread = [point["spread"] for point in sampler["spread_error"]]
        error = [point["error"] for point in sampler["spread_error"]]
        high = max([high, *spread, *error])
        axes.plot(
            spread,
            error,
            marker="o",
            markersize=4,
            color=COLORS[row % len(COLORS)],
            label=_label(sampler["name"]),
        )
    ends = (0, 1.05 * high)
    axes.plot(ends, ends, color=FAINT, linewidth=1, linestyle="--")
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.set(xlabel="spread of the samples", ylabel="error of their mean")
    axes.legend(frameon=False, fontsize=9)
    return _image(figure, "Error against spread")


@_plain_text
def position_plot(samplers: Sequence[Mapping[str, Any]]) -> str:
    """Maps of token cosine and R2 over the grid, a row for each sampler."""
    side = math.isqrt(len(samplers[0]["maps"]["cosine"]))
    figure, _ = _figure(6.4, 2.9 * len(samplers), axes=False)
    places = figure.subplots(len(samplers), 2, squeeze=False)
    for row, sampler in enumerate(samplers):
        for axes, (name, label) in zip(places[row], (("cosine", "token cosine"), ("r2", "R2")), strict=True):
            values = np.array(sampler["maps"][name]).reshape(side, side)
            image = axes.imshow(values, cmap="cividis")
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{_label(sampler['name'])}: {label}" if len(samplers) > 1 else label, fontsize=10)
            figure.colorbar(image, ax=axes, shrink=0.85)
    return _image(figure, "Token cosine and R2 over the grid")


@_plain_text
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
        place.set(xticks=[], yticks=[])
        place.spines[:].set_visible(False)
    for column, title in enumerate(titles):
        grid[0, column].set_title(escaped(title)[-MAX_TITLE:], fontsize=8)
    for row, name in enumerate(names):
        label = "\n".join(textwrap.wrap(_label(name), 18))
        grid[row, 0].set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
        for column in range(count):
            if name in rows:
                colors = pca_colors(rows[name][column], reference).reshape(side, side, 3)
                grid[row, column].imshow(colors, interpolation="nearest")
            elif images is not None and images[column] is not None:
                thumbnail = images[column].copy()
                thumbnail.thumbnail((112, 112))  # at most: it is part of the page
                grid[row, column].imshow(thumbnail.convert("RGB"))
    return _image(figure, "Token maps of a few samples")


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
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that its font lacks: the page's reader chooses the font
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    content = base64.b64encode(buffer.getvalue()).decode()
    width = round(96 * figure.get_size_inches()[0])  # CSS pixels
    style = f"width:100%;max-width:{width}px;height:auto"
    return f'<img src="data:image/svg+xml;base64,{content}" alt="{description}" style="{style}">'
