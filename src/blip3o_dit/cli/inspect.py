"""blip3o-dit inspect: what is in a store, as text and as a sheet of token maps."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("embeddings", type=Path, help="embedding store or documented pickle")
    parser.add_argument("--picture", type=Path, help="PNG to write (default: beside the store)")
    parser.add_argument("--no-picture", action="store_true", help="text only")
    parser.add_argument("--pictures", help="where the pictures are, as for extract")
    parser.add_argument("--samples", type=int, default=6, help="samples in the picture")
    parser.add_argument("--json", type=Path, help="also write the findings as JSON")
    parser.add_argument("--seed", type=int, default=0, help="chooses the samples")


def run(arguments: argparse.Namespace) -> None:
    from functools import partial

    from tqdm.auto import tqdm

    from blip3o_dit.data.embeddings import open_embeddings
    from blip3o_dit.extraction.inspection import format_inspection, inspect_embeddings
    from blip3o_dit.extraction.shown_images import pictures_of_store

    source = open_embeddings(arguments.embeddings)
    if arguments.samples < 1:
        raise ValueError(f"--samples: expected at least 1, found {arguments.samples}")
    pictures = pictures_of_store(getattr(source, "manifest", {}), arguments.pictures)
    inspection = inspect_embeddings(source, progress=partial(tqdm, unit="batch", desc="reading", leave=False))
    sys.stdout.write(format_inspection(inspection))
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(inspection), indent=2) + "\n")
    if not arguments.no_picture:
        path = arguments.embeddings
        target = arguments.picture or path.with_name(f"{path.stem}_inspection.png")
        _draw(source, target, arguments, pictures)
        logger.info("the picture: %s", target)


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
