"""Bytes to an RGB image, or the reason why not. Never a placeholder image."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from blip3o_dit.extraction.config import MAX_PIXELS
from blip3o_dit.extraction.sources.formats import picture_formats
from blip3o_dit.utils.json_files import one_line

# Larger ones are decoded at half their size: the format's decoder takes 20 bytes a pixel
MAX_JPEG2000_PIXELS = 2**25
# Pixels that are converted at a time where that takes more memory than the picture
TILE_PIXELS = 2**18
# In a decoded image's `info`: how grey values of more than 8 bits were scaled
SCALED = "grey values scaled"

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow raises on files that it cannot read, format by format.
_UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
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


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, shown_at: int | None = None) -> Image.Image:
    """RGB, 8 bits a channel, upright (EXIF orientation applied), first frame, transparency over white.

    Takes at most 4 times the bytes of the decoded pixels (1 to 4 a pixel) and 200 MB. Grey values of more
    than 8 bits are scaled by what they hold, and `image.info[SCALED]` says how.

    Args:
        max_pixels: larger images are refused by their header, before anything is decoded.
        shown_at: for people only: smaller where that saves memory, but at least so many pixels a side.

    Raises:
        UnreadableImageError: with the reason in one short line.
    """
    if not data:
        raise UnreadableImageError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's bomb and EXIF warnings; the size is checked here
            with Image.open(BytesIO(data), formats=picture_formats()) as image:
                _check_size(image, max_pixels)
                if image.format == "JPEG2000" and image.width * image.height > MAX_JPEG2000_PIXELS:
                    image.reduce = 1  # type: ignore[assignment, method-assign]
                if shown_at:
                    image.draft(None, (shown_at, shown_at))  # what the format's decoder can leave out
                image.load()
                rgb = _to_rgb(_upright(image, shown_at))
            rgb.info = {SCALED: rgb.info[SCALED]} if SCALED in rgb.info else {}
            return rgb
    except UnreadableImageError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, twice its MAX_IMAGE_PIXELS
        raise UnreadableImageError(f"too large: {error}") from None
    except UnidentifiedImageError:
        raise UnreadableImageError("not a picture, or of an unknown format") from None
    except MemoryError:
        raise UnreadableImageError("takes more memory than there is") from None
    except _UNREADABLE as error:
        raise UnreadableImageError(f"damaged: {one_line(error, max_length=120)}") from error


def _reduced(image: Image.Image, least: int) -> Image.Image:
    """Means over squares of pixels, at least so many a side; the image's own pixels are freed."""
    factor = min(image.size) // least
    if factor < 2 or image.mode not in ("RGB", "L", "CMYK") or "transparency" in image.info:
        return image
    reduced = image.reduce(factor)
    image.close()
    return reduced


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise UnreadableImageError(f"no area: {width} x {height}")
    if width * height > max_pixels:
        raise UnreadableImageError(f"too large: {width} x {height} is above {max_pixels} pixels")


def _upright(image: Image.Image, shown_at: int | None) -> Image.Image:
    """As the EXIF or XMP orientation says. A damaged one is none: the picture itself was read."""
    try:
        method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (*_UNREADABLE, AssertionError):
        method = None
    if shown_at:
        image = _reduced(image, shown_at)
    if method is None:
        return image
    turned = image.transpose(method)
    image.close()  # frees its pixels
    return turned


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_rgb(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return _tile_by_tile(image, "RGB", _over_white)
    return image.convert("RGB")


def _over_white(tile: Image.Image) -> Image.Image:
    over = tile.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    """Integers of 16 or 32 bits and floats, scaled to 0..255 by what they hold: see docs/towers.md."""
    low, high = _value_range(image)
    white = next((value for value in _possible_whites(image) if high <= value), None)
    if white is None or low < 0:  # NaN is below nothing
        raise UnreadableImageError(
            f"pixel values out of range: expected 0 to 65535, found {low:g} to {high:g}"
        )
    factor = 255.0 / white

    def scaled(tile: Image.Image) -> Image.Image:
        return Image.fromarray(np.rint(np.asarray(tile).astype(np.float64) * factor).astype(np.uint8))

    rgb = _tile_by_tile(image, "L", scaled).convert("RGB")
    rgb.info[SCALED] = f"{'floats' if image.mode == 'F' else 'integers'} up to {high:g}: {white} is white"
    return rgb


def _value_range(image: Image.Image) -> tuple[float, float]:
    """Smallest and largest value; NaN if there is one."""
    tiles = (np.asarray(image.crop(box)) for box in _tiles(image))
    ranges = [(float(values.min()), float(values.max())) for values in tiles]
    return float(np.min(ranges)), float(np.max(ranges))


def _possible_whites(image: Image.Image) -> tuple[int, ...]:
    """The values that may be white, smallest first; a file that does not say is judged by its largest."""
    if image.mode == "F":
        return (1, 255, 65535)
    sixteen_bit = image.mode != "I" or image.format in ("PNG", "PPM")
    return (65535,) if sixteen_bit else (255, 65535)


def _tile_by_tile(
    image: Image.Image, mode: str, convert: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """`convert` of the image, whose own memory is a tile's."""
    if image.width * image.height <= TILE_PIXELS:
        return convert(image)
    result = Image.new(mode, image.size)
    for box in _tiles(image):
        result.paste(convert(image.crop(box)), box[:2])
    return result


def _tiles(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    columns = min(image.width, TILE_PIXELS)
    rows = TILE_PIXELS // columns
    for top in range(0, image.height, rows):
        for left in range(0, image.width, columns):
            yield left, top, min(left + columns, image.width), min(top + rows, image.height)
