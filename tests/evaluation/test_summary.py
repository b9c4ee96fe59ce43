"""What the report's sentences may say, case by case: every one of them follows from the figures."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from blip3o_dit.evaluation.metric_tables import TABLES
from blip3o_dit.evaluation.report import _table
from blip3o_dit.evaluation.summary import summarize


def estimate(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high}


def sampler(name: str, *, energy: float, r2: float, is_model: bool = False) -> dict[str, Any]:
    return {
        "name": name,
        "is_model": is_model,
        "cost": {"network_calls": 1, "milliseconds_per_sample": 2.0},
        "metrics": {
            "conditional": {
                "energy_score": estimate(energy, 0.99 * energy, 1.01 * energy),
                "spread_error_ratio": estimate(1.02, 0.95, 1.08),
            },
            "best_guess": {"r2": estimate(r2, r2 - 0.01, r2 + 0.01)},
            "use": {"recall_at_1": estimate(0.5, 0.4, 0.6)},
            "tokens": {"frechet": estimate(1.5)},
        },
    }


def result(samples: int = 200, **energy: float) -> dict[str, Any]:
    """A model "dit" and two baselines; `energy` is (value, low, high) of the difference to each."""
    methods = [
        sampler("dit", energy=0.2, r2=0.8, is_model=True),
        sampler("ridge", energy=0.3, r2=0.7),
        sampler("ridge 3x3", energy=0.25, r2=0.75),
    ]
    differences = {
        name: {
            "conditional.energy_score": estimate(*energy.get("difference", (-0.05, -0.06, -0.04))),
            "best_guess.r2": estimate(0.05, 0.03, 0.07),
        }
        for name in ("ridge", "ridge 3x3")
    }
    return {
        "methods": methods,
        "differences": {"dit": differences},
        "floor": {"tokens": {"frechet": estimate(1.0)}},
        "curve": {},
        "data": {
            "num_samples": samples,
            "gallery_samples": samples,
            "fitted_samples": 500,
            "source_samples": 500,
        },
    }


ADVICE = ("train longer", "use ridge")


@pytest.mark.parametrize(
    ("difference", "begins"),
    [
        ((-0.05, -0.06, -0.04), "dit is the better sampler: it beats the best baseline, ridge 3x3"),
        ((0.05, 0.04, 0.06), "dit is worse than ridge 3x3"),
        ((-0.05, -0.2, 0.1), "dit is not told apart from the best baseline, ridge 3x3, with 200 samples"),
        ((0.05, -0.1, 0.2), "dit is not told apart from the best baseline, ridge 3x3, with 200 samples"),
        ((0.05, None, None), "dit is not told apart from the best baseline, ridge 3x3, with 200 samples"),
        ((0.0, 0.0, 0.0), "dit is not told apart from the best baseline, ridge 3x3, with 200 samples"),
    ],
)
def test_the_verdict_is_the_interval_of_the_difference(difference: tuple, begins: str) -> None:
    verdict = summarize(result(difference=difference))[0]
    assert verdict.startswith(begins)
    assert any(advice in verdict for advice in ADVICE) == ("worse" in begins)


@pytest.mark.parametrize("samples", [1, 8, 19])
@pytest.mark.parametrize("difference", [(-0.05, -0.06, -0.04), (0.05, 0.04, 0.06), (0.05, -0.1, 0.2)])
def test_few_samples_say_nothing_else(samples: int, difference: tuple) -> None:
    lines = summarize(result(samples, difference=difference))
    assert len(lines) == 1
    assert "not told apart" in lines[0] and str(samples) in lines[0]
    assert not any(advice in lines[0] for advice in (*ADVICE, "better sampler", "worse than"))
    assert ("samples;" in lines[0]) == (samples > 1)


@pytest.mark.parametrize(
    ("model", "baseline", "shown"),
    [
        (0.0521, 0.0524, "0.05210 against 0.05240"),
        (0.227, 0.282, "0.227 against 0.282"),
        (12.0, 15.0, "12.000 against 15.000"),
        (0.5, 0.5 + 1e-9, "0.500000 against 0.500000"),
    ],
)
def test_the_figures_have_the_digits_that_tell_them_apart(model: float, baseline: float, shown: str) -> None:
    found = result(difference=(model - baseline, 2 * (model - baseline), 0.5 * (model - baseline)))
    found["methods"] = [found["methods"][0], found["methods"][2]]
    for method, energy in zip(found["methods"], (model, baseline), strict=True):
        method["metrics"]["conditional"]["energy_score"]["value"] = energy
    verdict = summarize(found)[0]
    assert shown in verdict and "95 % interval" in verdict


@pytest.mark.parametrize(
    ("ratio", "says"),
    [
        ((1.02, 0.95, 1.08), "calibrated to within a tenth"),
        ((0.8, 0.75, 0.85), "over-confident"),
        ((1.3, 1.2, 1.4), "under-confident"),
        ((0.8, 0.5, 1.2), "calibrated as far as these samples tell"),
        ((1.3, 0.9, 1.7), "calibrated as far as these samples tell"),
        ((1.0, 0.7, 1.4), "calibrated as far as these samples tell"),
        ((0.8, None, None), None),
    ],
)
def test_calibration_needs_its_interval(ratio: tuple, says: str | None) -> None:
    found = result()
    found["methods"][0]["metrics"]["conditional"]["spread_error_ratio"] = estimate(*ratio)
    lines = [line for line in summarize(found) if "spread over error" in line]
    assert (says is None) == (not lines)
    assert says is None or says in lines[0]


@pytest.mark.parametrize("samples", [99, 100])
def test_distances_between_sets_need_samples(samples: int) -> None:
    lines = summarize(result(samples))
    assert any("As a set" in line for line in lines) == (samples >= 100)
    assert any("figures are rough" in line for line in lines) == (samples < 100)


def test_a_best_guess_is_not_told_apart_without_a_clear_interval() -> None:
    found = result()
    for interval, says in (((0.03, 0.07), "explains 20%"), ((-0.02, 0.07), "not told apart from ridge 3x3")):
        for other in found["differences"]["dit"].values():
            other["best_guess.r2"] = estimate(0.05, *interval)
        line = next(line for line in summarize(found) if line.startswith("As a best guess"))
        assert says in line and "use the linear map" not in line


def test_one_call_is_a_call() -> None:
    found = result()
    point = {"solver": "euler", "energy_score": estimate(0.2)}
    found["curve"] = {"dit": [point | {"network_calls": 1}, point | {"network_calls": 4}]}
    line = next(line for line in summarize(found) if line.startswith("A sample took"))
    assert "1 network call and" in line and "1 call came" in line


@pytest.mark.parametrize(
    ("intervals", "bold"),
    [
        ([(0.1, 0.2), (0.3, 0.4)], [True, False]),
        ([(0.1, 0.3), (0.2, 0.4)], [False, False]),
        ([(0.1, 0.2), (0.3, 0.4), (0.15, 0.5)], [False, False, False]),
        ([(None, None), (0.3, 0.4)], [False, False]),
        ([(0.1, 0.2)], [False]),
        ([(0.1, 0.1), (0.1, 0.1)], [False, False]),
    ],
)
def test_nothing_is_bold_where_methods_tie(intervals: list, bold: list[bool]) -> None:
    found = result()
    found["methods"] = [copy.deepcopy(found["methods"][0]) for _ in intervals]
    for method, (low, high) in zip(found["methods"], intervals, strict=True):
        value = 0.15 if low is None else (low + high) / 2
        method["metrics"] = {"conditional": {"energy_score": estimate(value, low, high)}}
    table = _table(TABLES[0], found)
    assert [row.cells[0].best for row in table.rows] == bold
