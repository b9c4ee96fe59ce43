"""The tables of the quality benchmark say what its rows say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import calibration
from benchmarks.quality_data import modes
from benchmarks.quality_table import calls_table, modes_table, optimizers_table, reach_table, recipes_table


def curve(recipe: str, energies: dict[int, float], seed: int = 0) -> list[dict[str, object]]:
    shared = {
        "set": "digits",
        "kind": "curve",
        "recipe": recipe,
        "seed": seed,
        "spread_error": 1,
        "frechet": 1,
    }
    return [
        {
            **shared,
            "spread_error": 1,
            "frechet": 1,
            "step": step,
            "seconds": step / 10,
            "energy": energy,
            "r2": 1 - energy,
        }
        for step, energy in energies.items()
    ]


ROWS = [
    *curve("paper", {50: 0.9, 200: 0.6, 1000: 0.4}),
    *curve("paper", {50: 0.9, 200: 0.6, 1000: 0.5}, seed=1),
    *curve("default", {50: 0.5, 200: 0.41, 1000: 0.2}),
    *curve("default", {50: 0.5, 200: 0.43, 1000: 0.2}, seed=1),
    {"set": "digits", "kind": "calls", "recipe": "euler", "calls": 50, "energy": 0.2},
    {"set": "digits", "kind": "student", "recipe": "direct", "calls": 1, "energy": 0.21},
]


def test_steps_are_those_at_which_the_mean_over_seeds_is_as_good() -> None:
    assert reach_table(ROWS, ["digits"]).splitlines()[-1] == "| digits | 1000 | 200 | 200 | 100 / 100 |"


def test_a_goal_that_is_not_reached_is_called_so() -> None:
    rows = [*curve("paper", {1000: 0.1}), *curve("default", {1000: 0.2})]
    assert "| not reached | not reached |" in reach_table(rows, ["digits"])


def test_means_and_ranges_over_seeds() -> None:
    assert "| paper, 1000 steps | 0.550 (0.500 to 0.600) | 0.450 (0.400 to 0.500) |" in recipes_table(
        ROWS, ["digits"]
    )


def test_scores_are_relative_to_fifty_euler_calls() -> None:
    assert "| 1 | student, direct | 0.2100 (+5.0 %) |" in calls_table(ROWS, ["digits"])


def test_an_optimizers_run_is_held_against_the_best_end_of_adamw() -> None:
    runs = {
        ("adamw", 0.001): {50: 0.5, 100: 0.4},
        ("adamw", 0.002): {50: 0.4, 100: 0.3},
        ("muon", 0.001): {50: 0.3, 100: 0.2},
    }
    rows = [
        row | {"kind": "optimizer", "learning_rate": rate}
        for (name, rate), energies in runs.items()
        for seed in (0, 1)
        for row in curve(name, energies, seed)
    ]
    assert optimizers_table(rows, ["digits"]).splitlines()[2:] == [
        "| digits | adamw | 0.001 | 0.5000 | 0.4000 | 0.6000 | 10 | - | - |",
        "| digits | adamw | 0.002 | 0.4000 | 0.3000 | 0.7000 | 10 | 100 | 10 |",
        "| digits | muon | 0.001 | 0.3000 | 0.2000 | 0.8000 | 10 | 50 | 5 |",
    ]


def test_the_command_draws_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, figure = tmp_path / "rows.jsonl", tmp_path / "figure.png"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert benchmarks.main(["quality-table", str(file), "--figure", str(figure)]) == 0
    assert figure.stat().st_size > 1000
    assert modes_table(ROWS) in capsys.readouterr().out


def test_modes_are_told_apart_from_what_lies_between() -> None:
    data = modes(count=200)
    eva, clip = data.fetch(range(200))
    found = data.mode_of(eva, clip)
    assert set(found.tolist()) == {0, 1, 2, 3}  # every true token is within its mode
    middle = eva @ data.matrix.T + data.centres.mean(dim=0)
    assert (data.mode_of(eva, middle) == -1).all()


def test_a_run_is_one_line_with_and_without_its_scale() -> None:
    run = {"set": "digits", "kind": "calibration", "network": "64 wide", "steps": 200}
    rows = [
        {**run, "noise_scale": scale, "spread_error": ratio, "energy": 0.29 * ratio}
        for scale, ratio in ((1.0, 1.1), (0.9, 1.0))
    ]
    rows.append({**run, "noise_scale": 0.9, "guidance_scale": 1.5, "spread_error": 2.0, "energy": 2.0})
    expected = "| digits | 64 wide | 200 | 0.9 | 1.10 | 1.00 | 0.3190 | 0.2900 |"
    assert calibration.table(rows).splitlines()[2:] == [expected]


def test_what_is_held_back_is_of_the_training_side() -> None:
    data = modes(count=1000)
    split = calibration.split_of(data, seed=0)
    assert len(split.held_back) == 50 and not data.held_out[split.held_back].any()
    assert not set(split.held_back.tolist()) & set(split.train.tolist())
