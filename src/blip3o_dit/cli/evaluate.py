"""blip3o-dit evaluate: a trained model beside baselines, as metrics.json, a page and a model card."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from blip3o_dit.cli.arguments import add_flags, add_no_calibrate, add_tf32, given_settings, use_tf32
from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.evaluation.config import EvaluationConfig
from blip3o_dit.utils.errors import StoppedEarly
from blip3o_dit.utils.json_files import escaped

if TYPE_CHECKING:
    from blip3o_dit.evaluation.reference import ClassTexts

logger = logging.getLogger(__name__)

EXAMPLES = (
    "blip3o-dit evaluate checkpoints/run embeddings/store",
    "blip3o-dit evaluate checkpoints/run embeddings/store --decoder checkpoints/decoder",
    "blip3o-dit evaluate checkpoints/run embeddings/store --compare checkpoints/other --output_dir results",
)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("model", help="folder of a model or checkpoint, or owner/name on the hub")
    parser.add_argument("embeddings", type=Path, help="embedding store or documented pickle")
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="RUN",
        help="further models, side by side (default: none)",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="for metrics.json, report.html and README.md, which are replaced (default: the model's folder)",
    )
    add_flags(
        parser,
        EvaluationConfig,
        leave_out=["probe_samples", "half_samples"],
        num_samples={"type": _number_or_all},
        curve_calls={"metavar": "CALLS"},
    )
    add_no_calibrate(parser.group("how models sample"))
    parser.group("page").add_argument(
        "--pictures",
        metavar="WHERE",
        help="where the pictures are, as for extract, to show some (default: where the store's were)",
    )
    parser.group("page").add_argument(
        "--decoder",
        type=Path,
        metavar="DIR",
        help="show and compare predicted tokens as pictures, by this decoder (default: do not)",
    )
    group = parser.group("zero-shot classification")
    group.add_argument(
        "--class_names",
        type=Path,
        metavar="FILE",
        help="names of the classes, one a line: the labels themselves, or their numbers count lines from 0 "
        "(default: no zero-shot classification)",
    )
    group.add_argument(
        "--clip",
        metavar="NAME",
        help="folder or owner/name on the hub of the CLIP whose text tower reads them (default: none)",
    )
    add_tf32(parser.group("weights, device and precision"))


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, write, and print the summary."""
    config = EvaluationConfig(**given_settings(arguments, EvaluationConfig))

    from blip3o_dit.data.embeddings import open_embeddings
    from blip3o_dit.decoder.folder import load_decoder
    from blip3o_dit.evaluation.evaluate import evaluate_models
    from blip3o_dit.evaluation.kept import has_parts
    from blip3o_dit.extraction.shown_images import pictures_of_store

    if arguments.tf32:
        use_tf32(config.device)
    texts = _texts(arguments, config.device)
    source = open_embeddings(arguments.embeddings)
    pictures = pictures_of_store(getattr(source, "manifest", {}), arguments.pictures)
    decoder = load_decoder(arguments.decoder) if arguments.decoder else None
    folder = _output_dir(arguments)
    try:
        result = evaluate_models(
            [arguments.model, *arguments.compare],
            source,
            arguments.output_dir,
            config,
            pictures=pictures,
            decoder=decoder,
            texts=texts,
            command=shlex.join(["blip3o-dit", *sys.argv[1:]]),
        )
    except KeyboardInterrupt as error:
        if not has_parts(folder):
            raise
        message = f"{folder}: what is measured is kept: the same command goes on"
        raise StoppedEarly(message) from error
    if not result:  # the first of several processes has it
        return
    sys.stdout.writelines(escaped(line) + "\n" for line in result["summary"])
    logger.info("the report: %s", folder / "report.html")


def _texts(arguments: argparse.Namespace, device: str) -> ClassTexts | None:
    """What the classes are called, as CLIP's text tower says it; None without --class_names."""
    given = arguments.class_names, arguments.clip
    if given == (None, None):
        return None
    if None in given:
        raise ValueError("expected --class_names and --clip together, found one of them")
    from blip3o_dit.evaluation.reference import ClassTexts
    from blip3o_dit.extraction.text_tower import class_vectors, read_class_names
    from blip3o_dit.utils.distributed import pick_device

    names = read_class_names(arguments.class_names)
    return ClassTexts(names, class_vectors(names, arguments.clip, device=pick_device(device)))


def _output_dir(arguments: argparse.Namespace) -> Path:
    """Where to write: by default beside the model, which one of the hub has no place for."""
    from blip3o_dit.utils.hub import model_folder

    if arguments.output_dir is None and model_folder(arguments.model) != Path(arguments.model):
        raise ValueError(
            f"--output_dir: expected a folder, as {arguments.model} is not on this disk, found none"
        )
    return arguments.output_dir or Path(arguments.model)


def _number_or_all(text: str) -> int | None:
    return None if text == "all" else int(text)
