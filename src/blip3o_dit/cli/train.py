"""blip3o-dit train, and train_blip3o_dit.py: parse, resolve, train."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from blip3o_dit.cli.arguments import add_flags, add_push, given_settings, pushed
from blip3o_dit.cli.main import run_script
from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.training.config import NOTED, SIZES, STARTING, TrainingConfig
from blip3o_dit.utils.addresses import Address, located
from blip3o_dit.utils.progress import working

logger = logging.getLogger(__name__)

EXAMPLES = (
    "blip3o-dit train --embeddings_path embeddings/store --output_dir checkpoints/run --size small",
    "blip3o-dit train --output_dir checkpoints/run --resume_from_checkpoint auto",
)


def add_arguments(parser: CommandParser) -> None:
    """One flag per field of TrainingConfig, and those that are about this call only."""
    parser.group("data and output")  # which comes first in the help
    _add_presets(parser)
    compile = {"nargs": "?", "const": "blocks"}
    add_flags(parser, TrainingConfig, negatable=True, leave_out=NOTED, compile=compile)
    parser.group("memory, speed and precision").add_argument(
        "--no_compile",
        dest="compile",
        action="store_const",
        const=None,
        default=argparse.SUPPRESS,
        help="compile nothing, where a resumed run did",
    )
    parser.group("data and output").add_argument(
        "--overwrite", action="store_true", help="start over in a folder with a run"
    )
    parser.add_former_name("overwrite_output_dir", "overwrite")
    add_push(parser.group("hub"))
    parser.group(STARTING).add_argument(
        "--resume_from_checkpoint",
        metavar="CHECKPOINT",
        help="continue a run; what is not given is taken from the checkpoint. auto: the newest whole one in "
        "--output_dir, else at --send_to, or a new run if there is none; an address: the newest whole one "
        "there (default: a new run)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="do everything up to the first step, then stop"
    )


def _add_presets(parser: CommandParser) -> None:
    """Flags that stand for several others, which win when they are given."""
    presets = parser.group("presets")
    presets.add_argument(
        "--recipe",
        choices=("default", "paper"),
        default="default",
        help="paper: BLIP3-o's own settings where this page's defaults differ; flags given beside it win",
    )
    presets.add_argument(
        "--size",
        choices=tuple(SIZES),
        help="width, layers and heads of the network: tiny (1.3 million parameters), small (19 million, for "
        "a processor), base (1.36 billion, BLIP3-o's) (default: base)",
    )
    presets.add_argument("--debug", action="store_true", help="tiny network, 20 steps")


def run(arguments: argparse.Namespace) -> None:
    """Train as the parsed arguments say."""
    output = _output_dir(arguments)  # which comes before the libraries: a path may be missing
    with working("loading torch and transformers"):
        from blip3o_dit.training.output_folder import output_folder
        from blip3o_dit.training.resolve import resolve_config
        from blip3o_dit.training.run import run_alone

    with output_folder(output, "a training", dry_run=arguments.dry_run):
        given, send_to = arguments.resume_from_checkpoint, getattr(arguments, "send_to", "")
        resume = _own_checkpoint(output) or _checkpoint(given, output, send_to, overwrite=arguments.overwrite)
        config = resolve_config(
            given_settings(arguments, TrainingConfig),
            debug=arguments.debug,
            resume=resume,
            recipe=arguments.recipe,
            size=arguments.size,
        )
        with (
            nullcontext() if arguments.dry_run else pushed(arguments, output),
            nullcontext() if arguments.dry_run else _sent(config, resume),
        ):
            run_alone(config, resume=resume, dry_run=arguments.dry_run, overwrite=arguments.overwrite)


def _output_dir(arguments: argparse.Namespace) -> Path:
    """Where to train, which a run that is resumed knows."""
    output, resume = getattr(arguments, "output_dir", None), arguments.resume_from_checkpoint
    if not output and resume not in (None, "auto") and not isinstance(located(resume), Address):
        from blip3o_dit.training.checkpoint import verify_checkpoint

        verify_checkpoint(Path(resume))
        output = TrainingConfig.from_folder(resume).output_dir
    if not output:
        missing = "output_dir" if getattr(arguments, "embeddings_path", None) else "embeddings_path"
        raise ValueError(f"--{missing}: expected a path, found none")
    return Path(output)


def _own_checkpoint(output: Path) -> Path | None:
    """What a run that its launcher starts again has left: whatever its flags say, it goes on from there. What
    was there before the launcher is none of its own."""
    from blip3o_dit.training.checkpoint import newest_whole
    from blip3o_dit.utils.distributed import launcher_began, restarts

    if not restarts():
        return None
    with working(f"checking the checkpoints in {output}"):
        found = newest_whole(output, since=launcher_began())
    logger.info("restarted by the launcher (%d): %s", restarts(), found or "no checkpoint yet")
    return found


@contextmanager
def _sent(config: TrainingConfig, resume: Path | None) -> Iterator[None]:
    """Around a training whose results go to --send_to as well; that they can is found out first."""
    if not config.send_to or os.environ.get("RANK", "0") != "0":
        yield
        return
    from blip3o_dit.publish import push_to_address
    from blip3o_dit.training.sent_checkpoints import SendCheckpoints, check_send_to

    check_send_to(config.send_to, resumes=resume is not None)
    yield
    SendCheckpoints(config.send_to).send(Path(config.output_dir))
    push_to_address(config.output_dir, config.send_to, overwrite=True)


def _checkpoint(given: str | None, output: Path, send_to: str, *, overwrite: bool) -> Path | None:
    """The checkpoint to continue from, whole; fetched from an address where this folder has none."""
    from blip3o_dit.training.checkpoint import checkpoints, newest_whole, verify_checkpoint

    if given is None:
        return None
    is_address = isinstance(located(given), Address)
    if is_address or (given == "auto" and send_to and newest_whole(output) is None):
        from blip3o_dit.training.sent_checkpoints import fetch_checkpoint

        fetched = fetch_checkpoint(given if is_address else send_to, output)
        if is_address and fetched is None:
            raise FileNotFoundError(f"{located(given)}: expected a whole checkpoint there, found none")
        if fetched is not None:
            return fetched
    elif given != "auto":
        with working(f"checking {given}"):
            verify_checkpoint(Path(given))
        return Path(given)
    with working(f"checking the checkpoints in {output}"):
        found = newest_whole(output)
    if found is None and checkpoints(output) and not overwrite:
        raise ValueError(
            f"{output}: expected a whole checkpoint to continue from, found none: --overwrite starts over"
        )
    logger.info("continuing from %s", found) if found else logger.info("%s: a new run", output)
    return found


def main(argv: list[str] | None = None) -> int:
    """The documented script."""
    return run_script("train", "train_blip3o_dit.py", argv)


if __name__ == "__main__":
    sys.exit(main())
