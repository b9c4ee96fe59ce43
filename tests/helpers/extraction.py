"""A folder of small images, some broken, and a small extraction of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blip3o_dit.extraction.config import ExtractionConfig
from blip3o_dit.extraction.extract import extract

COUNT, BROKEN = 22, {"b/07.png": b"", "b/13.png": b"not a picture"}


def write_images(folder: Path, count: int = COUNT, broken: dict[str, bytes] = BROKEN) -> Path:
    """Images a/00.png to a/04.png and b/05.png ..., the first with a caption."""
    generator = np.random.default_rng(0)
    for index in range(count):
        path = folder / ("a" if index < 5 else "b") / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    for name, data in broken.items():
        (folder / name).write_bytes(data)
    (folder / "a" / "00.txt").write_text("the first picture")
    return folder


def settings(images: Path, output: Path, **changes: Any) -> ExtractionConfig:
    config = ExtractionConfig(
        images=str(images),
        output=str(output),
        towers_from_scratch=True,
        batch_size=4,
        shard_size=6,
        workers=0,
        device="cpu",
    )
    return replace(config, **changes)


def extract_silently(config: ExtractionConfig) -> None:
    """What each of several processes does."""
    extract(config, progress=False)


def content(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name; not what is in its folders."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.is_file()}
