"""blip3o-dit append: the new samples of other stores are added to a store."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from blip3o_dit.cli.merge import add_keep_first
from blip3o_dit.cli.parser import CommandParser

logger = logging.getLogger(__name__)

EXAMPLES = ("blip3o-dit append embeddings/store embeddings/more",)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("store", type=Path, help="embedding store to add to")
    parser.add_argument("more", type=Path, nargs="+", help="embedding stores with the samples to add")
    add_keep_first(parser)


def run(arguments: argparse.Namespace) -> None:
    from blip3o_dit.data.combine import append_store
    from blip3o_dit.data.store import EmbeddingStore
    from blip3o_dit.data.store_folder import writing_alone

    EmbeddingStore(arguments.store)  # refused before a folder is made
    with writing_alone(arguments.store, "append"):
        for more in arguments.more:
            store, added, passed_over = append_store(arguments.store, more, keep_first=arguments.keep_first)
            logger.info(
                "%s: %d samples added from %s, %d passed over that were there: now %d",
                store.path,
                added,
                more,
                passed_over,
                len(store),
            )
