"""blip3o-dit export-embeddings: a store's samples in a format of others."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from blip3o_dit.cli.parser import CommandParser

logger = logging.getLogger(__name__)

EXAMPLES = ("blip3o-dit export-embeddings embeddings/store embeddings/store.parquet",)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("embeddings", type=Path, help="embedding store, or what convert takes")
    parser.add_argument("output", type=Path, help="file to write, whose suffix says the format")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")


def run(arguments: argparse.Namespace) -> None:
    from blip3o_dit.data.embeddings import open_embeddings
    from blip3o_dit.data.export import export_embeddings

    source = open_embeddings(arguments.embeddings)
    export_embeddings(source, arguments.output, overwrite=arguments.overwrite)
    logger.info("%s: %d samples", arguments.output, source.num_samples)
