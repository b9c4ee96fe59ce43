"""blip3o-dit decode: target tokens, generated or true, as pictures by a trained decoder."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.utils.progress import working

EXAMPLES = ("blip3o-dit decode checkpoints/decoder results/generated pictures",)

logger = logging.getLogger(__name__)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument(
        "decoder", type=Path, help="decoder (train-decoder): a folder, or owner/name on the hub"
    )
    parser.add_argument("embeddings", type=Path, help="what generate wrote, or any store, pickle or arrays")
    parser.add_argument(
        "output", type=Path, help="new folder for pictures, one PNG a sample, named by its key"
    )
    parser.add_argument(
        "--num_samples",
        type=int,
        metavar="N",
        help="only so many, chosen at random (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the samples (default: 0)")
    parser.add_argument(
        "--batch_size", type=int, default=64, metavar="N", help="samples at a time (default: 64)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder of PNG files")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute (default: auto)"
    )


def run(arguments: argparse.Namespace) -> None:
    with working("loading torch and transformers"):
        from blip3o_dit.data.embeddings import open_embeddings
        from blip3o_dit.decoder.decode import decode_embeddings
        from blip3o_dit.decoder.folder import load_decoder
        from blip3o_dit.utils.distributed import check_alone, pick_device
        from blip3o_dit.utils.validation import check_integer

    check_alone("decode")
    for name in ("num_samples", "batch_size"):
        if getattr(arguments, name) is not None:
            check_integer(name, getattr(arguments, name), 1)
    decoder = load_decoder(arguments.decoder, pick_device(arguments.device))
    count = decode_embeddings(
        decoder,
        open_embeddings(arguments.embeddings),
        arguments.output,
        num_samples=arguments.num_samples,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        overwrite=arguments.overwrite,
    )
    logger.info("%s: %d pictures of %d pixels", arguments.output, count, decoder.config.picture_size)
