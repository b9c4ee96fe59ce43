"""blip3o-dit extract, and extract_embeddings_production.py: pictures become embeddings."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

from blip3o_dit.cli.arguments import add_flags, given_settings
from blip3o_dit.cli.main import run_script
from blip3o_dit.cli.outputs import store_output
from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.utils.addresses import refuse_address
from blip3o_dit.utils.json_files import escaped

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
        help="folder, list, table, tars, tables, a pattern of them, or several of one kind: docs/inputs.md "
        "(default: images)",
    )
    add_flags(parser, ExtractionConfig)
    store = parser.group("store")
    store.add_argument(
        "--output", type=Path, help=f"what to write (default: {DEFAULT_STORE}, or {DEFAULT_PICKLE})"
    )
    store.add_argument(
        "--format", choices=("store", "pickle"), default="store", help="pickle also keeps the store beside it"
    )
    store.add_argument(
        "--dry_run",
        action="store_true",
        help="say what would be done, how long it takes and how large it gets, and write nothing",
    )


def run(arguments: argparse.Namespace) -> None:
    as_pickle = arguments.format == "pickle"
    output: Path = arguments.output or (DEFAULT_PICKLE if as_pickle else DEFAULT_STORE)
    places = arguments.pictures
    settings = given_settings(arguments, ExtractionConfig) | {
        "images": places[0] if len(places) == 1 else tuple(places),
        "output": str(output.with_suffix(".store") if as_pickle else output),
    }
    config = ExtractionConfig(**settings)
    if as_pickle or config.append or config.retry_skipped:
        refuse_address(output)
    try:
        if arguments.dry_run:
            _show_plan(config)
            return
        with store_output(Path(config.output), overwrite=config.overwrite) as folder:
            _extract(replace(config, output=str(folder)), output if as_pickle else None)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted: what was done is kept, the same command continues") from None


def _show_plan(config: ExtractionConfig) -> None:
    logger.info("a dry run: nothing is written and nothing is downloaded")
    from blip3o_dit.extraction.plan import plan

    sys.stdout.write(plan(config) or "")


def _extract(config: ExtractionConfig, pickle: Path | None) -> None:
    from blip3o_dit.data.pickle_format import write_pickle
    from blip3o_dit.extraction.extract import extract

    store = extract(config)
    if store is None:
        return
    sizes = f"{store.num_tokens} tokens of {store.condition_dim} and {store.target_dim}"
    sys.stdout.write(escaped(f"{store.path}: {store.num_samples} pictures, {sizes}") + "\n")
    if pickle is not None:
        logger.info("writing the documented pickle")
        write_pickle(store, pickle)
        sys.stdout.write(escaped(f"{pickle}: the same as the documented pickle") + "\n")


def main(argv: list[str] | None = None) -> int:
    """The documented script."""
    return run_script("extract", "extract_embeddings_production.py", argv)


if __name__ == "__main__":
    sys.exit(main())
