"""Fine-tuning on digits: steps that a run from a trained model takes for what one from scratch reaches.

A model is trained on the digits 5 to 9, seen by two small towers that were trained on all ten. Then 0 to 4
are trained from scratch, and from that model with its own statistics and source or with the data's. Each run
has the same steps, batches and learning rate; its energy score is measured on held-out digits 0 to 4.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import Row
from benchmarks.quality import train_recipe, truth_of
from benchmarks.quality_data import MemorySource, digits
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training.init_from import settings_of_model

POINTS = (1, 5, 10, 20, 40, 80, 120, 160)

STARTS = {
    "from scratch": None,
    "--init_from": "data",
    "--init_from --init_statistics model": "model",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=POINTS[-1], help="optimizer steps of each run on 0 to 4")
    parser.add_argument("--first_steps", type=int, default=400, help="optimizer steps on 5 to 9")
    parser.add_argument("--seed", type=int, default=0)


def run(arguments: argparse.Namespace) -> list[Row]:
    everything = digits(arguments.seed)
    assert everything.labels is not None
    old = part(everything, "digits 5 to 9", everything.labels >= 5)
    new = part(everything, "digits 0 to 4", everything.labels < 5)
    with tempfile.TemporaryDirectory() as folder:
        trained(old, arguments.first_steps, arguments.seed).save_pretrained(folder)
        curves = {name: curve(new, folder, kind, arguments) for name, kind in STARTS.items()}
    return rows(curves)


def part(data: MemorySource, name: str, chosen: np.ndarray) -> MemorySource:
    assert data.labels is not None
    return MemorySource(name, data.eva[chosen], data.clip[chosen], data.held_out[chosen], data.labels[chosen])


def trained(data: MemorySource, steps: int, seed: int) -> BLIP3oDiTModel:
    return train_recipe(data, truth_of(data), {}, steps=steps, points=(), seed=seed)[1]


def curve(data: MemorySource, folder: str, kind: str | None, asked: argparse.Namespace) -> dict[int, float]:
    """Step -> energy score of one run."""
    changes: dict[str, Any] = {}
    if kind is not None:
        changes = settings_of_model(Path(folder), {}) | {"init_from": folder, "init_statistics": kind}
    points = [point for point in POINTS if point < asked.steps] + [asked.steps]
    measured, _ = train_recipe(
        data, truth_of(data), changes, steps=asked.steps, points=points, seed=asked.seed
    )
    return {int(point["step"]): point["energy"] for point in measured}


def rows(curves: dict[str, dict[int, float]]) -> list[Row]:
    """One row a run: energy scores, and the first step with the one that from scratch is the last."""
    scratch = curves["from scratch"]
    wanted, found = list(scratch.values())[-1], []
    for name, points in curves.items():
        reached = next((step for step, score in points.items() if score <= wanted), None)
        scores = {f"step {step}": round(score, 4) for step, score in points.items()}
        found.append({"run": name, **scores, "as good as from scratch by step": reached or "-"})
    return found
