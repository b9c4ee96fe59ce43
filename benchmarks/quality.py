"""How good, how soon: recipes side by side on data of four kinds.

For each data set and seed: the paper's recipe and the default one, measured on held-out samples at several
steps with the weights that inference would use; the default recipe once more with a schedule of 200 steps;
each part of the recipe changed alone; then, with the trained model, quality against network calls, its
own and those of a student. R2 is that of the one-call estimate; the energy score is that of
four samples per condition. Ridge (as a sampler with a Gaussian residual) stands beside them.

Rows are appended to a file of JSON lines; `python -m benchmarks quality-table FILE` makes table and figure.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from benchmarks.quality_data import SETS, MemorySource, Modes
from blip3o_dit.data.dataset import Split
from blip3o_dit.evaluation.baselines import fit_baselines
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.evaluation.predictions import collect_predictions
from blip3o_dit.evaluation.reference import ReferenceSet, collect_reference, fit_probe
from blip3o_dit.evaluation.samplers import ModelSampler, Sampler
from blip3o_dit.evaluation.scores import score
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.training import run as training_run
from blip3o_dit.training.callbacks import CurvesCallback
from blip3o_dit.training.config import OPTIMIZERS, PAPER_RECIPE, TrainingConfig
from blip3o_dit.training.console import ConsoleCallback
from blip3o_dit.training.distillation import train_student
from blip3o_dit.training.distillation_config import DistillationConfig
from blip3o_dit.training.trainer import BLIP3oTrainer

Row = dict[str, Any]

# Changes to the default recipe; "paper" is BLIP3-o's own.
RECIPES: dict[str, dict[str, Any]] = {"paper": PAPER_RECIPE, "default": {}}

NOISE = {"source": "noise"}
VELOCITY, DATA = ({"prediction_type": name} for name in ("v_prediction", "sample"))
LOGIT_NORMAL = {"time_distribution": "logit_normal"}
SHIFT = {"time_shift": 0.0}  # sqrt(N d / 4096)

# What one part is worth: the default recipe with something changed.
ABLATIONS: dict[str, dict[str, Any]] = {
    "paper": PAPER_RECIPE,
    "noise, velocity": NOISE | VELOCITY,
    "noise, data": NOISE | DATA,
    "noise, velocity, logit-normal, shift": NOISE | VELOCITY | LOGIT_NORMAL | SHIFT,
    "noise, preconditioned": NOISE,
    "ridge, preconditioned": {"source": "ridge"},
    "ridge 3x3, preconditioned": {"source": "ridge_3x3"},
    "default, spread": {"source": "ridge_context_spread"},
    "default, velocity": VELOCITY,
    "default, data": DATA,
    "default, logit-normal": LOGIT_NORMAL,
    "default, shift": SHIFT,
    "default, cosine path": {"schedule_type": "cosine"},
    "default, no EMA": {"ema_decay": 0.0},
    # What makes a step quicker or smaller, and is not the same mathematics.
    "default, EMA every step": {"ema_every": 1},
    "default, bf16": {"bf16": True},
    "default, bf16, bfloat16 stream": {"bf16": True, "residual": "bfloat16"},
    "default, memory split": {"memory": "split"},
    "default, memory split, bfloat16 moments": {"memory": "split", "moments": "bfloat16"},
    "default, memory low": {"memory": "low"},
}

SIZES = {"model_dim": 128, "num_layers": 3, "num_heads": 4}
# Sets of few tokens get more samples a step.
BATCH_SIZES = {"modes": 128}
CALLS = {"euler": (1, 2, 4, 8, 50), "midpoint": (2, 4, 8, 50), "heun": (4, 8, 50)}
# From the benchmark's own up, and how often a run is measured for steps and seconds to a quality.
RATES, EVERY = (1.5e-3, 4.5e-3, 1.35e-2), 50
STUDENT_CALLS = (1, 2, 4, 8)
DISTILLATION_STEPS = 300
MEASURED = EvaluationConfig(batch_size=128, draw_samples=128, bootstrap=20, half_samples=2)
HELD_OUT = 256
RIDGES = ("ridge", "ridge 3x3")


def no_progress(items: Iterable[Any], name: str) -> Iterable[Any]:
    return items


class Measure(TrainerCallback):
    """Measures at some steps with the weights that inference would use; the clock stops meanwhile.

    It counts this process's processor time, which other work on the machine does not add to.
    """

    def __init__(self, trainer: BLIP3oTrainer, truth: ReferenceSet, steps: Iterable[int], calls: int) -> None:
        self.trainer, self.truth, self.steps, self.calls = trainer, truth, set(steps), calls
        self.points: list[dict[str, float]] = []
        self.paused = 0.0
        self.started = time.process_time()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in self.steps:
            return
        elapsed = time.process_time() - self.started - self.paused
        ema, model = self.trainer.ema, self.trainer.unwrapped_model
        with ema.applied(model) if ema is not None else nullcontext():
            model.eval()
            found = measure_model(model, self.truth, calls=self.calls)
            model.train()
        self.points.append({"step": state.global_step, "seconds": elapsed, **found})
        self.paused = time.process_time() - self.started - elapsed


def measure_model(
    model: BLIP3oDiTModel, truth: ReferenceSet, *, calls: int, solver: str = "heun"
) -> dict[str, float]:
    return measure(ModelSampler(model).with_calls(solver, calls), truth)


def measure(method: Sampler, truth: ReferenceSet) -> dict[str, float]:
    """R2 of the best guess, energy scores, Frechet distance of tokens, spread over error, how often the own
    sample is found first, probe accuracy."""
    found = score(collect_predictions(method, truth, no_progress), truth)["metrics"]
    picked = {
        "energy": found["conditional"]["energy_score"]["value"],
        "token_energy": found["conditional"]["token_energy_score"]["value"],
        "spread_error": found["conditional"]["spread_error_ratio"]["value"],
        "frechet": found["tokens"]["frechet"]["value"],
        "recall_at_1": found["use"]["recall_at_1"]["value"],
    }
    if "best_guess" in found:
        picked["r2"] = found["best_guess"]["r2"]["value"]
    if "probe_accuracy" in found["use"]:
        picked["probe"] = found["use"]["probe_accuracy"]["value"]
    return picked


def truth_of(data: MemorySource) -> ReferenceSet:
    """The measured held-out samples, in units of the training tokens' deviations."""
    train = np.flatnonzero(~data.held_out)
    clip = data.fetch(train)[1]
    held_out = np.flatnonzero(data.held_out)[:HELD_OUT]
    truth = collect_reference(
        data,
        held_out,
        mean=clip.mean(dim=(0, 1)),
        std=clip.std(dim=(0, 1), correction=0),
        config=MEASURED,
        progress=no_progress,
    )
    fit_probe(truth, train, no_progress)
    return truth


def ridges(data: MemorySource, truth: ReferenceSet) -> dict[str, dict[str, float]]:
    """Both ridges as samplers, measured like a model."""
    train = np.flatnonzero(~data.held_out)
    methods = fit_baselines(
        data, train, std=truth.std, max_samples=10_000, seed=0, progress=no_progress, groups=data.groups
    )
    return {method.name: measure(method, truth) for method in methods if method.name in RIDGES}


def train_recipe(
    data: MemorySource,
    truth: ReferenceSet,
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
            trainer.ema.copy_into(trainer.unwrapped_model)
        return callback.points, trainer.unwrapped_model.eval()


def _trainer(data: MemorySource, config: TrainingConfig) -> BLIP3oTrainer:
    """The trainer of a run, on this benchmark's own split and silent."""
    logging.getLogger("blip3o_dit").setLevel(logging.WARNING)
    held_out = np.flatnonzero(data.held_out)[:64]
    split = Split(train=np.flatnonzero(~data.held_out), eval=held_out, groups=data.groups)
    trainer = training_run.build_trainer(data, config, split=split)
    for callback in (ConsoleCallback, CurvesCallback):
        trainer.remove_callback(callback)
    trainer.args.eval_strategy = "no"
    return trainer


def mode_coverage(
    model: BLIP3oDiTModel, data: Modes, *, calls: int, conditions: int = 40
) -> dict[str, float]:
    """Of 200 samples of each of 40 conditions: modes found, largest relative error of a frequency."""
    chosen = np.flatnonzero(data.held_out)[:conditions]
    eva = data.fetch(chosen)[0]
    drawn = []
    for sample_number in range(200):
        clip = ModelSampler(model).with_calls("euler", calls).sample(eva, chosen.tolist(), sample_number)
        drawn.append(data.mode_of(eva, clip))
    found = torch.stack(drawn)  # [200, conditions]
    shares = torch.stack([(found == mode).double().mean(dim=0) for mode in range(4)])  # [4, conditions]
    weights = torch.tensor(data.weights, dtype=torch.float64)
    return {
        "covered": float((shares > 0).double().mean()),
        "worst_frequency_error": float((shares.mean(dim=1) / weights - 1).abs().max()),
        "between_modes": float((found == -1).double().mean()),
    }


def student_of(
    teacher: BLIP3oDiTModel, data: MemorySource, train: np.ndarray, batch_size: int
) -> BLIP3oDiTModel:
    """What `blip3o-dit distill` teaches."""
    config = DistillationConfig(
        steps=1, train_steps=DISTILLATION_STEPS, teacher_steps=8, batch_size=batch_size
    )
    with tempfile.TemporaryDirectory() as folder:
        run = TrainingConfig(output_dir=folder, device="cpu")
        trainer = train_student(teacher, data, train, config, run)
    assert trainer.ema is not None
    trainer.ema.copy_into(trainer.unwrapped_model)
    return trainer.unwrapped_model.eval()


def few_calls(
    model: BLIP3oDiTModel, data: MemorySource, truth: ReferenceSet, batch_size: int
) -> Iterator[Row]:
    """Quality against network calls for each solver, then that of a student."""
    for solver, counts in CALLS.items():
        for calls in counts:
            found = measure_model(model, truth, calls=calls, solver=solver)
            yield {"kind": "calls", "recipe": solver, "calls": calls, **found}
    train = np.flatnonzero(~data.held_out)
    started = time.monotonic()
    student = student_of(model, data, train, batch_size)
    seconds = time.monotonic() - started
    for calls in STUDENT_CALLS:
        row = {"kind": "student", "recipe": "any steps", "calls": calls, "seconds": seconds}
        row |= measure_model(student, truth, calls=calls, solver="euler")
        yield row | (mode_coverage(student, data, calls=calls) if isinstance(data, Modes) else {})


def rows_of(set_name: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """Everything that is measured on one data set."""
    data = SETS[set_name]()
    truth = truth_of(data)
    batch_size = BATCH_SIZES.get(set_name, 32)
    more = {"batch_size": batch_size}
    for name, figures in ridges(data, truth).items():
        yield {"kind": "ridge", "recipe": name, "seed": 0, **figures}
    first, short = arguments.seeds[0], arguments.short
    short_runs = [("default", {}, seed) for seed in arguments.seeds]
    for name, changes, seed in short_runs + [(name, ABLATIONS[name], first) for name in arguments.ablations]:
        points, _ = train_recipe(data, truth, changes | more, steps=short, points=[short], seed=seed)
        yield {"kind": "short", "recipe": name, "seed": seed, **points[-1]}
    for seed in arguments.seeds:
        for name in arguments.recipes:
            points, model = train_recipe(
                data, truth, RECIPES[name] | more, steps=arguments.steps, points=arguments.points, seed=seed
            )
            yield from ({"kind": "curve", "recipe": name, "seed": seed, **point} for point in points)
            if isinstance(data, Modes):
                found = mode_coverage(model, data, calls=50)
                yield {"kind": "modes", "recipe": name, "seed": seed, "calls": 50, **found}
            if name == "default" and seed == first and not arguments.no_few_calls:
                yield from ({"seed": seed, **row} for row in few_calls(model, data, truth, batch_size))


def optimizers_of(set_name: str, arguments: argparse.Namespace) -> Iterator[Row]:
    """The default recipe by each optimizer at each learning rate, in short runs that are measured often."""
    data = SETS[set_name]()
    truth, batch_size, last = truth_of(data), BATCH_SIZES.get(set_name, 32), arguments.short
    for seed, rate, name in product(arguments.seeds, arguments.rates, OPTIMIZERS):
        changes = {"optimizer": name, "learning_rate": rate, "batch_size": batch_size}
        points, _ = train_recipe(
            data, truth, changes, steps=last, points=range(EVERY, last + 1, EVERY), seed=seed
        )
        own = {"kind": "optimizer", "recipe": name, "learning_rate": rate, "seed": seed, "steps": last}
        yield from (own | point for point in points)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality", description=__doc__)
    parser.add_argument("--sets", nargs="+", choices=tuple(SETS), default=list(SETS))
    parser.add_argument("--recipes", nargs="*", choices=tuple(RECIPES), default=list(RECIPES))
    parser.add_argument("--ablations", nargs="*", choices=tuple(ABLATIONS), default=list(ABLATIONS))
    parser.add_argument("--no_few_calls", action="store_true", help="leave out solvers and students")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--short", type=int, default=200, help="steps of short runs")
    parser.add_argument("--points", type=int, nargs="+", default=[50, 100, 200, 1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--output", type=Path, default=Path("quality.jsonl"), help="JSON lines, appended")
    parser.add_argument("--optimizers", action="store_true", help="short runs of AdamW and Muon, no others")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="their learning rates")
    arguments = parser.parse_args(words)
    rows = optimizers_of if arguments.optimizers else rows_of
    for set_name in arguments.sets:
        for row in rows(set_name, arguments):
            say({"set": set_name, **row}, arguments.output)
    return 0


def say(row: Row, output: Path) -> None:
    line = json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    print(line, flush=True)
    with open(output, "a") as file:
        file.write(line + "\n")
