"""blip3o-dit generate: CLIP tokens for the conditions of a data set, or for pictures."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from blip3o_dit.cli.arguments import (
    add_flags,
    add_no_calibrate,
    add_tf32,
    add_weights,
    given_settings,
    use_tf32,
)
from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.data.choices import DTYPE_NAMES, QUANTIZATIONS
from blip3o_dit.flow.config import SOLVER_NAMES
from blip3o_dit.flow.solvers import ADAPTIVE_SOLVER
from blip3o_dit.utils.errors import StoppedEarly
from blip3o_dit.utils.settings import setting

if TYPE_CHECKING:
    import torch

    from blip3o_dit.inference.pipeline import BLIP3oInference

COMPUTING = "weights, device and precision"
# Flags that choose among samples, which pictures are not yet.
CHOICES_OF_SAMPLES = ("split", "num_samples")

logger = logging.getLogger(__name__)

EXAMPLES = (
    "blip3o-dit generate checkpoints/run embeddings/store generated --split eval",
    "blip3o-dit generate checkpoints/run images generated.npz --pooled",
)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The flags that are arguments of `BLIP3oInference.generate_from_dataset`, with its defaults."""

    split: str = setting(
        "all",
        "side of the training run's own split, or all samples",
        group="samples",
        choices=("all", "train", "eval"),
    )
    num_samples: int | None = setting(None, "only so many, chosen at random (default: all)")
    seed: int = setting(0, "seed of the noise")
    num_inference_steps: int | None = setting(
        None, "solver steps (default: what the model was saved with)", group="how the model samples"
    )
    solver: str | None = setting(
        None, "solver (default: the model's)", choices=(*SOLVER_NAMES, ADAPTIVE_SOLVER)
    )
    guidance_scale: float = setting(1.0, "classifier-free guidance; 1: none")
    guidance_interval: tuple[float, float] = setting((0.0, 1.0), "times at which guidance acts")
    noise_scale: float | None = None
    pooled: bool = setting(
        False, "one vector a picture, the mean over its tokens; into .npz or .pkl", group="output"
    )
    overwrite: bool = setting(False, "replace an output that is there")
    batch_size: int = setting(8, "samples at a time", group=COMPUTING)


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """The flags that name the tower which reads pictures."""

    eva: str | None = setting(
        None,
        "tower of the conditions (default: the one the model's data was made with)",
        group="for pictures",
    )
    eva_revision: str | None = setting(None, "its revision on the hub (default: as it was, or the newest)")
    eva_dtype: str | None = setting(
        None, "its precision (default: as it was, or float32)", choices=DTYPE_NAMES
    )


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument("model", help="folder of a model or checkpoint, or owner/name on the hub")
    parser.add_argument(
        "embeddings",
        metavar="data",
        type=Path,
        help="embedding store, documented pickle, or pictures as for extract",
    )
    parser.add_argument("output", type=Path, help="results: a .pkl or .npz file, or a folder for a store")
    add_flags(parser, GenerationConfig, guidance_interval={"metavar": ("LOW", "HIGH")})
    add_no_calibrate(parser.group("how the model samples"))
    add_flags(parser, TowerConfig)
    _add_computing(parser)


def _add_computing(parser: CommandParser) -> None:
    """Weights, device and precision."""
    group = parser.group(COMPUTING)
    group.add_argument(
        "--compile", action="store_true", help="torch.compile (and CUDA graphs), for long runs"
    )
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to generate (default: auto, a GPU when there is one)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        help="of the weights (default: bfloat16 where the processor multiplies it, else float32)",
    )
    group.add_argument(
        "--quantize",
        choices=QUANTIZATIONS,
        help="keep the blocks' weights in one byte each (default: do not)",
    )
    add_tf32(group)
    add_weights(group)


def run(arguments: argparse.Namespace) -> None:
    """Generate, write, and print the metrics as JSON; what was begun is gone on with."""
    from blip3o_dit.inference.output import check_output, finished_generation
    from blip3o_dit.utils.hub import model_folder

    if arguments.tf32:
        use_tf32(arguments.device)
    given = given_settings(arguments, GenerationConfig)
    arguments.model = model_folder(arguments.model, weights=arguments.weights)
    finished = finished_generation(arguments.output)
    replaces = given.get("overwrite", False) or finished is not None
    check_output(arguments.output, overwrite=replaces, pooled=given.get("pooled", False))
    generate = _generate_for_pictures if _are_pictures(arguments.embeddings) else _generate_for_embeddings
    try:
        generate(arguments, given, None if given.get("overwrite") else finished)
    except KeyboardInterrupt as error:
        _say_how_to_go_on(arguments.output, error)


def _generate_for_embeddings(
    arguments: argparse.Namespace, given: dict[str, Any], finished: dict[str, Any] | None
) -> None:
    from blip3o_dit.data.embeddings import check_sizes, open_embeddings
    from blip3o_dit.inference.from_dataset import check_apart
    from blip3o_dit.inference.request import choose_indices, describe_data
    from blip3o_dit.model.config import BLIP3oDiTConfig
    from blip3o_dit.model.loading import find_weights

    unused = given_settings(arguments, TowerConfig)
    if unused:
        raise ValueError(
            f"--{next(iter(unused))}: expected pictures, found embeddings: {arguments.embeddings}"
        )
    find_weights(arguments.model, arguments.weights)
    sizes = BLIP3oDiTConfig.from_pretrained(arguments.model).data_sizes
    source = open_embeddings(arguments.embeddings)
    check_sizes(source, sizes, arguments.model)
    check_apart(arguments.output, source)
    choice = {"split": given.get("split", "all"), "num_samples": given.get("num_samples")}
    indices = choose_indices(arguments.model, source, **choice)
    if _is_finished(arguments, given, finished, describe_data(source, indices, **choice), metrics=True):
        return
    _check_room(arguments.output, len(indices), sizes, given, true_tokens=True)
    inference = _load(arguments)
    results = inference.generate_from_dataset(source, output_path=arguments.output, **given)
    if results:  # on the first of several processes
        _print_metrics(results["generation_metrics"])


def _generate_for_pictures(
    arguments: argparse.Namespace, given: dict[str, Any], finished: dict[str, Any] | None
) -> None:
    from blip3o_dit.data.towers import read_towers
    from blip3o_dit.extraction.conditions import ImageConditions, open_tower
    from blip3o_dit.extraction.identity import describe_images
    from blip3o_dit.extraction.sources.listing import list_images
    from blip3o_dit.inference.from_conditions import generate_for_conditions
    from blip3o_dit.model.config import BLIP3oDiTConfig
    from blip3o_dit.model.loading import find_weights
    from blip3o_dit.utils.distributed import check_alone

    for name in CHOICES_OF_SAMPLES:
        if name in given:
            raise ValueError(f"--{name}: expected none with pictures: all of them are read")
    check_alone("generate from pictures (not from a store, see extract)")
    images = list_images(arguments.embeddings, progress=True)
    find_weights(arguments.model, arguments.weights)
    sizes = BLIP3oDiTConfig.from_pretrained(arguments.model).data_sizes
    towers, flags = read_towers(arguments.model), given_settings(arguments, TowerConfig)
    data = {
        "pictures": describe_images(images, progress=True),
        "tower": {"flags": flags, "recorded": (towers or {}).get("encoders", {}).get("eva")},
    }
    if _is_finished(arguments, given, finished, data, metrics=False):
        return
    _check_room(arguments.output, len(images), sizes, given, true_tokens=False)
    inference = _load(arguments)
    tower = open_tower(
        towers,
        sizes,
        arguments.model,
        name=flags.get("eva"),
        revision=flags.get("eva_revision"),
        dtype=flags.get("eva_dtype"),
        device=inference.device,
    )
    conditions = ImageConditions(images, tower, num_tokens=sizes[0], skipped=list(images.skipped))
    about = {"pictures": str(arguments.embeddings), "tower": tower.name}
    results = generate_for_conditions(
        inference, conditions, arguments.output, data=data, about=about, **given
    )
    skipped = _list_skipped(arguments.output, conditions.skipped)
    logger.info(
        "%s: %d pictures%s; no true tokens: no metrics",
        arguments.output,
        results["config"]["num_samples"],
        f", {len(conditions.skipped)} skipped, see {skipped}" if conditions.skipped else "",
    )


def _is_finished(
    arguments: argparse.Namespace,
    given: dict[str, Any],
    finished: dict[str, Any] | None,
    data: dict[str, Any],
    *,
    metrics: bool,
) -> bool:
    """Whether the output holds what is asked for, whole; looked at before a model is loaded.

    Args:
        finished: what `finished_generation` found, if it is not to be replaced.
        data: what tells the samples from others.

    Raises:
        ValueError: when another generation, finished or not, is there.
    """
    from dataclasses import fields

    from blip3o_dit.inference.pipeline import pick_dtype
    from blip3o_dit.inference.request import (
        NOTED,
        Sampling,
        describe_model,
        describe_request,
        differences,
    )
    from blip3o_dit.inference.unfinished import Unfinished
    from blip3o_dit.model.config import BLIP3oDiTConfig
    from blip3o_dit.model.loading import find_weights
    from blip3o_dit.utils.distributed import pick_device

    device, folder = pick_device(arguments.device), arguments.model
    sampling = Sampling(**{each.name: given[each.name] for each in fields(Sampling) if each.name in given})
    request = describe_request(
        describe_model(folder, find_weights(folder, arguments.weights)),
        data,
        sampling.resolved(BLIP3oDiTConfig.from_pretrained(folder)),
        dtype=pick_dtype(_dtype(arguments), device),
        quantize=arguments.quantize,
        device=device,
        batch_size=given.get("batch_size", GenerationConfig.batch_size),
        pooled=given.get("pooled", False),
        metrics=metrics,
    )
    unfinished = Unfinished(arguments.output)
    if finished is None:
        unfinished.find(request, overwrite=given.get("overwrite", False))
        return False
    different = differences(finished["request"], request, leave_out=(NOTED, "version"))
    if different:
        raise ValueError(
            f"{arguments.output}: holds a finished generation with another request "
            f"({'; '.join(different[:4])}): choose another output, or replace it (--overwrite)"
        )
    unfinished.clear()  # of a process that was killed in the last moment
    logger.info("%s: this generation is finished already", arguments.output)
    _print_metrics(finished["metrics"])
    return True


def _print_metrics(metrics: dict[str, float] | None) -> None:
    if metrics is not None:
        sys.stdout.write(json.dumps(metrics, indent=2) + "\n")


def _say_how_to_go_on(output: Path, error: KeyboardInterrupt) -> NoReturn:
    """Raises what ends the command: that samples are kept, where there are any."""
    from blip3o_dit.inference.unfinished import Unfinished

    if not Unfinished(output).has_samples():
        raise error
    raise StoppedEarly(f"{output}: what is generated is kept: the same command goes on") from error


def _are_pictures(path: Path) -> bool:
    """Whether `data` is read with a tower: what is no store and no file or table of embeddings."""
    from blip3o_dit.data.manifest import MANIFEST
    from blip3o_dit.data.table_files import holds_tokens
    from blip3o_dit.extraction.sources.listing import names_pictures

    if path.is_dir():
        names = {file.name for file in path.iterdir()}
        embeddings = MANIFEST in names or any(name.endswith((".npy", ".safetensors")) for name in names)
        return not embeddings and not holds_tokens(path)
    return names_pictures(path) and not holds_tokens(path)


def _list_skipped(output: Path, skipped: list[dict[str, str]]) -> Path:
    """The list of pictures that could not be read, in a store or beside a file; none if there are none."""
    from blip3o_dit.extraction.resume import SKIPPED_FILE
    from blip3o_dit.inference.output import is_file_output
    from blip3o_dit.utils.atomic import write_atomically

    file = output.with_suffix(f".{SKIPPED_FILE}") if is_file_output(output) else output / SKIPPED_FILE
    if skipped:
        write_atomically(file, "".join(json.dumps(image) + "\n" for image in skipped).encode())
    else:
        file.unlink(missing_ok=True)
    return file


def _dtype(arguments: argparse.Namespace) -> torch.dtype | None:
    import torch

    return getattr(torch, arguments.dtype) if arguments.dtype else None


def _load(arguments: argparse.Namespace) -> BLIP3oInference:
    from blip3o_dit.inference.pipeline import BLIP3oInference

    logger.info("loading the model %s", arguments.model)
    return BLIP3oInference(
        arguments.model,
        device=arguments.device,
        dtype=_dtype(arguments),
        weights=arguments.weights,
        quantize=arguments.quantize,
        compile=arguments.compile,
    )


def _check_room(
    output: Path, count: int, sizes: tuple[int, int, int], given: dict[str, Any], *, true_tokens: bool
) -> None:
    """Refuse one file of more samples than this machine's memory holds, which a store would not need."""
    import torch

    from blip3o_dit.inference.output import bytes_in_file, is_file_output
    from blip3o_dit.training.memory import GIB, resident, room_on

    if not is_file_output(output):
        return
    needed = bytes_in_file(count, sizes, pooled=given.get("pooled", False), true_tokens=true_tokens)
    room = room_on(torch.device("cpu"))
    free = max(0, room.size - resident())
    if needed > free:
        raise ValueError(
            f"{output}: {count} samples in one file take {needed / GIB:.1f} GiB of memory, found "
            f"{free / GIB:.1f} GiB {room.where}: give a folder's name, for a store, or fewer --num_samples"
        )
