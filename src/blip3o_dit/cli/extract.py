"""blip3o-dit extract, and extract_embeddings_production.py: pictures become embeddings."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from blip3o_dit.cli.arguments import add_flags, given_settings
from blip3o_dit.cli.command import run_named
from blip3o_dit.cli.main import COMMANDS
from blip3o_dit.extraction.config import ExtractionConfig

DEFAULT_STORE = Path("embeddings/store")
DEFAULT_PICKLE = Path("embeddings/blip3o_grid_embeddings.pkl")

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pictures",
        nargs="*",
        default=["images"],
        help="folder, list, tars, tables or a pattern of them, or several of one kind: docs/inputs.md "
        "(default: images)",
    )
    parser.add_argument("--output", type=Path, help=f"default: {DEFAULT_STORE}, or {DEFAULT_PICKLE}")
    parser.add_argument(
        "--format", choices=("store", "pickle"), default="store", help="pickle also keeps the store beside it"
    )
    add_flags(parser, ExtractionConfig)


def run(arguments: argparse.Namespace) -> None:
    from blip3o_dit.data.pickle_format import write_pickle
    from blip3o_dit.extraction.extract import extract

    as_pickle = arguments.format == "pickle"
    output: Path = arguments.output or (DEFAULT_PICKLE if as_pickle else DEFAULT_STORE)
    store_path = output.with_suffix(".store") if as_pickle else output
    settings = given_settings(arguments, ExtractionConfig) | {
        "images": arguments.pictures[0] if len(arguments.pictures) == 1 else tuple(arguments.pictures),
        "output": str(store_path),
    }
    store = extract(ExtractionConfig(**settings))
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


def main(argv: Sequence[str] | None = None) -> int:
    """The documented script."""
    return run_named(
        "extract", argv, prog="extract_embeddings_production.py", description=COMMANDS["extract"]
    )


if __name__ == "__main__":
    sys.exit(main())
