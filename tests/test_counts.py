"""What one network call reads and launches: the figures that docs/speed.md shows are the present code's."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.counts import WAYS, count
from benchmarks.measure import Row, markdown

PAGE = (Path(__file__).parents[1] / "docs" / "speed.md").read_text()


@pytest.fixture(scope="module")
def rows() -> dict[str, Row]:
    return {way: count(way, 24) for way in WAYS}


def test_the_page_shows_what_is_counted(rows: dict[str, Row]) -> None:
    assert markdown(list(rows.values())) in PAGE


def test_no_weights_of_modulations_are_read_inside_the_loop(rows: dict[str, Row]) -> None:
    before, after, kernels, one = rows.values()
    assert after["of these for modulations GB"] == kernels["of these for modulations GB"] == 0.0
    share = before["of these for modulations GB"] / before["weights read GB"]
    assert share == pytest.approx(0.15, abs=0.01)
    # Half of the default network's 2.71 GB less what the condition and the modulations take.
    assert one["weights read GB"] == kernels["weights read GB"] == after["weights read GB"] < 2.04


def test_a_layer_makes_few_passes_over_its_activations(rows: dict[str, Row]) -> None:
    assert rows["Triton's kernels"]["passes a layer"] <= 21
    assert rows["Triton's kernels"]["launches a layer"] <= 9
    assert rows["Triton's kernels, one sample"]["passes a layer"] <= 18
    assert rows["Triton's kernels, one sample"]["launches a layer"] <= 8
