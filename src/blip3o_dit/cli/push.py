"""blip3o-dit push: a model or an embedding store to the Hugging Face hub."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blip3o_dit.cli.parser import CommandParser

EXAMPLES = (
    "blip3o-dit push checkpoints/run owner/name --private",
    "blip3o-dit push embeddings/store owner/store",
)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("folder", type=Path, help="model, checkpoint or embedding store")
    parser.add_argument("repository", help="owner/name on the hub, made if it is not there")
    parser.add_argument("--private", action="store_true", help="of a new repository: for its owner only")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to write to (default: main)")


def run(arguments: argparse.Namespace) -> None:
    """Send, and print the page's address."""
    from blip3o_dit.publish import push_to_hub

    page = push_to_hub(
        arguments.folder, arguments.repository, private=arguments.private, revision=arguments.revision
    )
    sys.stdout.write(page + "\n")
