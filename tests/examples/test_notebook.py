"""The notebook: its cells run in their order, on a few pictures and for a few steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples/first_hour.ipynb"
FEWER = {"PICTURES = 300": "PICTURES = 22", "STEPS = 200": "STEPS = 3"}


def cells(kind: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


@pytest.mark.slow
def test_the_cells_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    code = "\n\n".join("".join(cell["source"]) for cell in cells("code"))
    for many, few in FEWER.items():
        assert code.count(many) == 1
        code = code.replace(many, few)
    names: dict[str, Any] = {}
    exec(compile(code, NOTEBOOK.name, "exec"), names)
    names["plt"].close("all")
    assert (tmp_path / "first_hour/report/report.html").is_file()
    assert names["cosine"].shape == (2, 64)
    shown = capsys.readouterr().out
    assert "22 pictures, 64 tokens, 64 -> 48" in shown and "2 samples" in shown


def test_it_is_committed_without_outputs() -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))
