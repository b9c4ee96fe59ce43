"""How close training comes to a known best answer, for each prediction type."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.linear_gaussian import train_and_compare
from benchmarks.measure import Row
from blip3o_dit.flow.config import PREDICTION_TYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of each training")


def run(arguments: argparse.Namespace) -> list[Row]:
    rows = []
    for prediction_type in PREDICTION_TYPES:
        with tempfile.TemporaryDirectory() as folder:
            found = train_and_compare(Path(folder), prediction_type=prediction_type, steps=arguments.steps)
        rows.append({"prediction type": prediction_type, **asdict(found)})
    return rows
