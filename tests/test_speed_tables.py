"""Tables of speed: what is recorded is what is printed, and what docs/speed.md shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.measure import record, tables

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_shows_the_rows_that_were_recorded() -> None:
    page = (DOCS / "speed.md").read_text()
    assert page.endswith("## Tables\n\n" + tables(DOCS / "speed.json").rstrip() + "\n")


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
    benchmarks.main(["products", "--rows_of_x", "2", "--rounds", "1", "--json", str(file)])
    printed = capsys.readouterr().out
    assert "`python -m benchmarks products --rows_of_x 2 --rounds 1`" in tables(file)
    assert "| 2 | 7168 | 1792 |" in tables(file) and "| 2 | 7168 | 1792 |" in printed
