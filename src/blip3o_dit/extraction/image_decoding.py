"""Bytes to an RGB image, or the reason why not. Never a placeholder image."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from blip3o_dit.extraction.sources.formats import register_plugins
from blip3o_dit.extraction.sources.listing import list_images
from blip3o_dit.utils.json_files import one_line

MAX_PIXELS = 178_956_970  # Pillow refuses more than this by itself

# What Pillow raises on files that it cannot read, format by format.
_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


class UnreadableImageError(ValueError):
    """The bytes cannot be decoded to an image; the message is the reason, without a file name."""


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """RGB, 8 bits a channel, upright (EXIF orientation applied), first frame, transparency over white.

    Args:
        max_pixels: larger images are refused by their header, before anything is decoded.

    Raises:
        UnreadableImageError: with the reason in one short line.
    """
    if not data:
        raise UnreadableImageError("empty file")
    register_plugins()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb and EXIF warnings; the size is checked here
            with Image.open(BytesIO(data)) as image:
                _check_size(image, max_pixels)
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, twice its MAX_IMAGE_PIXELS
        raise UnreadableImageError(f"too large: {error}") from None
    except UnidentifiedImageError:
        raise UnreadableImageError("not a picture, or of an unknown format") from None
    except _UNREADABLE as error:
        raise UnreadableImageError(f"damaged: {one_line(error, max_length=120)}") from error


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise UnreadableImageError(f"no area: {width} x {height}")
    if width * height > max_pixels:
        raise UnreadableImageError(f"too large: {width} x {height} is above {max_pixels} pixels")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey (and 32-bit containers of it) scaled to 0..255; Pillow's own conversion would clip."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0:
        raise UnreadableImageError(f"pixel values out of range: {values.min()} to {values.max()}")
    if values.max() > 65535:
        raise UnreadableImageError(f"pixel values out of range: up to {values.max():.0f}")
    floating = image.mode == "F" and values.max() <= 1.0
    scale = 255.0 if floating else 255.0 / 65535.0
    return Image.fromarray(np.rint(values * scale).astype(np.uint8), mode="L")


def pictures_by_key(where: str | None) -> Callable[[list[str]], list[Image.Image | None]]:
    """A function from keys to RGB images, None for those that are not at `where` or cannot be read.

    Raises:
        FileNotFoundError, ValueError: when nothing can be listed at `where`.
    """
    refs = {ref.key: ref for ref in list_images(where)} if where else {}

    def read(key: str) -> Image.Image | None:
        try:
            return decode_image(refs[key].read()) if key in refs else None
        except (OSError, ValueError):
            return None

    return lambda keys: [read(key) for key in keys]
