"""blip3o-dit push: a model, a decoder or an embedding store to the Hugging Face hub, or to an address."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blip3o_dit.cli.parser import CommandParser

EXAMPLES = (
    "blip3o-dit push checkpoints/run owner/name --private",
    "blip3o-dit push embeddings/store owner/store",
    "blip3o-dit push embeddings/store s3://bucket/store",
)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("folder", type=Path, help="model, checkpoint, decoder or embedding store")
    parser.add_argument(
        "repository",
        metavar="where",
        help="owner/name on the hub, made if it is not there, or an address, s3://bucket/folder",
    )
    parser.add_argument("--private", action="store_true", help="of a new repository: for its owner only")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to write to (default: main)")
    parser.add_argument(
        "--overwrite", action="store_true", help="of an address: replace another store or model there"
    )


def run(arguments: argparse.Namespace) -> None:
    """Send, and print the page's address."""
    from blip3o_dit.publish import push_to_address, push_to_hub
    from blip3o_dit.utils.addresses import Address, located

    if isinstance(located(arguments.repository), Address):
        if arguments.private or arguments.revision:
            raise ValueError("--private, --revision: expected neither of them with an address")
        where = push_to_address(arguments.folder, arguments.repository, overwrite=arguments.overwrite)
        sys.stdout.write(where + "\n")
        return
    if arguments.overwrite:
        raise ValueError("--overwrite: expected an address, found a repository on the hub")
    page = push_to_hub(
        arguments.folder, arguments.repository, private=arguments.private, revision=arguments.revision
    )
    sys.stdout.write(page + "\n")
