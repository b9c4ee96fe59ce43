"""blip3o-dit generate: CLIP tokens for the conditions of a data set."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from blip3o_dit.cli.tf32 import add_tf32, use_tf32
from blip3o_dit.flow.config import SOLVER_NAMES

DESCRIPTION = "Generate CLIP tokens for the samples of an embedding store or pickle."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="output folder of a training run, or a checkpoint")
    parser.add_argument("embeddings", type=Path, help="embedding store or documented pickle")
    parser.add_argument("output", type=Path, help="results: a .pkl file, or a folder for a store")
    parser.add_argument("--split", choices=("all", "train", "eval"), default="all")
    parser.add_argument("--num_samples", type=int, help="only so many, chosen at random (default: all)")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_inference_steps", type=int, help="default: what the model was saved with")
    parser.add_argument("--solver", choices=(*SOLVER_NAMES, "dopri5"), help="default: the model's")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="times at which guidance acts",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile (and CUDA graphs), for long runs"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: bfloat16 where the processor multiplies it, else float32)",
    )
    add_tf32(parser)
    parser.add_argument("--weights", choices=("auto", "ema", "raw"), default="auto")


def run(arguments: argparse.Namespace) -> None:
    """Generate, write, and print the metrics as JSON."""
    import torch

    from blip3o_dit.inference.pipeline import BLIP3oInference

    if arguments.tf32:
        use_tf32(arguments.device)
    inference = BLIP3oInference(
        arguments.model,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        weights=arguments.weights,
        compile=arguments.compile,
    )
    results = inference.generate_from_dataset(
        arguments.embeddings,
        num_samples=arguments.num_samples,
        batch_size=arguments.batch_size,
        num_inference_steps=arguments.num_inference_steps,
        output_path=arguments.output,
        split=arguments.split,
        solver=arguments.solver,
        guidance_scale=arguments.guidance_scale,
        guidance_interval=tuple(arguments.guidance_interval),
        seed=arguments.seed,
    )
    if results:  # on the first of several processes
        sys.stdout.write(json.dumps(results["generation_metrics"], indent=2) + "\n")
