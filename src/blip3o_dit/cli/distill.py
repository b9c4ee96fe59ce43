"""blip3o-dit distill: a student that needs a few network calls, from a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path

from blip3o_dit.flow.config import SOLVER_NAMES

DESCRIPTION = "Distil a trained model into one that needs a few network calls."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="the teacher: output folder of a training run")
    parser.add_argument("embeddings", type=Path, help="embedding store or documented pickle it learned from")
    parser.add_argument("--steps", type=int, required=True, help="network calls of the student: 1, 2, 4, ...")
    parser.add_argument("--output_dir", type=Path, help="default: the teacher's name with -N-steps")
    parser.add_argument("--train_steps", type=int, default=1000, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--teacher_solver", choices=SOLVER_NAMES, default="heun")
    parser.add_argument("--teacher_steps", type=int, default=8, help="steps of a whole teacher path")
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace a model that is there")


def run(arguments: argparse.Namespace) -> None:
    from blip3o_dit.training.distillation import DistillationConfig, distill
    from blip3o_dit.utils.distributed import pick_device

    model = arguments.model
    output = arguments.output_dir or model.with_name(f"{model.resolve().name}-{arguments.steps}-steps")
    config = DistillationConfig(
        steps=arguments.steps,
        train_steps=arguments.train_steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        teacher_solver=arguments.teacher_solver,
        teacher_steps=arguments.teacher_steps,
        ema_decay=arguments.ema_decay,
        seed=arguments.seed,
        device=str(pick_device(arguments.device)),
    )
    distill(model, arguments.embeddings, output, config, overwrite=arguments.overwrite_output_dir)
