"""Bytes to an RGB picture, or the reason why not. Never a stand-in picture."""

from __future__ import annotations

import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from blip3o_dit.utils.json_files import one_line

MOST_PIXELS = 178_956_970  # Pillow refuses more than this by itself

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


class UnreadablePictureError(ValueError):
    """The bytes are no picture that can be shown; the message is the reason, without a file name."""


def decode_picture(data: bytes, *, max_pixels: int = MOST_PIXELS) -> Image.Image:
    """RGB, 8 bits a channel, upright (EXIF orientation applied), first frame, transparency over white.

    Args:
        max_pixels: larger pictures are refused by their header, before anything is decoded.

    Raises:
        UnreadablePictureError: with the reason in one short line.
    """
    if not data:
        raise UnreadablePictureError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb and EXIF warnings; the size is checked here
            with Image.open(BytesIO(data)) as picture:
                _check_size(picture, max_pixels)
                picture.load()
                return _to_rgb(ImageOps.exif_transpose(picture))
    except UnreadablePictureError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, twice its MAX_IMAGE_PIXELS
        raise UnreadablePictureError(f"too large: {error}") from None
    except UnidentifiedImageError:
        raise UnreadablePictureError("not a picture, or of an unknown format") from None
    except _UNREADABLE as error:
        raise UnreadablePictureError(f"damaged: {one_line(error, max_length=120)}") from error


def _check_size(picture: Image.Image, max_pixels: int) -> None:
    width, height = picture.size
    if width < 1 or height < 1:
        raise UnreadablePictureError(f"no area: {width} x {height}")
    if width * height > max_pixels:
        raise UnreadablePictureError(f"too large: {width} x {height} is above {max_pixels} pixels")


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _to_eight_bits(picture)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        over = picture.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    return picture.convert("RGB")


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey (and 32-bit containers of it) scaled to 0..255; Pillow's own conversion would clip."""
    values = np.asarray(picture).astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0:
        raise UnreadablePictureError(f"pixel values out of range: {values.min()} to {values.max()}")
    if values.max() > 65535:
        raise UnreadablePictureError(f"pixel values out of range: up to {values.max():.0f}")
    floating = picture.mode == "F" and values.max() <= 1.0
    scale = 255.0 if floating else 255.0 / 65535.0
    return Image.fromarray(np.rint(values * scale).astype(np.uint8), mode="L")
