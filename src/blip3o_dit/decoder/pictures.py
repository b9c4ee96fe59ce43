"""The pictures of a store's samples, small and in memory, and how near one picture is to another."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.extraction.shown_images import Shown
from blip3o_dit.utils.progress import working

# Samples whose pictures are asked for at a time
ASKED_AT_ONCE = 256
# Mean squared error of a picture that counts as exact: PSNR ends at 60 dB.
EXACT = 1e-6

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pictures:
    """Samples whose pictures were found: their `indices` [n], ascending, and `pixels`, uint8 [n, S, S, 3]."""

    indices: np.ndarray
    pixels: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def floats(self, rows: np.ndarray | slice) -> Tensor:
        """Some of the pictures, [B, 3, S, S] in 0..1."""
        return self.pixels[rows].permute(0, 3, 1, 2).float() / 255


def read_pictures(
    shown: Shown, source: Embeddings, indices: np.ndarray, size: int, where: str | Path
) -> Pictures:
    """What the target's tower saw of these samples' pictures, size x size pixels.

    Samples without one are left out, and counted in the log.

    Args:
        indices: ascending. where: of the pictures, for messages.

    Raises:
        ValueError: when none is found.
    """
    pixels = torch.empty(len(indices), size, size, 3, dtype=torch.uint8)
    found: list[int] = []
    with working(f"reading {len(indices)} pictures", len(indices), "picture") as count:
        for piece in batches(indices, ASKED_AT_ONCE):
            views = shown([record["key"] for record in source.records(piece)])
            for index, of_sample in zip(piece, views, strict=True):
                if of_sample:
                    *_, seen_by_clip = of_sample.values()
                    pixels[len(found)] = _square(seen_by_clip, size)
                    found.append(int(index))
            count(len(piece))
    if not found:
        raise ValueError(
            f"{where}: expected pictures with the keys of {source.path}, found none of {len(indices)}"
        )
    if len(found) < len(indices):
        logger.warning("%s: %d of %d pictures are not there", where, len(indices) - len(found), len(indices))
    return Pictures(np.asarray(found), pixels[: len(found)])


def _square(picture: Image.Image, size: int) -> Tensor:
    """uint8 [size, size, 3]: the middle of a picture that is not square."""
    if picture.size != (size, size):
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture.convert("RGB")))


def quality(found: Tensor, true: Tensor) -> dict[str, np.ndarray]:
    """Of each picture, uint8 [n, S, S, 3]: `psnr` in dB, at most 60, and `l1`, mean of absolute errors."""
    error = (found.float() - true.float()).flatten(1) / 255
    psnr = -10 * error.square().mean(dim=1).clamp(min=EXACT).log10()
    return {"psnr": psnr.double().numpy(), "l1": error.abs().mean(dim=1).double().numpy()}
