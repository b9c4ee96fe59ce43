"""blip3o-dit distill: a student that needs a few network calls, from a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path

from blip3o_dit.cli.arguments import add_flags, given_settings
from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.training.distillation_config import DistillationConfig
from blip3o_dit.utils.progress import working

EXAMPLES = ("blip3o-dit distill checkpoints/run embeddings/store --steps 2",)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("model", type=Path, help="the teacher: output folder of a training run")
    parser.add_argument("embeddings", type=Path, help="embedding store or documented pickle it learned from")
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="folder of the student, where one that was stopped is continued (default: the teacher's name "
        "with -N-steps)",
    )
    add_flags(parser, DistillationConfig)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to train")
    parser.add_argument("--overwrite", action="store_true", help="replace a model or an unfinished run there")
    parser.add_former_name("overwrite_output_dir", "overwrite")


def run(arguments: argparse.Namespace) -> None:
    with working("loading torch and transformers"):
        from blip3o_dit.training.distillation import distill
        from blip3o_dit.utils.distributed import pick_device

    model = arguments.model
    default = model.absolute().parent / f"{model.resolve().name}-{arguments.steps}-steps"
    output = arguments.output_dir or default
    settings = given_settings(arguments, DistillationConfig) | {"device": str(pick_device(arguments.device))}
    config = DistillationConfig(**settings)
    distill(model, arguments.embeddings, output, config, overwrite=arguments.overwrite)
