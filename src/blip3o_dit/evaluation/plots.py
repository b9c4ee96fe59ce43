"""The report's plots, as <img> elements that hold their SVG in the page itself."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import numpy as np
from markupsafe import escape

from blip3o_dit.utils.json_files import escaped

# Okabe and Ito's palette, which color-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
FAINT = "#6E6E6E"

MAX_LABEL = 40

Plot = TypeVar("Plot", bound=Callable[..., Any])


def _plain_text(plot: Plot) -> Plot:
    """Names and keys are shown as they are: "$" begins no formula, and what no font has is no warning."""

    @wraps(plot)
    def plain(*arguments: Any, **options: Any) -> Any:
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
    figure, axes = _figure(4.4, 3.2)
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
        axes.axhline(
            baseline[1], color=FAINT, linewidth=1.5, linestyle=(0, (1, 1)), label=_label(baseline[0])
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({point["network_calls"] for points in curves.values() for point in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set(xlabel="network calls per sample", ylabel="energy score (standard deviations)")
    _legend_below(figure, axes)
    return _image(figure, f"Energy score against network calls of {', '.join(curves)}")


@_plain_text
def spread_plot(samplers: Sequence[Mapping[str, Any]]) -> str:
    """Error of the samples' mean against their spread, in bins of equal count; calibrated is the diagonal."""
    figure, axes = _figure(4.4, 4.2)
    ends = []
    for row, sampler in enumerate(samplers):
        spread = [point["spread"] for point in sampler["spread_error"]]
        error = [point["error"] for point in sampler["spread_error"]]
        ends += [*spread, *error]
        axes.plot(
            spread,
            error,
            linestyle="",
            marker="os^Dvp"[row % 6],
            markersize=5,
            color=COLORS[row % len(COLORS)],
            label=_label(sampler["name"]),
        )
    margin = 0.05 * (max(ends) - min(ends)) or 0.05 * max(ends) or 1.0
    limits = (max(0.0, min(ends) - margin), max(ends) + margin)
    axes.plot(limits, limits, color=FAINT, linewidth=1, linestyle="--", label="calibrated")
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.set(xlabel="spread of the samples (standard deviations)", ylabel="error of their mean (same units)")
    _legend_below(figure, axes)
    return _image(figure, f"Error against spread of {', '.join(sampler['name'] for sampler in samplers)}")


MAPS = (("cosine", "token cosine"), ("r2", "R2"))


@_plain_text
def position_plots(samplers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Maps of token cosine and R2 over the grid, two for each sampler; equal colours are equal values."""
    side = math.isqrt(len(samplers[0]["maps"]["cosine"]))
    ends = {
        name: (
            min(min(sampler["maps"][name]) for sampler in samplers),
            max(max(sampler["maps"][name]) for sampler in samplers),
        )
        for name, _ in MAPS
    }
    images = []
    for sampler in samplers:
        for name, label in MAPS:
            figure, axes = _figure(3.3, 2.8, grid=False)
            values = np.array(sampler["maps"][name]).reshape(side, side)
            low, high = ends[name]
            image = axes.imshow(values, cmap="cividis", vmin=low, vmax=high)
            bar = figure.colorbar(image, ax=axes, shrink=0.85)
            bar.set_label(label)
            axes.set(xlabel="column of the grid", ylabel="row of the grid")
            axes.set(xticks=_grid_ticks(side), yticks=_grid_ticks(side))
            axes.set_title(_label(sampler["name"]), fontsize=10)
            images.append(_image(figure, f"{label} of {sampler['name']} over the grid"))
    return images


def _grid_ticks(side: int) -> list[int]:
    """At most eight of the positions 0..side-1, the first among them."""
    return list(range(0, side, math.ceil(side / 8)))


def _legend_below(figure: Any, axes: Any) -> None:
    """A legend under the axes, where it covers nothing; the figure grows by its rows."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) <= 20 else 1
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.22 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)


def _figure(width: float, height: float, *, grid: bool = True) -> tuple[Any, Any]:
    """A figure as wide as a phone at most, in inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    if grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#E3E3E3", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, axes


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
    alt = escape(escaped(description))
    return f'<img src="data:image/svg+xml;base64,{content}" alt="{alt}" width="{width}">'
