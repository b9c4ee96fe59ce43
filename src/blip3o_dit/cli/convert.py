"""blip3o-dit convert: files of embeddings, read safely, become an embedding store."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from blip3o_dit.cli.outputs import store_output
from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.data.choices import KEPT, STORE_DTYPES

logger = logging.getLogger(__name__)

EXAMPLES = (
    "blip3o-dit convert embeddings/eva.npy embeddings/clip.npy embeddings/store",
    "blip3o-dit convert old.pkl embeddings/store --dtype float32",
)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument(
        "embeddings",
        type=Path,
        nargs="+",
        help="the documented .pkl, or .pt, .npz, .npy (two, or their folder), .safetensors, parquet, saved "
        "Hugging Face datasets, stores",
    )
    parser.add_argument("store", type=Path, help="folder to write, or an address, s3://bucket/store")
    parser.add_argument("--dtype", choices=STORE_DTYPES, default="float16", help="precision on disk")
    parser.add_argument(
        "--shard_size", type=int, metavar="N", help="samples per shard (default: as many as take 256 MiB)"
    )
    parser.add_argument(
        "--drop_class_token", action="store_true", help="leave out the first of 257 (n x n and one) tokens"
    )
    parser.add_argument(
        "--pool",
        type=int,
        metavar="TOKENS",
        help="so many tokens, means over the grid, as of 256 to 64 (default: all of them)",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="how many tokens are in each flat row, one after the other (default: one, of all its numbers)",
    )
    parser.add_argument(
        "--vectors",
        choices=KEPT,
        help="of a store, one vector a sample: those that `extract --keep` put beside its tokens (default: "
        "its tokens)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a store that is there")


def run(arguments: argparse.Namespace) -> None:
    from blip3o_dit.data.array_embeddings import Arrangement
    from blip3o_dit.data.convert import convert_files
    from blip3o_dit.data.store_folder import writing_alone

    arrangement = Arrangement(arguments.drop_class_token, arguments.pool, arguments.tokens)
    with (
        store_output(arguments.store, overwrite=arguments.overwrite) as output,
        writing_alone(output, "convert"),
    ):
        store = convert_files(
            arguments.embeddings,
            output,
            dtype=arguments.dtype,
            shard_size=arguments.shard_size,
            overwrite=arguments.overwrite,
            arrangement=arrangement,
            vectors=arguments.vectors,
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
