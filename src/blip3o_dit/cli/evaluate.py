"""blip3o-dit evaluate: a trained model beside baselines, as metrics.json, a page and a model card."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

from blip3o_dit.cli.arguments import add_flags, add_tf32, given_settings, use_tf32
from blip3o_dit.evaluation.config import EvaluationConfig

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="output folder of a training run, or a checkpoint")
    parser.add_argument("embeddings", type=Path, help="embedding store or documented pickle")
    parser.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="RUN", help="further models, side by side"
    )
    parser.add_argument(
        "--output_dir", type=Path, help="for metrics.json, report.html, README.md (default: the model's)"
    )
    add_flags(
        parser,
        EvaluationConfig,
        leave_out=["probe_samples", "half_samples"],
        num_samples={"type": _number_or_all},
        curve_calls={"metavar": "CALLS"},
    )
    parser.add_argument("--pictures", help="where the pictures are, as for extract, to show some")
    add_tf32(parser)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, write, and print the summary."""
    from blip3o_dit.evaluation.evaluate import evaluate_models
    from blip3o_dit.extraction.image_decoding import pictures_by_key

    config = EvaluationConfig(**given_settings(arguments, EvaluationConfig))
    if arguments.tf32:
        use_tf32(config.device)
    result = evaluate_models(
        [arguments.model, *arguments.compare],
        arguments.embeddings,
        arguments.output_dir,
        config,
        pictures=pictures_by_key(_where(arguments)),
        command=shlex.join(["blip3o-dit", *sys.argv[1:]]),
    )
    if not result:  # the first of several processes has it
        return
    sys.stdout.write("\n".join(result["summary"]) + "\n")
    folder = arguments.output_dir or arguments.model
    logger.info("the report: %s", folder / "report.html")


def _number_or_all(text: str) -> int | None:
    return None if text == "all" else int(text)


def _where(arguments: argparse.Namespace) -> str | None:
    """The pictures named on the command line, or those the store says it was made from, if still there."""
    from blip3o_dit.data.embeddings import open_embeddings

    if arguments.pictures:
        return str(arguments.pictures)
    manifest: dict[str, Any] = getattr(open_embeddings(arguments.embeddings), "manifest", {})
    recorded = manifest.get("pictures")
    return recorded if isinstance(recorded, str) and Path(recorded).exists() else None
