"""Decoding: what can be read is read right, what cannot is refused with its reason."""

from __future__ import annotations

import contextlib
import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blip3o_dit.extraction.image_decoding import UnreadableImageError, decode_image
from tests.helpers.mixed_images import write_mixed_images


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def corner_image() -> Image.Image:
    """4 wide, 6 high; red at the top left, blue at the bottom right."""
    array = np.full((6, 4, 3), 128, dtype=np.uint8)
    array[0, 0] = (255, 0, 0)
    array[-1, -1] = (0, 0, 255)
    return Image.fromarray(array)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_comes_out_upright(orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = corner_image() if orientation == 1 else corner_image().transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(encoded(stored, exif=exif)), np.asarray(corner_image()))


def test_cmyk_red_is_red() -> None:
    found = pixels(encoded(Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(found - (255, 0, 0)).max() < 12


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    grey = np.array([[0, 16384, 32768, 65535]], dtype=np.uint16)
    assert pixels(encoded(Image.fromarray(grey)))[0, :, 0].tolist() == [0, 64, 128, 255]


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert pixels(encoded(clear)).min() == 255
    assert np.abs(pixels(encoded(half)) - 127).max() <= 1
    palette = clear.quantize(8)
    assert pixels(encoded(palette)).min() == 255
    grey = Image.new("LA", (4, 4), (50, 255))
    assert np.all(pixels(encoded(grey)) == 50)


def test_palette_grey_and_first_frame() -> None:
    red = Image.new("RGB", (8, 8), (204, 0, 0))
    green = Image.new("RGB", (8, 8), (0, 200, 0))
    animation = encoded(red, "GIF", save_all=True, append_images=[green])
    assert np.abs(pixels(animation) - (204, 0, 0)).max() < 8
    assert np.all(pixels(encoded(red.convert("P"))) == (204, 0, 0))
    assert np.all(pixels(encoded(Image.new("L", (4, 4), 77))) == 77)
    assert set(np.unique(pixels(encoded(Image.new("1", (4, 4), 1))))) == {255}


def bomb() -> bytes:
    """A few bytes that claim 12000 x 12000 pixels, below Pillow's limit; its data never comes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 12000, 12000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 1000) + b"IDAT" + zlib.compress(b"")


WHOLE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)))
REFUSED = {
    "empty": (b"", "empty file"),
    "text": (b"not a picture", "not a picture"),
    "truncated png": (WHOLE[: len(WHOLE) // 2], "damaged"),
    "truncated jpeg": (encoded(Image.open(BytesIO(WHOLE)), "JPEG")[:500], "damaged"),
    "bomb": (bomb(), "too large: 12000 x 12000 is above 100000000"),
    "header only": (WHOLE[:20], "not a picture|damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_its_reason(name: str) -> None:
    data, reason = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnreadableImageError, match=reason) as caught:
            decode_image(data, max_pixels=10**8)
    assert "\n" not in str(caught.value)


def test_the_limit_on_pixels_is_the_callers() -> None:
    with pytest.raises(UnreadableImageError, match="40 x 40 is above 1599 pixels"):
        decode_image(WHOLE, max_pixels=1599)
    assert decode_image(WHOLE, max_pixels=1600).size == (40, 40)


def test_every_flipped_byte_gives_an_image_or_a_reason() -> None:
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        data = encoded(Image.open(BytesIO(WHOLE)).resize((12, 12)), kind)
        for position in range(0, len(data), max(1, len(data) // 60)):
            changed = bytearray(data)
            changed[position] ^= 0xFF
            with contextlib.suppress(UnreadableImageError):
                assert decode_image(bytes(changed), max_pixels=10**6).mode == "RGB"


def test_mixed_images_are_read_and_exactly_the_broken_ones_refused(tmp_path: Path) -> None:
    broken = write_mixed_images(tmp_path, count=120, broken=0.2, seed=3)
    assert len(broken) == 24
    refused = set()
    for file in (file for file in tmp_path.rglob("*") if file.is_file()):
        try:
            decode_image(file.read_bytes())
        except UnreadableImageError:
            refused.add(file.relative_to(tmp_path).as_posix())
    assert refused == broken
