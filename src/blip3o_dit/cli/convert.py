"""blip3o-dit convert: the documented pickle, read safely, becomes an embedding store."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pickle", type=Path, help="the documented .pkl (or torch.save) file")
    parser.add_argument("store", type=Path, help="folder to write")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="on disk"
    )
    parser.add_argument("--shard_size", type=int, help="samples per shard (default: 256 MiB)")
    parser.add_argument("--overwrite", action="store_true", help="replace a store that is there")


def run(arguments: argparse.Namespace) -> None:
    from blip3o_dit.data.pickle_format import convert_pickle

    store = convert_pickle(
        arguments.pickle,
        arguments.store,
        dtype=arguments.dtype,
        shard_size=arguments.shard_size,
        overwrite=arguments.overwrite,
    )
    logger.info(
        "%s: %d samples of %d tokens, %d and %d wide, in %d shard(s)",
        store.path,
        store.num_samples,
        store.num_tokens,
        store.condition_dim,
        store.target_dim,
        len(store.manifest["shards"]),
    )
