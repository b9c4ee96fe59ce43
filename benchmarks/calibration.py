"""What calibration changes: samplers with and without the scale that was fitted, after short and long runs.

For each data set, network and length the default recipe is trained as the command trains it: one in 16 of
the training samples is held back, by which the averaged weights and the scale of the noise are chosen. Then
the held-out samples of `quality.py` are measured with the scale and without, and with guidance if asked for.
Rows are appended to a file of JSON lines; `--table FILE` prints it as a table.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality import BATCH_SIZES, Row, measure, say, truth_of
from benchmarks.quality_data import SETS, MemorySource
from benchmarks.quality_table import read
from blip3o_dit.data.dataset import LEAST_HELD_BACK, MOST_HELD_BACK, PART_HELD_BACK, Split, choose_samples
from blip3o_dit.evaluation.reference import ReferenceSet
from blip3o_dit.evaluation.samplers import ModelSampler
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.calibration import Calibration
from blip3o_dit.training.config import TrainingConfig
from blip3o_dit.training.console import ConsoleCallback
from blip3o_dit.training.finishing import finish
from blip3o_dit.training.run import build_trainer

NETWORKS = {
    "128 wide, 3 layers": {"model_dim": 128, "num_layers": 3, "num_heads": 4},
    "64 wide, 2 layers": {"model_dim": 64, "num_layers": 2, "num_heads": 2},
}
STEPS = (200, 1000)


def split_of(data: MemorySource, seed: int, at_most: int | None = None) -> Split:
    """The benchmark's own held-out samples, and of at most so many others what the command holds back."""
    train = np.flatnonzero(~data.held_out)
    order = choose_samples(train, max_samples=at_most or len(train), seed=seed)
    count = min(len(order) // PART_HELD_BACK, MOST_HELD_BACK)
    assert count >= LEAST_HELD_BACK
    held_out = np.flatnonzero(data.held_out)[:64]
    return Split(train=np.sort(order[count:]), eval=held_out, held_back=np.sort(order[:count]))


def trained(
    data: MemorySource, split: Split, network: dict[str, int], steps: int, seed: int, folder: str
) -> tuple[BLIP3oDiTModel, Calibration]:
    """The default recipe, with as many evaluations and checkpoints as the command makes."""
    config = TrainingConfig(
        **network,
        output_dir=folder,
        max_steps=steps,
        batch_size=BATCH_SIZES.get(data.name, 32),
        learning_rate=1.5e-3,
        eval_split=0.2,
        eval_samples=0,
        eval_loss_samples=1,
        seed=seed,
        device="cpu",
    )
    trainer = build_trainer(data, config, split=split)
    trainer.remove_callback(ConsoleCallback)
    trainer.train()
    finish(trainer)
    assert trainer.ema is not None and trainer.calibration is not None
    trainer.ema.copy_into(trainer.unwrapped_model)
    return trainer.unwrapped_model.eval(), trainer.calibration


def rows_of(
    data: MemorySource,
    truth: ReferenceSet,
    split: Split,
    name: str,
    steps: int,
    seed: int,
    guidance: Sequence[float],
) -> Iterator[Row]:
    """Measured without the scale, with it, and with it and guidance."""
    with tempfile.TemporaryDirectory() as folder:
        model, found = trained(data, split, NETWORKS[name], steps, seed, folder)
    shared: Row = {"samples": len(split.train), "network": name, "steps": steps, "seed": seed}
    shared |= {"weights_of": found.weights_of, "energy_scores": found.energy_scores}
    ways: list[dict[str, Any]] = [{"noise_scale": 1.0}, {"noise_scale": found.noise_scale}]
    ways += [{"noise_scale": found.noise_scale, "guidance_scale": scale} for scale in guidance]
    for way in ways:
        yield {"kind": "calibration", **shared, **way, **measure_with(model, truth, way)}


def measure_with(model: BLIP3oDiTModel, truth: ReferenceSet, way: dict[str, Any]) -> dict[str, float]:
    return measure(ModelSampler(model, **way).with_calls("midpoint", 16), truth)


def table(rows: Sequence[Row]) -> str:
    """One line a run: without the scale, and with it."""
    lines = [
        "| data | network | steps | scale | spread / error: without | with | energy score: without | with |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = [row for row in rows if row["kind"] == "calibration" and "guidance_scale" not in row]
    for before, after in zip(plain[::2], plain[1::2], strict=True):
        figures = [
            f"{row[name]:.{digits}f}"
            for name, digits in (("spread_error", 2), ("energy", 4))
            for row in (before, after)
        ]
        about = [str(after[name]) for name in ("set", "network", "steps", "noise_scale")]
        lines.append(f"| {' | '.join(about + figures)} |")
    return "\n".join(lines)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks calibration", description=__doc__)
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=list(SETS))
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--train_samples", type=int, help="only so many training samples (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--guidance", type=float, nargs="*", default=[], help="guidance scales to measure as well"
    )
    parser.add_argument("--output", type=Path, default=Path("calibration.jsonl"), help="JSON lines, appended")
    parser.add_argument("--table", type=Path, help="only print the table of these rows")
    arguments = parser.parse_args(words)
    if arguments.table:
        print(table(read(arguments.table)))
        return 0
    for set_name in arguments.sets:
        data = SETS[set_name]()
        truth = truth_of(data)
        for name in arguments.networks:
            for steps in arguments.steps:
                for seed in arguments.seeds:
                    split = split_of(data, seed, arguments.train_samples)
                    for row in rows_of(data, truth, split, name, steps, seed, arguments.guidance):
                        say({"set": set_name, **row}, arguments.output)
    return 0
