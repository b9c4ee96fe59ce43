"""python -m benchmarks.quality: how good, how soon. Recipes side by side on data of four kinds.

For each data set, recipe and seed: one training, measured on held-out samples at several steps with the
weights that inference would use. R2 is that of the one-call estimate; the energy score is that of four
samples per condition. Ridge (as a sampler with a Gaussian residual) stands beside them.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from benchmarks.quality_data import SETS, MemorySource, Modes
from blip3o_dit.config import PAPER_RECIPE, TrainingConfig
from blip3o_dit.data.dataset import Split
from blip3o_dit.evaluation import engine
from blip3o_dit.evaluation.baselines import (
    NeighbourhoodRidge,
    ResidualGaussian,
    TokenRidge,
    split_validation,
)
from blip3o_dit.evaluation.engine import EvaluationSettings, Truth
from blip3o_dit.evaluation.methods import BaselineMethod, Method, ModelMethod
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training import run as training_run
from blip3o_dit.training.callbacks import ConsoleCallback
from blip3o_dit.training.trainer import BLIP3oTrainer

# Changes to the default recipe; "paper" is BLIP3-o's own.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": PAPER_RECIPE,
    "paper, standardised": PAPER_RECIPE | {"standardize": True, "ema_decay": 0.999},
    "default": {},
}

SIZES = {"model_dim": 128, "num_layers": 3, "num_heads": 4}
MEASURED = EvaluationSettings(batch_size=128, draw_samples=128, bootstrap=20, half_samples=2)
HELD_OUT = 256


def no_track(items: Iterable[Any], name: str) -> Iterable[Any]:
    return items


class Measure(TrainerCallback):
    """Measures at some steps with the weights that inference would use; the clock stops meanwhile."""

    def __init__(self, trainer: BLIP3oTrainer, truth: Truth, steps: Iterable[int], calls: int) -> None:
        self.trainer, self.truth, self.steps, self.calls = trainer, truth, set(steps), calls
        self.points: list[dict[str, float]] = []
        self.paused = 0.0
        self.started = time.monotonic()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in self.steps:
            return
        elapsed = time.monotonic() - self.started - self.paused
        ema, model = self.trainer.ema, self.trainer.dit
        with ema.applied(model) if ema is not None else nullcontext():
            model.eval()
            found = measure_model(model, self.truth, calls=self.calls)
            model.train()
        self.points.append({"step": state.global_step, "seconds": elapsed, **found})
        self.paused = time.monotonic() - self.started - elapsed


def measure_model(
    model: BLIP3oDiTModel, truth: Truth, *, calls: int, solver: str = "heun"
) -> dict[str, float]:
    return measure(ModelMethod(model).with_calls(solver, calls), truth)


def measure(method: Method, truth: Truth) -> dict[str, float]:
    """R2 of the best guess, energy scores, Frechet distance of tokens, spread over error, probe accuracy."""
    found = engine.describe(engine.collect_answers(method, truth, no_track), truth)["metrics"]
    picked = {
        "r2": found.get("best_guess", {}).get("r2", {}).get("value", float("nan")),
        "energy": found["conditional"]["energy_score"]["value"],
        "token_energy": found["conditional"]["token_energy_score"]["value"],
        "spread_error": found["conditional"]["spread_error_ratio"]["value"],
        "frechet": found["tokens"]["frechet"]["value"],
    }
    if "probe_accuracy" in found["use"]:
        picked["probe"] = found["use"]["probe_accuracy"]["value"]
    return picked


def truth_of(data: MemorySource) -> Truth:
    """The measured held-out samples, in units of the training tokens' deviations."""
    train = np.flatnonzero(~data.held_out)
    clip = data.fetch(train)[1]
    held_out = np.flatnonzero(data.held_out)[:HELD_OUT]
    truth = engine.gather_truth(
        data,
        held_out,
        mean=clip.mean(dim=(0, 1)),
        std=clip.std(dim=(0, 1), correction=0),
        settings=MEASURED,
        track=no_track,
    )
    engine.fit_probe(truth, train, no_track)
    return truth


def ridges(data: MemorySource, truth: Truth) -> dict[str, dict[str, float]]:
    """Both ridges as samplers, measured like a model."""
    train = np.flatnonzero(~data.held_out)
    fit, validation = split_validation(train, most=10_000, seed=0)
    found = {}
    for name, kind in (("ridge", TokenRidge), ("ridge 3x3", NeighbourhoodRidge)):
        final, before = kind.fit_twice(data, fit, validation=validation)
        residual = ResidualGaussian.fit(before, data, validation, scale=truth.std)
        found[name] = measure(BaselineMethod(name, "", final, residual), truth)
    return found


def train_recipe(
    data: MemorySource,
    truth: Truth,
    changes: dict[str, Any],
    *,
    steps: int,
    points: Iterable[int],
    seed: int = 0,
    calls: int = 16,
) -> tuple[list[dict[str, float]], BLIP3oDiTModel]:
    """Train one recipe and measure it at `points`; returns the points and the model inference would use."""
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {
            **SIZES,
            "output_dir": folder,
            "max_steps": steps,
            "batch_size": 32,
            "learning_rate": 1.5e-3,
            "warmup_steps": min(50, max(1, steps // 10)),
            "logging_steps": max(1, steps // 4),
            "save_steps": steps + 1,
            "eval_split": 0.2,
            "seed": seed,
            "device": "cpu",
        }
        trainer = _trainer(data, TrainingConfig(**(settings | changes)))
        callback = Measure(trainer, truth, points, calls)
        trainer.add_callback(callback)
        trainer.train()
        if trainer.ema is not None:
            for name, parameter in trainer.dit.named_parameters():
                parameter.data.copy_(trainer.ema.weights[name])
        return callback.points, trainer.dit.eval()


def _trainer(data: MemorySource, config: TrainingConfig) -> BLIP3oTrainer:
    """The trainer of a run, on this benchmark's own split and silent."""
    logging.getLogger("blip3o_dit").setLevel(logging.WARNING)
    split = Split(train=np.flatnonzero(~data.held_out), eval=np.flatnonzero(data.held_out)[:64])
    trainer = training_run.build_trainer(data, config, split=split)
    trainer.remove_callback(ConsoleCallback)
    trainer.args.eval_strategy = "no"
    return trainer


def mode_coverage(
    model: BLIP3oDiTModel, data: Modes, *, calls: int, conditions: int = 40
) -> dict[str, float]:
    """Of 200 samples of each of 40 conditions: modes found, largest relative error of a frequency."""
    chosen = np.flatnonzero(data.held_out)[:conditions]
    eva = data.fetch(chosen)[0]
    drawn = []
    for draw in range(200):
        clip = ModelMethod(model).with_calls("euler", calls).sample(eva, chosen.tolist(), draw)
        drawn.append(data.mode_of(eva, clip))
    found = torch.stack(drawn)  # [200, conditions]
    shares = torch.stack([(found == mode).double().mean(dim=0) for mode in range(4)])  # [4, conditions]
    weights = torch.tensor(data.weights, dtype=torch.float64)
    return {
        "covered": float((shares > 0).double().mean()),
        "worst_frequency_error": float((shares.mean(dim=1) / weights - 1).abs().max()),
        "between_modes": float((found == -1).double().mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=list(SETS))
    parser.add_argument("--recipes", nargs="+", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--points", type=int, nargs="+", default=[50, 100, 200, 400, 700, 1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--changes", type=json.loads, help="JSON: settings of a further recipe, 'given'")
    parser.add_argument("--output", type=Path, help="JSON lines, appended")
    arguments = parser.parse_args()
    recipes = {name: RECIPES[name] for name in arguments.recipes}
    if arguments.changes is not None:
        recipes = {json.dumps(arguments.changes): arguments.changes}
    for set_name in arguments.sets:
        data = SETS[set_name]()
        truth = truth_of(data)
        for name, figures in ridges(data, truth).items():
            _say({"set": set_name, "recipe": name, "seed": 0, "step": 0, **figures}, arguments.output)
        for seed in arguments.seeds:
            for name, changes in recipes.items():
                points, model = train_recipe(
                    data, truth, changes, steps=arguments.steps, points=arguments.points, seed=seed
                )
                for point in points:
                    _say({"set": set_name, "recipe": name, "seed": seed, **point}, arguments.output)
                if isinstance(data, Modes):
                    coverage = mode_coverage(model, data, calls=50)
                    _say({"set": set_name, "recipe": name, "seed": seed, **coverage}, arguments.output)


def _say(row: dict[str, Any], output: Path | None) -> None:
    line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    print(line, flush=True)
    if output is not None:
        with open(output, "a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
