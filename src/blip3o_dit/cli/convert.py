"""blip3o-dit convert: files of embeddings, read safely, become an embedding store."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "embeddings",
        type=Path,
        nargs="+",
        help="the documented .pkl, or .pt, .npz, .npy (two, or their folder), .safetensors, parquet, saved "
        "Hugging Face datasets, stores",
    )
    parser.add_argument("store", type=Path, help="folder to write")
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="on disk"
    )
    parser.add_argument("--shard_size", type=int, help="samples per shard (default: 256 MiB)")
    parser.add_argument(
        "--drop_class_token", action="store_true", help="leave out the first of 257 (n x n and one) tokens"
    )
    parser.add_argument("--pool", type=int, metavar="TOKENS", help="means over the grid, as of 256 to 64")
    parser.add_argument("--tokens", type=int, help="how many tokens are in columns of flat lists")
    parser.add_argument("--overwrite", action="store_true", help="replace a store that is there")


def run(arguments: argparse.Namespace) -> None:
    from blip3o_dit.data.array_embeddings import Arrangement
    from blip3o_dit.data.convert import convert_files
    from blip3o_dit.data.store_folder import writing_alone

    arrangement = Arrangement(arguments.drop_class_token, arguments.pool, arguments.tokens)
    with writing_alone(arguments.store, "convert"):
        store = convert_files(
            arguments.embeddings,
            arguments.store,
            dtype=arguments.dtype,
            shard_size=arguments.shard_size,
            overwrite=arguments.overwrite,
            arrangement=arrangement,
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
