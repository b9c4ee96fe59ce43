"""`--memory low` beside float32 AdamW: the loss curves of one small network on the linear-Gaussian set."""

from __future__ import annotations

import argparse
import tempfile

from benchmarks.linear_gaussian import LinearGaussian
from benchmarks.measure import Row
from blip3o_dit.training.config import LOW_MEMORY_DEFAULTS, TrainingConfig
from blip3o_dit.training.run import train_on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=1500)


def run(arguments: argparse.Namespace) -> list[Row]:
    exact, low = (_losses(mode, arguments.steps) for mode in ("default", "low"))
    return [
        {
            "step": step,
            "float32": exact[step],
            "low": low[step],
            "low / float32 - 1": low[step] / exact[step] - 1,
        }
        for step in exact
    ]


def _losses(mode: str, steps: int) -> dict[int, float]:
    """Mean training loss of every tenth of the run, by its last step."""
    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(
            output_dir=folder,
            model_dim=64,
            num_layers=2,
            num_heads=4,
            max_steps=steps,
            batch_size=64,
            learning_rate=2e-3,
            warmup_steps=50,
            cfg_dropout=0.0,
            eval_split=0.0,
            source="noise",
            logging_steps=max(1, steps // 10),
            save_steps=steps,
            seed=1,
            device="cpu",
            memory=mode,
            **(LOW_MEMORY_DEFAULTS if mode == "low" else {"ema_decay": 0.0}),
        )
        trainer = train_on(LinearGaussian(num_tokens=16), config)
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
