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
            "tokens": {"frechet": estimate(1.5, 1.4, 1.6)},
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
        "floor": {"tokens": {"frechet": estimate(1.0, 0.9, 1.1)}, "samples": samples},
        "curve": {},
        "settings": {"curve_samples": 256, "measure_distribution_samples": 2048},
        "data": {
            "num_samples": samples,
            "drawn_samples": samples,
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
    assert ("samples," in lines[0]) == (samples > 1)


def test_the_samples_that_count_are_those_that_were_drawn_several_times() -> None:
    """The energy score is of these alone."""
    found = result(200, difference=(0.05, -0.1, 0.2))
    found["data"]["drawn_samples"] = 50
    lines = summarize(found)
    assert "with 50 samples" in lines[0]
    assert any(line.startswith("Only 50 samples were measured with several draws") for line in lines)
    found["data"]["drawn_samples"] = 19
    assert len(summarize(found)) == 1


def test_the_verdicts_come_before_the_details() -> None:
    """With several models, each pair is compared once."""
    found = result()
    for name in ("b", "c"):
        found["methods"].insert(1, sampler(name, energy=0.21, r2=0.79, is_model=True))
        found["differences"][name] = dict(found["differences"]["dit"])
    same = {"conditional.energy_score": estimate(0.01, 0.005, 0.015)}
    found["differences"]["dit"] |= {"c": same, "b": same}
    found["differences"]["c"]["b"] = {"conditional.energy_score": estimate(0.0, -0.1, 0.1)}
    starts = [line.split(" (")[0] for line in summarize(found)[:6]]
    assert [start.split()[0] for start in starts[:3]] == ["dit", "c", "b"]
    assert starts[3:] == [
        "dit is worse than c by energy score",
        "dit is worse than b by energy score",
        "c is not told apart from b by energy score",
    ]
    found["data"]["drawn_samples"] = 8
    assert summarize(found)[0].startswith("With 8 held-out samples, dit, c and b are not told apart")


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
        ((1.09, 1.06, 1.12), "under-confident: its samples of one condition differ a little too much"),
        ((0.93, 0.88, 0.98), "over-confident: its samples of one condition differ a little too little"),
        ((0.95, 0.91, 0.99), "calibrated to within a tenth"),
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
    fewer_vectors, smaller_floor = result(samples), result(samples)
    fewer_vectors["settings"]["measure_distribution_samples"] = 99
    smaller_floor["floor"]["samples"] = samples - 1
    for found in (fewer_vectors, smaller_floor):
        assert not any("As a set" in line for line in summarize(found))


@pytest.mark.parametrize(
    ("generated", "true", "says"),
    [
        ((4.5, 4.2, 4.9), (0.6, 0.0, 1.3), "farther from the true ones than other true ones are"),
        ((0.5, 0.4, 0.6), (1.0, 0.9, 1.1), "closer to the true ones than other true ones are"),
        ((1.74, 0.0, 9.0), (11.5, 2.0, 21.0), "as close to the true ones as other true ones are, as far as"),
        ((2.0, 1.0, 3.0), (1.5, 0.5, 2.5), "as close to the true ones as other true ones are, as far as"),
        ((0.5, 0.4, 0.6), (0.0, 0.0, 0.0), "farther from the true ones"),
        ((1.5, None, None), (1.0, 0.9, 1.1), None),
    ],
)
def test_distances_between_sets_are_told_apart_by_their_intervals(
    generated: tuple, true: tuple, says: str | None
) -> None:
    found = result()
    found["methods"][0]["metrics"]["tokens"]["frechet"] = estimate(*generated)
    found["floor"]["tokens"]["frechet"] = estimate(*true)
    lines = [line for line in summarize(found) if line.startswith("As a set")]
    assert len(lines) == (says is not None)
    if says is not None:
        assert says in lines[0] and lines[0].count("95 % interval") == 2


def test_shares_have_intervals_or_are_not_said() -> None:
    found = result()
    use = found["methods"][0]["metrics"]["use"]
    use |= {"probe_accuracy": estimate(0.967, 0.9, 1.0)}
    found["data"]["probe_accuracy_of_truth"] = estimate(1.0, 1.0, 1.0)
    line = next(line for line in summarize(found) if "finds its own picture" in line)
    assert "among 200 for 50.0% (40.0% to 60.0%) of them" in line
    assert "right on 96.7% (90.0% to 100.0%) of its samples and on 100.0% of the true tokens" in line
    use["recall_at_1"] = estimate(0.5)
    assert any(line.startswith("A linear classifier") for line in summarize(found))
    use["probe_accuracy"] = estimate(0.967)
    assert not any("classifier" in line or "its own picture" in line for line in summarize(found))


def test_a_best_guess_is_not_told_apart_without_a_clear_interval() -> None:
    found = result()
    for interval, says in (((0.03, 0.07), "explains 20%"), ((-0.02, 0.07), "not told apart from ridge 3x3")):
        for other in found["differences"]["dit"].values():
            other["best_guess.r2"] = estimate(0.05, *interval)
        line = next(line for line in summarize(found) if line.startswith("As a best guess"))
        assert says in line and "use the linear map" not in line
        assert "difference +0.050, 95 % interval" in line


def test_one_call_is_a_call() -> None:
    found = result()
    point = {"solver": "euler", "energy_score": estimate(0.2)}
    found["curve"] = {"dit": [point | {"network_calls": 1}, point | {"network_calls": 4}]}
    line = next(line for line in summarize(found) if line.startswith("A sample of dit took"))
    assert "1 network call and" in line and "1 call came" in line and line.endswith("on 200 samples.")
    found["settings"]["curve_samples"] = 19
    assert not any("1 call came" in line for line in summarize(found))


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
    for number, (low, high) in enumerate(intervals):
        method, value = found["methods"][number], 0.15 if low is None else (low + high) / 2
        method["name"] = str(number)
        method["metrics"] = {"conditional": {"energy_score": estimate(value, low, high)}}
    table = _table(TABLES[0], found)
    assert [row.cells[0].best for row in table.rows] == bold


@pytest.mark.parametrize(
    ("difference", "bold"), [((-0.05, -0.06, -0.04), [True, False]), ((-0.05, -0.2, 0.1), [False, False])]
)
def test_bold_agrees_with_the_verdict(difference: tuple, bold: list[bool]) -> None:
    """A paired difference tells more apart than both intervals, and is what the sentences are about."""
    found = result(difference=difference)
    found["methods"] = [found["methods"][0], found["methods"][2]]
    for method in found["methods"]:
        method["metrics"]["conditional"]["energy_score"] |= {"low": 0.1, "high": 0.4}
    table = _table(TABLES[0], found)
    assert [row.cells[0].best for row in table.rows] == bold
    assert ("better sampler" in summarize(found)[0]) == bold[0]
