"""Tables of speed: what is recorded is what is printed, and what docs/speed.md shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks.measure import record, tables

ROOT = Path(__file__).parents[1]


def test_the_page_shows_the_rows_that_were_recorded() -> None:
    page = (ROOT / "docs/speed.md").read_text()
    recorded = ROOT / "benchmarks/results/speed.json"
    assert page.endswith("## Tables\n\n" + tables(recorded))


def machine(processor: str, torch: str = "2.13.0") -> dict[str, object]:
    return {"processor": processor, "threads": 2, "bfloat16": "native", "torch": torch}


def test_rows_are_kept_under_their_command_and_machine(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    for command, seconds, where in (
        ("a --batch 1", 1.23456, machine("Old")),
        ("b", 2.0, machine("Old")),
        ("a --batch 1", 9.87654, machine("Old", "2.14.0")),
        ("a --batch 1", 0.5, machine("New")),
        ("b", 0.25, {"gpu": "H100", **machine("Old")}),
    ):
        record(file, f"python -m benchmarks {command}", [{"seconds": seconds, "name": "x"}], where)
    shown = tables(file)
    assert shown.count("###") == 3  # two commands, and the machines
    assert (
        "| Old, 2 threads, bfloat16 native | 9.88 | x |\n| New, 2 threads, bfloat16 native | 0.5 | x |"
        in shown
    )
    assert "| H100 | 0.25 | x |" in shown and "1.23" not in shown
    assert (
        "* New, 2 threads, bfloat16 native: processor New, threads 2, bfloat16 native, torch 2.13.0\n"
        in shown
    )


def test_a_page_is_given_the_tables_and_another_machine_adds_its_rows(tmp_path: Path) -> None:
    file, page = tmp_path / "rows.json", tmp_path / "page.md"
    page.write_text("# Page\n\n## Tables\n\nold\n")
    command = "python -m benchmarks memory --only interpreter --folder ."
    record(file, command, [{"task": "before"}], machine("Old"))
    record(file, "python -m benchmarks soak", [{"task": "not asked for"}], machine("Old"))
    assert benchmarks.main(["again", str(file), "--parts", "memory"]) == 0
    assert benchmarks.main(["tables", str(file), "--into", str(page)]) == 0
    assert page.read_text() == "# Page\n\n## Tables\n\n" + tables(file)
    assert [run["rows"][0]["task"] for run in json.loads(file.read_text())[command]] == [
        "before",
        "interpreter",
    ]


def test_the_command_leaves_out_where_its_rows_went(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    assert benchmarks.main(["memory", "--only", "interpreter", "--json", str(file), "--folder", "."]) == 0
    printed = capsys.readouterr().out
    assert "`python -m benchmarks memory --only interpreter --folder .`" in tables(file)
    assert " | interpreter | 24 |" in tables(file) and "| interpreter | 24 |" in printed
