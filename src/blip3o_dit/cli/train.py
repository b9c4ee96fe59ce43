"""blip3o-dit train, and train_blip3o_dit.py: parse, resolve, train."""

from __future__ import annotations

import argparse
import logging
import sys
import typing
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any

from blip3o_dit.cli.command import run_command
from blip3o_dit.training.config import TrainingConfig

logger = logging.getLogger(__name__)

DESCRIPTION = "Train the diffusion transformer on an embedding store or a documented pickle."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per field of TrainingConfig, and the four that are about this call only."""
    kinds = typing.get_type_hints(TrainingConfig)
    for option in fields(TrainingConfig):
        settings: dict[str, Any] = {"default": argparse.SUPPRESS}
        if kinds[option.name] is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = _plain_type(kinds[option.name])
            settings["choices"] = option.metadata["choices"]
        shown = "" if option.default in ("", None) else f" (default: {option.default})"
        parser.add_argument(f"--{option.name}", help=option.metadata["help"] + shown, **settings)
    parser.add_argument(
        "--resume_from_checkpoint",
        metavar="CHECKPOINT",
        help="continue a run; what is not given is taken from the checkpoint. auto: the newest whole one in "
        "--output_dir, or a new run if there is none",
    )
    parser.add_argument(
        "--recipe",
        choices=("default", "paper"),
        default="default",
        help="paper: BLIP3-o's own settings where this page's defaults differ; flags given beside it win",
    )
    parser.add_argument("--debug", action="store_true", help="small network, 20 steps")
    parser.add_argument(
        "--dry_run", action="store_true", help="do everything up to the first step, then stop"
    )
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="start over in a folder with a run"
    )


def run(arguments: argparse.Namespace) -> None:
    """Train as the parsed arguments say."""
    from blip3o_dit.training.arguments import resolve_config
    from blip3o_dit.training.run import train

    resume = _checkpoint(arguments)
    given = vars(arguments).copy()
    own = {f.name for f in fields(TrainingConfig)}
    config = resolve_config(
        {name: value for name, value in given.items() if name in own},
        debug=arguments.debug,
        resume=resume,
        recipe=arguments.recipe,
    )
    train(
        config,
        resume=resume,
        dry_run=arguments.dry_run,
        overwrite=arguments.overwrite_output_dir,
    )


def _checkpoint(arguments: argparse.Namespace) -> Path | None:
    """The checkpoint to continue from, whole."""
    from blip3o_dit.training.checkpoint import newest_whole, verify_checkpoint

    given = arguments.resume_from_checkpoint
    if given is None:
        return None
    if given != "auto":
        verify_checkpoint(Path(given))
        return Path(given)
    output = getattr(arguments, "output_dir", None)
    if not output:
        raise ValueError("--resume_from_checkpoint auto: expected --output_dir, found none")
    found = newest_whole(Path(output))
    logger.info("continuing from %s", found) if found else logger.info("%s: a new run", output)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The documented script."""
    parser = argparse.ArgumentParser(prog="train_blip3o_dit.py", description=DESCRIPTION, allow_abbrev=False)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments))


def _plain_type(kind: Any) -> type:
    """`int | None` -> int: a flag that is given has a value."""
    if isinstance(kind, UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


if __name__ == "__main__":
    sys.exit(main())
