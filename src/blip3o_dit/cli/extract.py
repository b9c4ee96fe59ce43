"""blip3o-dit extract, and extract_embeddings_production.py: pictures become embeddings."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from blip3o_dit.cli.arguments import add_flags, given_settings
from blip3o_dit.cli.main import run_script
from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.sources.patterns import one_place

DEFAULT_STORE = Path("embeddings/store")
DEFAULT_PICKLE = Path("embeddings/blip3o_grid_embeddings.pkl")

logger = logging.getLogger(__name__)

EXAMPLES = (
    "blip3o-dit extract images --output embeddings/store --eva towers/eva-clip --clip towers/clip",
    "blip3o-dit extract shards/*.tar --output embeddings/try --towers_from_scratch",
)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument(
        "pictures",
        nargs="*",
        default=["images"],
        help="folder, list, table, tars, tables, or a pattern of them: docs/inputs.md (default: images)",
    )
    add_flags(parser, ExtractionConfig)
    store = parser.group("store")
    store.add_argument(
        "--output", type=Path, help=f"what to write (default: {DEFAULT_STORE}, or {DEFAULT_PICKLE})"
    )
    store.add_argument(
        "--format", choices=("store", "pickle"), default="store", help="pickle also keeps the store beside it"
    )


def run(arguments: argparse.Namespace) -> None:
    as_pickle = arguments.format == "pickle"
    output: Path = arguments.output or (DEFAULT_PICKLE if as_pickle else DEFAULT_STORE)
    store_path = output.with_suffix(".store") if as_pickle else output
    settings = given_settings(arguments, ExtractionConfig) | {
        "images": one_place(arguments.pictures),
        "output": str(store_path),
    }
    config = ExtractionConfig(**settings)  # a value may be refused, before the libraries are imported

    from blip3o_dit.data.pickle_format import write_pickle
    from blip3o_dit.extraction.extract import extract

    store = extract(config)
    if store is None:
        return
    logger.info(
        "%s: %d pictures, %d tokens of %d and %d",
        store.path,
        store.num_samples,
        store.num_tokens,
        store.condition_dim,
        store.target_dim,
    )
    if as_pickle:
        write_pickle(store, output)
        logger.info("%s: the same as the documented pickle", output)


def main(argv: list[str] | None = None) -> int:
    """The documented script."""
    return run_script("extract", "extract_embeddings_production.py", argv)


if __name__ == "__main__":
    sys.exit(main())
