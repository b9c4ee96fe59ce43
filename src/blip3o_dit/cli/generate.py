"""blip3o-dit generate: CLIP tokens for the conditions of a data set."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from blip3o_dit.cli.arguments import add_flags, add_tf32, given_settings, use_tf32
from blip3o_dit.flow.config import SOLVER_NAMES
from blip3o_dit.utils.settings import setting


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The flags that are arguments of `BLIP3oInference.generate_from_dataset`, with its defaults."""

    split: str = setting(
        "all", "side of the training run's own split, or all samples", choices=("all", "train", "eval")
    )
    num_samples: int | None = setting(None, "only so many, chosen at random (default: all)")
    batch_size: int = setting(8, "samples at a time")
    num_inference_steps: int | None = setting(None, "solver steps (default: what the model was saved with)")
    solver: str | None = setting(None, "solver (default: the model's)", choices=(*SOLVER_NAMES, "dopri5"))
    guidance_scale: float = setting(1.0, "classifier-free guidance; 1: none")
    guidance_interval: tuple[float, float] = setting((0.0, 1.0), "times at which guidance acts")
    seed: int = setting(0, "seed of the noise")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="output folder of a training run, or a checkpoint")
    parser.add_argument("embeddings", type=Path, help="embedding store or documented pickle")
    parser.add_argument("output", type=Path, help="results: a .pkl file, or a folder for a store")
    add_flags(parser, GenerationConfig, guidance_interval={"metavar": ("LOW", "HIGH")})
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile (and CUDA graphs), for long runs"
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to generate (default: auto, a GPU when there is one)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: bfloat16 where the processor multiplies it, else float32)",
    )
    add_tf32(parser)
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        default="auto",
        help="averaged (ema) or last (raw) weights (default: auto, averaged where there are any)",
    )


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
        output_path=arguments.output,
        **given_settings(arguments, GenerationConfig),
    )
    if results:  # on the first of several processes
        sys.stdout.write(json.dumps(results["generation_metrics"], indent=2) + "\n")
