"""blip3o-dit distill: a student that needs a few network calls, from a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path

from blip3o_dit.cli.arguments import add_flags, add_push, given_settings, pushed
from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.training.distillation_config import DistillationConfig
from blip3o_dit.utils.progress import working

EXAMPLES = ("blip3o-dit distill checkpoints/run embeddings/store --steps 2",)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("model", help="the teacher: folder of a training run, or owner/name on the hub")
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
    add_push(parser.group("hub"))


def run(arguments: argparse.Namespace) -> None:
    with working("loading torch and transformers"):
        from blip3o_dit.training.distillation import distill
        from blip3o_dit.utils.distributed import pick_device
        from blip3o_dit.utils.hub import model_folder

    model = model_folder(arguments.model)
    output = arguments.output_dir or _beside(arguments.model, model, f"-{arguments.steps}-steps")
    settings = given_settings(arguments, DistillationConfig) | {"device": str(pick_device(arguments.device))}
    config = DistillationConfig(**settings)
    with pushed(arguments, output):
        distill(model, arguments.embeddings, output, config, overwrite=arguments.overwrite)


def _beside(named: str, model: Path, ending: str) -> Path:
    """Where a student is made by default: beside its teacher, or here for one of the hub."""
    if model != Path(named):
        return Path(Path(named.partition("@")[0]).name + ending)
    return model.absolute().parent / (model.resolve().name + ending)
