"""Every figure that is drawn: each axis with numbers says what they are, each panel what it shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import quality_table
from blip3o_dit.evaluation import plots
from blip3o_dit.extraction.inspection import draw_contact_sheet
from blip3o_dit.training.curves import draw_curves, draw_runs
from examples.digits.figure import draw_demo_figure

ROOT = Path(__file__).parent.parent
POINTS = [
    {"network_calls": calls, "solver": solver, "energy_score": {"value": 0.5 / calls}}
    for solver in ("euler", "heun")
    for calls in (2, 4, 8)
]
METHODS = [
    {
        "name": name,
        "maps": {"cosine": [0.1] * 16, "r2": list(np.linspace(-1, 1, 16))},
        "spread_error": [{"spread": spread, "error": 1.0} for spread in (0.5, 1.0)],
    }
    for name in ("DiT", "a/b")
]
LOG = [
    {"step": step, "loss": 1 / step, "cosine_similarity": 0.5, "learning_rate": 1e-3, "eval_loss": 0.3}
    for step in (5, 10, 15, 20)
]


def curves(path: Path) -> None:
    draw_curves(LOG, path)


def runs(path: Path) -> None:
    draw_runs({"a": LOG, "b": LOG}, path)


def quality(path: Path) -> None:
    rows = quality_table.read(ROOT / "benchmarks" / "results" / "quality.jsonl")
    quality_table.plot(rows, ["digits", "modes"], path)


def demo(path: Path) -> None:
    draw_demo_figure(
        path,
        pictures=np.zeros((2, 32, 32, 3), np.uint8),
        labels=[1, 2],
        rows={name: np.random.default_rng(0).normal(size=(2, 16, 8)) for name in ("true", "DiT")},
        decoded={name: np.zeros((2, 32, 32, 3), np.uint8) for name in ("true", "DiT")},
        training_curve={"training": ([1, 2], [1.0, 0.5])},
        metrics={"DiT": {"R2": 0.5, "energy score": 0.2}},
        title_note="made up",
    )


def sheet(path: Path) -> None:
    tokens = torch.randn(2, 16, 5)
    views = {"picture": Image.new("RGB", (9, 9))}
    draw_contact_sheet(path, eva=tokens, clip=tokens, pictures=[views, None], titles=[("a",), ("b", "c")])


DRAWN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "curve_plot": (lambda _: plots.curve_plot({"DiT": POINTS, "b": POINTS}, ("ridge", 0.3)), "plots.py"),
    "curve of one point": (lambda _: plots.curve_plot({"DiT": POINTS[:1]}, None), "plots.py"),
    "spread_plot": (lambda _: plots.spread_plot(METHODS), "plots.py"),
    "position_plots": (lambda _: plots.position_plots(METHODS), "plots.py"),
    "draw_contact_sheet": (sheet, "inspection.py"),
    "draw_curves": (curves, "curves.py"),
    "draw_runs": (runs, "curves.py"),
    "quality_table": (quality, "quality_table.py"),
    "draw_demo_figure": (demo, "figure.py"),
}


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are made."""
    made: list[Figure] = []
    begin = Figure.__init__

    def noted(self: Figure, *arguments: Any, **options: Any) -> None:
        begin(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(Figure, "__init__", noted)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)  # what takes time
    return made


def unlabelled(figure: Figure) -> list[str]:
    """What is drawn without saying what it is."""
    found = []
    for number, axes in enumerate(figure.axes):
        if not axes.get_visible() or not axes.has_data():
            continue
        for axis in (axes.xaxis, axes.yaxis):
            texts = [tick.get_text() for tick in axis.get_ticklabels() if tick.get_visible()]
            names = any(re.search("[^\\W\\d]", re.sub(r"mathdefault|\\times", "", text)) for text in texts)
            if axes.axison and any(texts) and not names and not axis.get_label_text().strip():
                found.append(f"axes {number}: {axis.axis_name}")
    said = [axes.get_title(loc=where) for axes in figure.axes for where in ("left", "center", "right")]
    said += [axis.get_label_text() for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    said += [text.get_text() for text in figure.texts] + [figure.get_suptitle()]
    return found if any(text.strip() for text in said) else [*found, "no title"]


@pytest.mark.parametrize("name", DRAWN)
def test_every_axis_with_numbers_has_a_label(name: str, figures: list[Figure], tmp_path: Path) -> None:
    DRAWN[name][0](tmp_path / "figure.png")
    assert figures and not [missing for figure in figures for missing in unlabelled(figure)]


def test_every_module_that_draws_is_here() -> None:
    files = [file for folder in ("src", "examples", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    drawing = {file.name for file in files if re.search(r"\bFigure\(|\bsubplots\(", file.read_text())}
    assert drawing == {module for _, module in DRAWN.values()}


def test_an_axis_without_a_label_is_found() -> None:
    figure = Figure()
    figure.subplots().plot([1, 2], [3, 4])
    assert unlabelled(figure) == ["axes 0: x", "axes 0: y", "no title"]


def test_the_curves_begin_at_the_first_step(figures: list[Figure], tmp_path: Path) -> None:
    curves(tmp_path / "curves.png")
    assert {axes.get_xlim()[0] for axes in figures[0].axes} == {0}
