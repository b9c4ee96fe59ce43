"""A few samples on the page: pictures and token maps, a small image each, in strips that fit a phone."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from blip3o_dit.utils.pca_colors import pca_colors

# Samples side by side, which a phone has room for
PER_BLOCK = 6
MAP_PIXELS, PICTURE_PIXELS = 128, 192  # a side


@dataclass(frozen=True)
class ShownSamples:
    """name -> tokens [k, N, C], the reference first; a title of each sample; name -> picture, of each;
    name -> decoded pictures, uint8 [k, S, S, 3]."""

    rows: Mapping[str, np.ndarray]
    titles: Sequence[str]
    pictures: Sequence[Mapping[str, Any]] = ()
    decoded: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Strip:
    """One row of a block: an address (data:) for each sample, "" where there is no image."""

    name: str
    images: list[str]


@dataclass(frozen=True)
class Block:
    """Some of the samples, by their numbers from 1."""

    numbers: list[int]
    strips: list[Strip]


def blocks(samples: ShownSamples) -> Iterator[Block]:
    """The samples, `PER_BLOCK` at a time, with all rows of each."""
    strips = [
        *_picture_strips(samples.pictures),
        *(
            Strip(name, [_picture(Image.fromarray(pixels)) for pixels in pictures])
            for name, pictures in samples.decoded.items()
        ),
        *_map_strips(samples.rows),
    ]
    for start in range(0, len(samples.titles), PER_BLOCK):
        chosen = slice(start, min(start + PER_BLOCK, len(samples.titles)))
        yield Block(
            list(range(start + 1, chosen.stop + 1)),
            [Strip(strip.name, strip.images[chosen]) for strip in strips],
        )


def _picture_strips(pictures: Sequence[Mapping[str, Any]]) -> Iterable[Strip]:
    """One strip for each name that a picture has."""
    names = dict.fromkeys(name for views in pictures for name in views)
    return [
        Strip(name, [_picture(views[name]) if name in views else "" for views in pictures]) for name in names
    ]


def _map_strips(rows: Mapping[str, np.ndarray]) -> Iterable[Strip]:
    """Colours are three principal components of the reference tokens of all samples."""
    reference = next(iter(rows.values()))
    side = math.isqrt(reference.shape[1])
    maps = {name: pca_colors(tokens, reference).reshape(-1, side, side, 3) for name, tokens in rows.items()}
    return [Strip(name, [_map(colors) for colors in found]) for name, found in maps.items()]


def _map(colors: np.ndarray) -> str:
    """Colours [n, n, 3] in 0..1, each token a square of whole pixels."""
    pixels = np.rint(255 * colors).astype(np.uint8)
    scale = max(1, MAP_PIXELS // len(pixels))
    return data_address(Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1)), "PNG")


def _picture(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    return data_address(small, "JPEG", quality=88)


def data_address(image: Image.Image, kind: str, **options: Any) -> str:
    """An image of the format `kind` as an address (data:) that a page needs no file for."""
    buffer = io.BytesIO()
    image.save(buffer, format=kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
