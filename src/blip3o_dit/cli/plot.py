"""blip3o-dit plot: the training curves of one run, or of several in one figure."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.utils.names import shortest_ends
from blip3o_dit.utils.progress import working

DEFAULT_OUTPUT = Path("training_curves.png")

EXAMPLES = ("blip3o-dit plot checkpoints/run checkpoints/other --output curves.png",)

logger = logging.getLogger(__name__)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="run", help="folder of a run, finished or not, or a checkpoint"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=DEFAULT_OUTPUT,
        help=f"figure to write: .png, .svg or .pdf (default: {DEFAULT_OUTPUT}, in this folder)",
    )


def run(arguments: argparse.Namespace) -> None:
    with working("loading matplotlib", lasting=False):
        from blip3o_dit.training.curves import draw_runs

    output = arguments.output
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--output: expected a name with .png, .svg or .pdf, found {output}")
    found = [_log_of(folder) for folder in arguments.runs]
    logs = dict(zip(names_of(arguments.runs), found, strict=True))
    output.parent.mkdir(parents=True, exist_ok=True)
    with working("drawing the curves", lasting=False):
        draw_runs(logs, output)
    for name, log in logs.items():
        logger.info("%s: logged up to step %d", name, max(entry["step"] for entry in log))
    logger.info("the figure: %s", output)


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each run, as short as tells them apart: the last parts of their paths.

    Raises:
        ValueError: for a folder that was given twice.
    """
    paths = [folder.resolve() for folder in folders]
    for number, folder in enumerate(folders):
        if paths[number] in paths[:number]:
            raise ValueError(f"{folder}: expected each run once, found it twice")
    return shortest_ends(paths)


def _log_of(folder: Path) -> list[dict[str, Any]]:
    """The log of a run, or of a checkpoint, up to where it is. Raises ValueError where there is none."""
    from blip3o_dit.training.describe import log_of
    from blip3o_dit.utils.recognise import RUN, TRAINED, recognise, refusal

    if recognise(folder).kind not in TRAINED:
        raise refusal(folder, RUN)
    log = log_of(folder)
    if not log:
        raise ValueError(f"{folder}: expected a log of steps (training_log.jsonl), found none")
    return log
