"""blip3o-dit evaluate: a trained model beside baselines, as metrics.json, a page and a model card."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

from blip3o_dit.cli.tf32 import add_tf32, use_tf32
from blip3o_dit.flow.config import SOLVER_NAMES

DESCRIPTION = "Measure trained models beside baselines on held-out samples, and write a report."

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
    parser.add_argument(
        "--split",
        choices=("eval", "train", "all"),
        default="eval",
        help="side of the training split to measure; baselines are fitted on the other, with all on --fit_on",
    )
    parser.add_argument(
        "--num_samples",
        type=_number_or_all,
        default=20_000,
        help="most samples, chosen by the seed, or all (default: %(default)s)",
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_inference_steps", type=int, help="default: what the model was saved with")
    parser.add_argument("--solver", choices=SOLVER_NAMES, help="default: the model's")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, default=4, help="samples per condition for the energy score")
    parser.add_argument("--draw_samples", type=int, default=1000, help="conditions that get them")
    parser.add_argument(
        "--distribution_samples", type=int, default=2048, help="most vectors in a distribution distance"
    )
    parser.add_argument(
        "--gallery_samples", type=int, default=5000, help="most samples that retrieval is among"
    )
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamples for intervals")
    parser.add_argument(
        "--curve_calls",
        type=int,
        nargs="*",
        default=(1, 2, 4, 8, 16, 32, 50),
        metavar="CALLS",
        help="network calls of the cost curve; none: no curve",
    )
    parser.add_argument("--curve_samples", type=int, default=256)
    parser.add_argument("--fit_on", help="embeddings the baselines are fitted on (default: the same)")
    parser.add_argument(
        "--fit_samples",
        type=int,
        help="most samples a baseline is fitted on (default: 5000, or as many as the model's source)",
    )
    parser.add_argument(
        "--regression_steps", type=int, default=0, help="also train the same network by plain regression"
    )
    parser.add_argument("--pictures", help="where the pictures are, as for extract, to show some")
    parser.add_argument("--shown", type=int, default=6, help="samples on the page")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add_tf32(parser)
    parser.add_argument("--weights", choices=("auto", "ema", "raw"), default="auto")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, write, and print the summary."""
    from blip3o_dit.cli.images import pictures_by_key
    from blip3o_dit.evaluation.config import EvaluationConfig
    from blip3o_dit.evaluation.evaluate import command_line, evaluate_models

    if arguments.tf32:
        use_tf32(arguments.device)
    config = EvaluationConfig(
        split=arguments.split,
        num_samples=arguments.num_samples,
        num_inference_steps=arguments.num_inference_steps,
        solver=arguments.solver,
        guidance_scale=arguments.guidance_scale,
        seed=arguments.seed,
        curve_calls=tuple(arguments.curve_calls),
        curve_samples=arguments.curve_samples,
        fit_on=arguments.fit_on,
        fit_samples=arguments.fit_samples,
        regression_steps=arguments.regression_steps,
        shown=arguments.shown,
        weights=arguments.weights,
        device=arguments.device,
        dtype=arguments.dtype,
        batch_size=arguments.batch_size,
        draws=arguments.draws,
        draw_samples=arguments.draw_samples,
        distribution_samples=arguments.distribution_samples,
        gallery_samples=arguments.gallery_samples,
        bootstrap=arguments.bootstrap,
    )
    result = evaluate_models(
        [arguments.model, *arguments.compare],
        arguments.embeddings,
        arguments.output_dir,
        config,
        pictures=pictures_by_key(_where(arguments)),
        command=command_line(),
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
