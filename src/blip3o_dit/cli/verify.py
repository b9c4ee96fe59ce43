"""blip3o-dit verify: every file of a store is read and checked."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from blip3o_dit.cli.parser import CommandParser

logger = logging.getLogger(__name__)

EXAMPLES = ("blip3o-dit verify embeddings/store",)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("store", type=Path, help="embedding store")


def run(arguments: argparse.Namespace) -> None:
    from blip3o_dit.data.store import EmbeddingStore

    store = EmbeddingStore(arguments.store, check_files=False)
    damaged = 0
    for line in store.find_damage():
        logger.error("%s", line)
        damaged += 1
    if damaged:
        raise ValueError(
            f"{store.path}: {damaged} of {2 * len(store.manifest['shards'])} files are damaged: copy "
            "them again from where they are whole, or make the store anew"
        )
    logger.info(
        "%s: %d samples in %d shards, all whole", store.path, len(store), len(store.manifest["shards"])
    )
