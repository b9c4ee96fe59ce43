"""blip3o-dit export: a trained model as one file that torch or onnxruntime runs without this package."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from blip3o_dit.cli.arguments import add_flags, add_weights, given_settings
from blip3o_dit.cli.generate import GenerationConfig
from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.flow.config import SOLVER_NAMES

logger = logging.getLogger(__name__)

EXAMPLES = (
    "blip3o-dit export checkpoints/run model.onnx",
    "blip3o-dit export checkpoints/run-1-step model.pt2",
)
# Flags of `generate` that belong to samples, not to a model.
OF_SAMPLES = ("split", "num_samples", "seed", "pooled", "batch_size")


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("model", type=Path, help="output folder of a training run, or a checkpoint")
    parser.add_argument("output", type=Path, help="file to write, .pt2 (torch) or .onnx")
    add_flags(
        parser,
        GenerationConfig,
        leave_out=OF_SAMPLES,
        solver={"choices": SOLVER_NAMES},
        guidance_interval={"metavar": ("LOW", "HIGH")},
    )
    add_weights(parser)


def run(arguments: argparse.Namespace) -> None:
    from blip3o_dit.inference.export_model import export_model

    given = given_settings(arguments, GenerationConfig)
    logger.info("%s: tracing the model; every step is written out", arguments.output)
    about = export_model(arguments.model, arguments.output, weights=arguments.weights, **given)
    sampling = about["sampling"]
    logger.info(
        "%s: %d steps of %s, %d MB",
        arguments.output,
        sampling["num_inference_steps"],
        sampling["solver"],
        arguments.output.stat().st_size / 1e6,
    )
