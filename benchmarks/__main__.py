"""python -m benchmarks: how close training comes to a known best answer, for each prediction type."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.linear_gaussian import train_and_compare
from blip3o_dit.config import PREDICTION_TYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of each training")
    steps = parser.parse_args().steps
    rows = {}
    for prediction_type in PREDICTION_TYPES:
        with tempfile.TemporaryDirectory() as folder:
            rows[prediction_type] = asdict(
                train_and_compare(Path(folder), prediction_type=prediction_type, steps=steps)
            )
    columns = list(next(iter(rows.values())))
    print("| prediction type | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{values[column]:.4g}" for column in columns) + " |")


if __name__ == "__main__":
    main()
