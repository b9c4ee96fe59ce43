"""blip3o-dit merge: several embedding stores become one."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from blip3o_dit.cli.outputs import store_output
from blip3o_dit.cli.parser import CommandParser

logger = logging.getLogger(__name__)

EXAMPLES = ("blip3o-dit merge embeddings/a embeddings/b embeddings/both",)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("stores", type=Path, nargs="+", help="embedding stores, in order")
    parser.add_argument("output", type=Path, help="folder to write, or an address, s3://bucket/store")
    parser.add_argument("--overwrite", action="store_true", help="replace a store that is there")
    add_keep_first(parser)


def add_keep_first(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep_first", action="store_true", help="of different samples of one key, keep the first"
    )


def run(arguments: argparse.Namespace) -> None:
    from blip3o_dit.data.combine import merge_stores
    from blip3o_dit.data.store_folder import writing_alone

    with (
        store_output(arguments.output, overwrite=arguments.overwrite) as output,
        writing_alone(output, "merge"),
    ):
        store, added, passed_over = merge_stores(
            arguments.stores,
            output,
            overwrite=arguments.overwrite,
            keep_first=arguments.keep_first,
        )
    logger.info(
        "%s: %d samples of %d stores, %d passed over that came again",
        store.path,
        added,
        len(arguments.stores),
        passed_over,
    )
