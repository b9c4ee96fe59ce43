"""Curves of several runs in one figure: the right numbers in the right panel, names, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from blip3o_dit.cli.main import main
from blip3o_dit.cli.plot import names_of
from blip3o_dit.training.curves import LOG_FILE, draw_curves, draw_runs, read_log


def write_run(folder: Path, factor: float = 1.0, steps: int = 4) -> Path:
    folder.mkdir(parents=True)
    log: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        log.append({"step": step, "loss": factor / step, "grad_norm": 1.0, "learning_rate": 1e-3})
        log.append({"step": step, "eval_loss": 2 * factor / step, "eval_r2": 0.1 * step})
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    (folder / LOG_FILE).write_text(lines + '{"step": 9, "lo')  # as a killed run leaves it
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved; nothing is rendered, which takes most of a second."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    return figures


def panel(figure: Figure, title: str) -> Any:
    return next(axes for axes in figure.axes if axes.get_title().startswith(title))


def test_each_run_has_its_color_and_the_numbers_of_its_log(tmp_path: Path, drawn: list[Figure]) -> None:
    folders = [write_run(tmp_path / name, factor) for name, factor in (("one", 1.0), ("two", 3.0))]
    draw_runs({folder.name: read_log(folder / LOG_FILE) for folder in folders}, tmp_path / "x.png")
    (figure,) = drawn
    lines = panel(figure, "loss").lines
    assert [list(line.get_ydata()) for line in lines] == [
        [factor / step for step in (1, 2, 3, 4)] for factor in (1.0, 2.0, 3.0, 6.0)
    ]
    assert [line.get_linestyle() for line in lines] == ["-", "--", "-", "--"]
    colors = [line.get_color() for line in lines]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    assert len(panel(figure, "R2").lines) == 2 and not panel(figure, "samples a second").lines
    assert all(axes.get_xlabel() == "optimizer step" and axes.get_ylabel() for axes in figure.axes)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two", "training", "held out"]
    assert legend.legend_handles[1].get_color() == colors[2]


def test_one_run_tells_training_from_held_out_by_color(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_curves(read_log(write_run(tmp_path / "run") / LOG_FILE), tmp_path / "x.png")
    own, held_out = panel(drawn[0], "loss").lines
    assert own.get_color() != held_out.get_color()
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["training", "held out"]


def test_more_runs_than_colors_are_told_apart(tmp_path: Path, drawn: list[Figure]) -> None:
    log = read_log(write_run(tmp_path / "run") / LOG_FILE)
    draw_runs({str(number): log for number in range(12)}, tmp_path / "x.png")
    assert len({tuple(line.get_color()) for line in panel(drawn[0], "R2").lines}) == 12


def test_the_command_writes_a_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / name / "run $x_", 2.0)) for name in ("a", "b")]
    output = tmp_path / "figures" / "all.png"
    assert main(["plot", *runs, "--output", str(output)]) == 0
    assert Image.open(output).size[0] > 1000
    said = capsys.readouterr().err
    assert "a/run $x_: logged up to step 4" in said and str(output) in said


def test_names_are_as_short_as_tells_them_apart(tmp_path: Path) -> None:
    assert names_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert names_of([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == ["x/a", "y/a"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nowhere"], "nowhere: expected the folder of a run, with training_log.jsonl, found nothing"),
        (["run/training_log.jsonl"], "found JSON: give its folder, run"),
        (["bare"], "expected a log of steps (training_log.jsonl), found none"),
        (["broken"], "training_log.jsonl: line 1: not readable JSON"),
        (["run", "run/../run"], "expected each run once, found it twice"),
        (["run", "--output", "x.jpeg"], "expected a name with .png, .svg or .pdf, found x.jpeg"),
    ],
)
def test_refusals(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    for name, log in (("bare", ""), ("broken", '{"step": \n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / LOG_FILE).write_text(log)
    assert main(["plot", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
