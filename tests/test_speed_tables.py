"""Tables of speed: what is recorded is what is printed, and what docs/speed.md shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.measure import record, tables

ROOT = Path(__file__).parents[1]


def test_the_page_shows_the_rows_that_were_recorded() -> None:
    page = (ROOT / "docs/speed.md").read_text()
    recorded = ROOT / "benchmarks/results/speed.json"
    assert page.endswith("## Tables\n\n" + tables(recorded).rstrip() + "\n")


def test_rows_are_kept_under_their_command(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    for command, seconds in (("a --batch 1", 1.23456), ("b", 2.0), ("a --batch 1", 9.87654)):
        record(file, f"python -m benchmarks {command}", [{"seconds": seconds, "name": "x"}])
    shown = tables(file)
    assert shown.count("###") == 2
    assert "| 9.88 | x |" in shown and "1.23" not in shown
    assert shown.count("processor ") == 1  # both on the same machine


def test_the_command_leaves_out_where_its_rows_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    assert benchmarks.main(["memory", "--only", "interpreter", "--json", str(file), "--folder", "."]) == 0
    printed = capsys.readouterr().out
    assert "`python -m benchmarks memory --only interpreter --folder .`" in tables(file)
    assert "| interpreter | 24 |" in tables(file) and "| interpreter | 24 |" in printed
