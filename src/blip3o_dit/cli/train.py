"""blip3o-dit train, and train_blip3o_dit.py: parse, resolve, train."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from blip3o_dit.cli.arguments import add_flags, given_settings
from blip3o_dit.cli.command import run_named
from blip3o_dit.cli.main import COMMANDS
from blip3o_dit.training.config import NOTED, SIZES, TrainingConfig
from blip3o_dit.utils.progress import working

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per field of TrainingConfig, and those that are about this call only."""
    add_flags(parser, TrainingConfig, negatable=True, leave_out=NOTED)
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
    parser.add_argument(
        "--size",
        choices=tuple(SIZES),
        help="width, layers and heads of the network: tiny (1.3 million parameters), small (19 million, for "
        "a processor), base (1.36 billion, BLIP3-o's; the default)",
    )
    parser.add_argument("--debug", action="store_true", help="tiny network, 20 steps")
    parser.add_argument(
        "--dry_run", action="store_true", help="do everything up to the first step, then stop"
    )
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="start over in a folder with a run"
    )


def run(arguments: argparse.Namespace) -> None:
    """Train as the parsed arguments say."""
    with working("loading torch and transformers"):
        from blip3o_dit.training.output_folder import output_folder
        from blip3o_dit.training.resolve import resolve_config
        from blip3o_dit.training.run import run_alone

    output = _output_dir(arguments)
    with output_folder(output, "a training", dry_run=arguments.dry_run):
        resume = _checkpoint(arguments.resume_from_checkpoint, output)
        config = resolve_config(
            given_settings(arguments, TrainingConfig),
            debug=arguments.debug,
            resume=resume,
            recipe=arguments.recipe,
            size=arguments.size,
        )
        run_alone(
            config,
            resume=resume,
            dry_run=arguments.dry_run,
            overwrite=arguments.overwrite_output_dir,
        )


def _output_dir(arguments: argparse.Namespace) -> Path:
    """Where to train, which a run that is resumed knows."""
    from blip3o_dit.training.checkpoint import verify_checkpoint

    output, resume = getattr(arguments, "output_dir", None), arguments.resume_from_checkpoint
    if not output and resume not in (None, "auto"):
        verify_checkpoint(Path(resume))
        output = TrainingConfig.from_folder(resume).output_dir
    if not output:
        missing = "output_dir" if getattr(arguments, "embeddings_path", None) else "embeddings_path"
        raise ValueError(f"--{missing}: expected a path, found none")
    return Path(output)


def _checkpoint(given: str | None, output: Path) -> Path | None:
    """The checkpoint to continue from, whole."""
    from blip3o_dit.training.checkpoint import newest_whole, verify_checkpoint

    if given is None:
        return None
    if given != "auto":
        with working(f"checking {given}"):
            verify_checkpoint(Path(given))
        return Path(given)
    with working(f"checking the checkpoints in {output}"):
        found = newest_whole(output)
    logger.info("continuing from %s", found) if found else logger.info("%s: a new run", output)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The documented script."""
    return run_named("train", argv, prog="train_blip3o_dit.py", description=COMMANDS["train"])


if __name__ == "__main__":
    sys.exit(main())
