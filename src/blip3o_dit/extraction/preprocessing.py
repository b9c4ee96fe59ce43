"""From an image to a vision tower's input: resize and crop on the CPU, normalise on any device."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip3o_dit.extraction.image_decoding import UnreadableImageError
from blip3o_dit.utils.json_files import one_line

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Pillow's numbers, which preprocessor_config.json holds
RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}
# Pixels a side that a tower may ask for
MAX_SIDE = 2**13
# An image that would be scaled to more pixels than this, to keep a square of them, is cropped before
MAX_SCALED_PIXELS = 2**24
# Source pixels that a filter reads to each side of a point (Lanczos), in units of the scale
_FILTER_SUPPORT = 3


@dataclass(frozen=True)
class Preprocessing:
    """From an image to a tower's input, bit for bit as transformers' image processors on Pillow.

    `resize` is "shortest" (the shorter side to `resize_to`) or "squash" (both sides to it, whatever the
    aspect ratio), where None is `size`, or "crop" (as it is); then the central square of `size` is cropped.
    "none" takes images of exactly `size`. Values are multiplied by `rescale`, less `mean`, over `std`.

    Not `AutoImageProcessor`: it refuses a folder whose preprocessor_config.json names no processor, unless
    it knows the config's model type, and `clip_vision_model` is not among those.
    """

    size: int
    resize: str = "shortest"
    resample: str = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resize_to: int | None = None
    rescale: float = 1 / 255

    @property
    def geometry(self) -> Hashable:
        """What decides `pixels`: equal for towers that can share them."""
        return (self.size, self.resize, self.resample, self.resize_to or self.size)

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image -> float32 [3, size, size]."""
        return self.normalize(self.pixels(image))

    def pixels(self, image: Image.Image) -> Tensor:
        """RGB image -> uint8 [3, size, size], resized and cropped.

        Raises:
            UnreadableImageError: for an image that cannot be prepared so, with the reason.
        """
        try:
            square = self._square(image)
        except (MemoryError, OSError, ValueError) as error:
            reason = one_line(error, max_length=120)
            raise UnreadableImageError(f"cannot be resized: {reason}") from error
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()

    def normalize(self, pixels: Tensor) -> Tensor:
        """uint8 [..., 3, size, size] on any device -> float32 there; the same bits on every device."""
        # Divided by tensors of the device: for plain numbers kernels multiply by a rounded reciprocal
        mean, std = (
            torch.tensor(values)[:, None, None].to(pixels.device) for values in (self.mean, self.std)
        )
        scale = torch.tensor(1 / self.rescale).to(pixels.device)
        return pixels.float().div_(scale).sub_(mean).div_(std)

    def at(self, size: int) -> Preprocessing:
        """For a tower that is given pictures of another size: the same part of each picture."""
        to = self.resize_to and round(self.resize_to * size / self.size)
        return replace(self, size=size, resize_to=to)

    def describe(self) -> dict[str, Any]:
        """What the manifest says of it; JSON values. Settings that most towers lack are left out."""
        values = json.loads(json.dumps(asdict(self)))
        usual = {"resize_to": None, "rescale": Preprocessing.rescale}
        return {name: value for name, value in values.items() if (name, value) not in usual.items()}

    def _square(self, image: Image.Image) -> Image.Image:
        if self.resize == "none" and image.size != (self.size, self.size):
            found = f"{image.width} x {image.height}"
            raise ValueError(f"the tower takes {self.size} x {self.size} pixels as they are, found {found}")
        if self.resize in ("shortest", "squash"):
            image = self._resized(image)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        return image.crop((left, top, left + self.size, top + self.size))

    def _resized(self, image: Image.Image) -> Image.Image:
        scaled = self._scaled_size(image)
        resampling = Image.Resampling(RESAMPLING[self.resample])
        if math.prod(scaled) <= MAX_SCALED_PIXELS:
            return image.resize(scaled, resampling)
        # Only what the crop will keep, from the part it is made of: within one level of 255 of the same
        kept = (min(self.size, scaled[0]), min(self.size, scaled[1]))
        spans = [_span(*lengths) for lengths in zip(image.size, scaled, kept, strict=True)]
        (left, right), (top, bottom) = ((start, end) for start, end, _ in spans)
        (x0, x1), (y0, y1) = (box for _, _, box in spans)
        part = image.crop((left, top, right, bottom))
        return part.resize(kept, resampling, box=(x0, y0, x1, y1))

    def _scaled_size(self, image: Image.Image) -> tuple[int, int]:
        target, (width, height) = self.resize_to or self.size, image.size
        if self.resize == "squash":
            return target, target
        short, long = min(width, height), max(width, height)
        scaled = int(target * long / short)  # truncated, as transformers' image processors do
        return (target, scaled) if width <= height else (scaled, target)


def _span(length: int, scaled: int, kept: int) -> tuple[int, int, tuple[float, float]]:
    """The `kept` central pixels of `scaled`, in an image side of `length`.

    Returns the part of it that they are made of, from pixel to pixel, and where they lie in that part.
    """
    scale = length / scaled
    first = (scaled - kept) // 2 * scale
    last = min(first + kept * scale, length)
    margin = math.ceil(_FILTER_SUPPORT * max(scale, 1.0)) + 1
    start, end = max(0, math.floor(first) - margin), min(length, math.ceil(last) + margin)
    return start, end, (first - start, last - start)
