"""blip3o-dit translate: vectors of one embedding model become another's, for an index."""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

from blip3o_dit.cli.arguments import add_flags, add_no_calibrate, add_weights, given_settings
from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.data.choices import WAYS
from blip3o_dit.flow.config import SOLVER_NAMES
from blip3o_dit.utils.errors import StoppedEarly
from blip3o_dit.utils.progress import working
from blip3o_dit.utils.settings import setting

EXAMPLES = (
    "blip3o-dit translate checkpoints/run old.npy new.npy",
    "blip3o-dit translate checkpoints/run old.parquet new.parquet --column embedding",
)

SAMPLING = "how the model samples"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TranslationConfig:
    """The flags that are arguments of `translate_file`, with its defaults."""

    column: str | None = setting(
        None, "array or column of the vectors (default: the only one of the model's width)", group="vectors"
    )
    way: str | None = setting(
        None,
        "the mean by one network call from each draw's noise, the mean of the draws, or the first of them "
        "(default: estimate; mean for a student)",
        choices=WAYS,
    )
    draws: int = setting(8, "draws of each vector, by which its spread is measured", group=SAMPLING)
    seed: int = setting(0, "seed of the noise")
    num_inference_steps: int | None = setting(None, "solver steps (default: what the model was saved with)")
    solver: str | None = setting(None, "solver (default: the model's)", choices=SOLVER_NAMES)
    noise_scale: float | None = None
    overwrite: bool = setting(False, "replace an output that is there", group="output")
    batch_size: int = setting(256, "vectors at a time", group="weights and device")


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("model", help="folder of a model or checkpoint, or owner/name on the hub")
    parser.add_argument(
        "vectors", type=Path, help="the old model's: .npy, .npz, .safetensors or .parquet, one a row"
    )
    parser.add_argument(
        "output", type=Path, help="the new model's: .parquet, or .npy and the spread in .spread.npy"
    )
    add_flags(parser, TranslationConfig)
    add_no_calibrate(parser.group(SAMPLING))
    group = parser.group("weights and device")
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute (default: auto, a GPU when there is one)",
    )
    add_weights(group)


def run(arguments: argparse.Namespace) -> None:
    with working("loading torch and transformers"):
        from blip3o_dit.data.vector_files import check_vector_output
        from blip3o_dit.inference.pipeline import BLIP3oInference
        from blip3o_dit.inference.translate import translate_file
        from blip3o_dit.inference.unfinished import Unfinished
        from blip3o_dit.utils.distributed import check_alone

    check_alone("translate")
    given = given_settings(arguments, TranslationConfig)
    check_vector_output(arguments.output, given.get("overwrite", False))  # before a model is loaded
    inference = BLIP3oInference(arguments.model, device=arguments.device, weights=arguments.weights)
    try:
        count = translate_file(inference, arguments.vectors, arguments.output, **given)
    except KeyboardInterrupt as error:
        if not Unfinished(arguments.output, file=True).has_samples():
            raise
        raise StoppedEarly(
            f"{arguments.output}: what is translated is kept: the same command goes on"
        ) from error
    logger.info("%s: %d vectors, with the spread of each", arguments.output, count)
