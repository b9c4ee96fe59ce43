"""blip3o-dit inspect: a store, with a sheet of token maps, or a model, checkpoint, run or decoder."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from blip3o_dit.cli.parser import CommandParser
from blip3o_dit.utils.progress import progress

logger = logging.getLogger(__name__)

EXAMPLES = (
    "blip3o-dit inspect embeddings/store",
    "blip3o-dit inspect embeddings/store --pictures images --samples 12 --output sheet.png",
    "blip3o-dit inspect checkpoints/run",
)


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument(
        "embeddings",
        metavar="path",
        help="embedding store, documented pickle, checkpoint, folder of a run, a model or decoder (folder, "
        "or owner/name on the hub)",
    )
    parser.add_argument(
        "--output",
        dest="picture",
        metavar="PNG",
        type=Path,
        help="picture of a few samples to write (default: beside the store)",
    )
    parser.add_former_name("picture", "output")
    parser.add_argument("--no_picture", action="store_true", help="text only")
    parser.add_argument(
        "--pictures",
        metavar="WHERE",
        help="where the pictures are, as for extract (default: where the store was made from)",
    )
    parser.add_argument("--samples", type=int, default=6, metavar="N", help="samples in the picture")
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help="also write the findings as JSON; without a file to the output, in place of the text "
        "(default: do not)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the samples")


def run(arguments: argparse.Namespace) -> None:
    from blip3o_dit.data.remote_shards import is_store_address
    from blip3o_dit.utils.hub import model_folder
    from blip3o_dit.utils.recognise import TRAINED, recognise

    if is_store_address(arguments.embeddings):
        _run_on_embeddings(arguments)
        return
    arguments.embeddings = model_folder(arguments.embeddings)
    kind = recognise(arguments.embeddings).kind
    if kind in TRAINED:
        _run_on_model(arguments)
    elif kind == "decoder":
        _run_on_decoder(arguments)
    else:
        _run_on_embeddings(arguments)


def _run_on_model(arguments: argparse.Namespace) -> None:
    from blip3o_dit.training.describe import describe, format_description

    about = describe(arguments.embeddings)
    _write(about, format_description(about), arguments.json)


def _run_on_decoder(arguments: argparse.Namespace) -> None:
    from blip3o_dit.decoder.folder import describe_decoder, format_decoder

    about = describe_decoder(arguments.embeddings)
    _write(about, format_decoder(about), arguments.json)


def _run_on_embeddings(arguments: argparse.Namespace) -> None:
    from blip3o_dit.data.embeddings import open_embeddings
    from blip3o_dit.extraction.inspection import format_inspection, inspect_embeddings
    from blip3o_dit.extraction.shown_images import pictures_of_store
    from blip3o_dit.utils.addresses import Address

    source = open_embeddings(arguments.embeddings)
    if arguments.samples < 1:
        raise ValueError(f"--samples: expected at least 1, found {arguments.samples}")
    pictures = pictures_of_store(getattr(source, "manifest", {}), arguments.pictures)
    reading = partial(progress, what=f"reading {arguments.embeddings}", unit="batch", lasting=False)
    inspection = inspect_embeddings(source, progress=reading)
    _write(asdict(inspection), format_inspection(inspection), arguments.json)
    if not arguments.no_picture:
        path = Path(source.path.name) if isinstance(source.path, Address) else source.path.resolve()
        target = arguments.picture or path.with_name(f"{path.stem}_inspection.png")
        _draw(source, target, arguments, pictures)
        logger.info("the picture: %s", target)


def _write(findings: dict[str, Any], text: str, json_file: str | None) -> None:
    """The text on standard output, and JSON in a file; or JSON alone there, for "-"."""
    as_json = json.dumps(findings, indent=2) + "\n"
    sys.stdout.write(as_json if json_file == "-" else text)
    if json_file not in (None, "-"):
        Path(json_file).write_text(as_json)


def _draw(source: Any, target: Path, arguments: argparse.Namespace, pictures: Any) -> None:
    from blip3o_dit.extraction.inspection import draw_contact_sheet
    from blip3o_dit.utils.stateless_random import stateless_choice

    count, seed = arguments.samples, arguments.seed
    chosen = stateless_choice(source.num_samples, count, seed=seed, stream="contact sheet").tolist()
    records = source.records(chosen)
    eva, clip = source.fetch(chosen)
    titles = [(_cut(record["key"]), _cut(record.get("caption") or "")) for record in records]
    found = pictures([record["key"] for record in records])
    draw_contact_sheet(target, eva=eva, clip=clip, pictures=found, titles=titles)


def _cut(text: str, length: int = 32) -> str:
    """Beginning and end, where the whole does not fit beside the pictures."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"
