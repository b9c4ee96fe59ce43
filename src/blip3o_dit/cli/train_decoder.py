"""blip3o-dit train-decoder: a small network that turns the target tokens of a store into pictures."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from blip3o_dit.cli.arguments import add_flags, given_settings
from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.decoder.config import DecoderTrainingConfig
from blip3o_dit.utils.progress import working

EXAMPLES = (
    "blip3o-dit train-decoder embeddings/store images --output_dir checkpoints/decoder",
    "blip3o-dit train-decoder embeddings/store images --output_dir checkpoints/decoder --picture_size 128",
)

logger = logging.getLogger(__name__)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("embeddings", type=Path, help="embedding store or documented pickle")
    parser.add_argument("images", help="the pictures that it was made from, as for extract")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="folder of the decoder")
    add_flags(parser, DecoderTrainingConfig)
    parser.add_argument("--overwrite", action="store_true", help="replace a decoder that is there")


def run(arguments: argparse.Namespace) -> None:
    """Train, save, and print what was measured as JSON."""
    config = DecoderTrainingConfig(**given_settings(arguments, DecoderTrainingConfig))
    with working("loading torch and transformers"):
        from blip3o_dit.decoder.training import train_decoder
        from blip3o_dit.utils.distributed import check_alone

    check_alone("train-decoder")
    found = train_decoder(
        arguments.embeddings, arguments.images, arguments.output_dir, config, overwrite=arguments.overwrite
    )
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    logger.info(
        "%s: PSNR of held-out pictures %.1f dB; ridge %.1f, mean picture %.1f",
        arguments.output_dir,
        *(found[method]["psnr"] for method in ("decoder", "ridge", "mean picture")),
    )
