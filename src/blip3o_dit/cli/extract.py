"""blip3o-dit extract, and extract_embeddings_production.py: pictures become embeddings."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from blip3o_dit.cli.command import run_command

DESCRIPTION = "Extract EVA-CLIP and CLIP tokens from pictures into an embedding store."
DEFAULT_STORE = Path("embeddings/store")
DEFAULT_PICKLE = Path("embeddings/blip3o_grid_embeddings.pkl")

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pictures",
        nargs="?",
        default="images",
        help="folder, list file, webdataset tar(s), parquet or Hugging Face dataset folder (default: images)",
    )
    parser.add_argument("--output", type=Path, help=f"default: {DEFAULT_STORE}, or {DEFAULT_PICKLE}")
    parser.add_argument(
        "--format", choices=("store", "pickle"), default="store", help="pickle also keeps the store beside it"
    )
    parser.add_argument("--eva", help="tower of the conditions (default: BAAI/EVA-CLIP-8B)")
    parser.add_argument("--clip", help="of the targets (default: openai/clip-vit-large-patch14)")
    parser.add_argument("--eva_revision", help="revision on the hub")
    parser.add_argument("--clip_revision", help="revision on the hub")
    parser.add_argument(
        "--towers-from-scratch",
        action="store_true",
        help="tiny random towers, to try the pipeline: their tokens mean nothing",
    )
    parser.add_argument("--tokens", type=int, default=64, help="per picture; 256 keeps a 16x16 grid")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--store_dtype", choices=("float32", "bfloat16", "float16"), default="float16")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--shard_size", type=int, default=1024, help="pictures per shard")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--strict", action="store_true", help="an unreadable picture is an error")
    parser.add_argument("--max_pixels", type=int, default=178_956_970, help="refuse larger pictures")
    parser.add_argument("--seed", type=int, default=0, help="of towers from scratch")


def run(arguments: argparse.Namespace) -> None:
    from blip3o_dit.data.pickle_format import write_pickle
    from blip3o_dit.extraction.extract import DEFAULT_CLIP, DEFAULT_EVA, ExtractionConfig, extract

    as_pickle = arguments.format == "pickle"
    output: Path = arguments.output or (DEFAULT_PICKLE if as_pickle else DEFAULT_STORE)
    store_path = output.with_suffix(".store") if as_pickle else output
    given = {
        "images": arguments.pictures,
        "output": str(store_path),
        "eva": arguments.eva or DEFAULT_EVA,
        "clip": arguments.clip or DEFAULT_CLIP,
    }
    same_names = {field.name for field in fields(ExtractionConfig)} - given.keys()
    store = extract(ExtractionConfig(**given, **{name: getattr(arguments, name) for name in same_names}))
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
    parser = argparse.ArgumentParser(
        prog="extract_embeddings_production.py", description=DESCRIPTION, allow_abbrev=False
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
