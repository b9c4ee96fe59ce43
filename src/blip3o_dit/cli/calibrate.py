"""blip3o-dit calibrate: how much noise a trained model should sample from, written into its folder."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from blip3o_dit.cli.arguments import add_weights
from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.utils.progress import working

EXAMPLES = (
    "blip3o-dit calibrate checkpoints/run embeddings/store",
    "blip3o-dit calibrate checkpoints/old embeddings/store --split eval",
)

logger = logging.getLogger(__name__)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("model", type=Path, help="output folder of a training run, or a checkpoint")
    parser.add_argument("embeddings", type=Path, help="embedding store or documented pickle")
    parser.add_argument(
        "--split",
        choices=("held_back", "eval", "all"),
        default="held_back",
        help="samples to fit to: those that training held back, those that evaluations measure, or all of "
        "embeddings that the model was not trained on (default: held_back)",
    )
    parser.add_argument("--num_samples", type=int, default=256, help="most samples to fit to (default: 256)")
    parser.add_argument("--batch_size", type=int, default=32, help="samples at a time (default: 32)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the samples and of the noise (default: 0)"
    )
    add_weights(parser)
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)"
    )


def run(arguments: argparse.Namespace) -> None:
    with working("loading torch and transformers"):
        from blip3o_dit.model.loading import check_is_model
        from blip3o_dit.training.calibration import calibrate_model
        from blip3o_dit.training.output_folder import output_folder
        from blip3o_dit.utils.distributed import check_alone

    check_alone("calibrate")
    settings = vars(arguments)
    model = settings["model"]
    check_is_model(model)  # before it is held
    with output_folder(model, "a calibration"):
        names = ("split", "num_samples", "batch_size", "seed", "weights", "device")
        found = calibrate_model(model, arguments.embeddings, **{name: settings[name] for name in names})
    for line in found.sentences():
        logger.info("%s", line)
    logger.info("%s: its config.json has the scale", model)
