"""The report's pictures, as SVG text that stands in the page itself."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip3o_dit.utils.pca_colors import pca_colors

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, FAINT = "#222222", "#8A8A8A"


def require_matplotlib() -> None:
    """Raises ValueError when the report could not be drawn: better before the sampling than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("the report: expected matplotlib: pip install 'blip3o-dit[plot]'") from None


def curve_figure(
    curves: Mapping[str, Sequence[Mapping[str, Any]]], baseline: tuple[str, float] | None
) -> str:
    """Energy score against network calls, one line for each model and solver."""
    figure, axes = _figure(6.4, 3.6)
    for row, (name, points) in enumerate(curves.items()):
        for style, solver in enumerate(dict.fromkeys(point["solver"] for point in points)):
            mine = [point for point in points if point["solver"] == solver]
            calls = [point["network_calls"] for point in mine]
            axes.plot(
                calls,
                [point["energy_score"]["value"] for point in mine],
                color=COLOURS[row % len(COLOURS)],
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
    return _svg(figure, "curve")


def spread_figure(methods: Sequence[Mapping[str, Any]]) -> str:
    """Error of the draws' mean against their spread, in bins of equal count; calibrated is the diagonal."""
    figure, axes = _figure(4.6, 4.0)
    high = 0.0
    for row, method in enumerate(methods):
        spread = [point["spread"] for point in method["spread_error"]]
        error = [point["error"] for point in method["spread_error"]]
        high = max([high, *spread, *error])
        axes.plot(
            spread, error, marker="o", markersize=4, color=COLOURS[row % len(COLOURS)], label=method["name"]
        )
    axes.plot([0, 1.05 * high], [0, 1.05 * high], color=FAINT, linewidth=1, linestyle="--")
    axes.set_xlim(0, 1.05 * high)
    axes.set_ylim(0, 1.05 * high)
    axes.set_aspect("equal")
    axes.set_xlabel("spread of the samples")
    axes.set_ylabel("error of their mean")
    axes.legend(frameon=False, fontsize=9)
    return _svg(figure, "spread")


def position_figure(methods: Sequence[Mapping[str, Any]]) -> str:
    """Maps of token cosine and R2 over the grid, a row for each method."""
    side = int(len(methods[0]["maps"]["cosine"]) ** 0.5)
    figure, _ = _figure(6.4, 2.9 * len(methods), axes=False)
    places = figure.subplots(len(methods), 2, squeeze=False)
    for row, method in enumerate(methods):
        for axes, (name, label) in zip(places[row], (("cosine", "token cosine"), ("r2", "R2")), strict=True):
            values = np.array(method["maps"][name]).reshape(side, side)
            picture = axes.imshow(values, cmap="cividis")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(f"{method['name']}: {label}" if len(methods) > 1 else label, fontsize=10)
            figure.colorbar(picture, ax=axes, shrink=0.85)
    return _svg(figure, "position")


def sample_figure(
    rows: Mapping[str, np.ndarray], pictures: Sequence[Any] | None, titles: Sequence[str]
) -> str:
    """Token maps of a few samples, one row for each of `rows`, the true tokens first.

    rows: name -> tokens [k, N, C]. pictures: RGB images or None, one for each sample.
    """
    true = next(iter(rows.values()))
    count, side = len(true), int(true.shape[1] ** 0.5)
    shown = pictures is not None and any(picture is not None for picture in pictures)
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
                colours = pca_colors(rows[name][column], true).reshape(side, side, 3)
                grid[row, column].imshow(colours, interpolation="nearest")
            elif pictures is not None and pictures[column] is not None:
                grid[row, column].imshow(_small(pictures[column]))
    return _svg(figure, "sample")


def _small(picture: Any) -> np.ndarray:
    """At most 112 pixels a side: the page carries it."""
    copy = picture.copy()
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


def _svg(figure: Any, name: str) -> str:
    """The figure as an <svg> element that scales with the page; `name` makes its ids unique there."""
    import matplotlib

    buffer = io.StringIO()
    settings: Any = {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "report"}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    width = re.findall(r'viewBox="0 0 ([\d.]+) ', text)[0]
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    style = f'style="width:100%;max-width:{float(width) * 4 / 3:.0f}px;height:auto" role="img" '
    return text.replace("<svg ", f"<svg {style}", 1).strip()
