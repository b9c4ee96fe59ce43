"""Steps, warm-up, intervals and workers that nobody gave follow from the data: docs/training-defaults.md."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_dit.cli.train import main
from blip3o_dit.training import lengths
from blip3o_dit.training.config import DEBUG_DEFAULTS, TrainingConfig
from blip3o_dit.training.lengths import total_steps, with_lengths
from tests.helpers.stores import write_linear_store

NAMES = ("num_epochs", "warmup_steps", "logging_steps", "eval_steps", "save_steps")


def found(samples: int, processes: int = 1, **given: Any) -> tuple[Any, ...]:
    """Steps, and what is in NAMES."""
    config = with_lengths(TrainingConfig(device="cpu", **given), samples, processes)
    numbers = asdict(config)
    return (total_steps(config, samples, processes), *(numbers[name] for name in NAMES))


# Training samples, what was given -> steps, passes, warm-up, steps between lines, evaluations, checkpoints
CASES: list[tuple[int, dict[str, Any], tuple[Any, ...]]] = [
    (1, {}, (300, 300, 15, 3, 60, 60)),
    (90, {}, (300, 100, 15, 3, 60, 60)),
    (900, {}, (319, 11, 15, 3, 63, 63)),
    (2700, {}, (850, 10, 42, 8, 170, 170)),
    (20_000, {}, (6250, 10, 312, 62, 1000, 1000)),
    (1_080_000, {}, (337_500, 10, 1000, 100, 1000, 1000)),
    (90, {"num_epochs": 10.0}, (30, 10.0, 1, 1, 10, 10)),
    (90, {"num_epochs": 0.5}, (2, 0.5, 0, 1, 10, 10)),
    (90, {"max_steps": 2}, (2, 0.6667, 0, 1, 10, 10)),
    (10**9, {"max_steps": 1}, (1, 1e-4, 0, 1, 10, 10)),
    (90, {"max_steps": 200, "num_epochs": 7.0}, (200, 7.0, 10, 2, 40, 40)),
    (90, {"batch_size": 8}, (300, 25, 15, 3, 60, 60)),
    (90, {"logging_steps": 100, "save_steps": 1000, "eval_steps": 1000}, (300, 100, 15, 100, 1000, 1000)),
    (90, {"warmup_steps": 0}, (300, 100, 0, 3, 60, 60)),
    (90, {"extended_at": 300, "extended_to": 400}, (400, 100, 20, 4, 80, 80)),
]


@pytest.mark.parametrize(("samples", "given", "numbers"), CASES)
def test_numbers_follow_from_the_data_and_given_ones_win(
    samples: int, given: dict[str, Any], numbers: tuple[Any, ...]
) -> None:
    assert found(samples, **given) == numbers


@pytest.mark.parametrize("samples", [1, 31, 90, 2700, 4097])
def test_numbers_depend_on_the_samples_of_a_step_alone(samples: int) -> None:
    alone = found(samples, batch_size=32)
    assert alone == found(samples, 4, batch_size=8)
    assert alone == found(samples, 2, batch_size=8, gradient_accumulation_steps=2)


def test_nothing_is_left_open_and_resolving_again_changes_nothing() -> None:
    config = with_lengths(TrainingConfig(device="cpu"), 500)
    assert all(getattr(config, name) is not None for name in (*NAMES, "num_workers"))
    assert with_lengths(config, 90_000) == config
    debug = with_lengths(TrainingConfig(device="cpu", **DEBUG_DEFAULTS), 90_000)
    assert all(getattr(debug, name) == value for name, value in DEBUG_DEFAULTS.items())


@pytest.mark.parametrize(("here", "there", "workers"), [(1, "1", 0), (2, "1", 1), (64, "1", 4), (8, "4", 1)])
def test_workers_on_a_gpu_are_fewer_than_its_cores(
    here: int, there: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert with_lengths(TrainingConfig(device="cpu"), 90).num_workers == 0
    monkeypatch.setattr(lengths, "cores", lambda: here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", there)
    assert with_lengths(TrainingConfig(), 90).num_workers == workers
    assert with_lengths(TrainingConfig(num_workers=7), 90).num_workers == 7


@pytest.mark.usefixtures("no_curves")
def test_a_run_records_its_numbers_and_keeps_them_when_it_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_linear_store(tmp_path / "store", samples=10)
    run = ["--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    new = "--model_dim 16 --num_layers 1 --batch_size 8 --eval_split 0 --source noise --ema_decay 0"
    monkeypatch.setattr(lengths, "LEAST_STEPS", 24)
    assert main([*run, "--embeddings_path", str(store.path), *shlex.split(new)]) == 0
    recorded = TrainingConfig.from_folder(tmp_path / "run")
    assert (recorded.num_epochs, recorded.warmup_steps, recorded.eval_steps) == (12, 1, 10)
    assert recorded.num_workers == 0
    monkeypatch.setattr(lengths, "LEAST_STEPS", 80)
    assert main([*run, "--resume_from_checkpoint", "auto"]) == 0
    assert TrainingConfig.from_folder(tmp_path / "run") == recorded
