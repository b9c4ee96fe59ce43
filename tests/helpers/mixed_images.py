"""Small image files of many kinds, some of them broken; the same seed writes the same bytes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def write_mixed_images(folder: Path, *, count: int, broken: float, seed: int) -> set[str]:
    """Write the images below `folder`; returns the relative paths of the broken ones."""
    generator = np.random.default_rng(seed)
    wrong = set(generator.permutation(count)[: round(count * broken)].tolist())
    bad: set[str] = set()
    for index in range(count):
        suffix, data = _whole(generator, index)
        if index in wrong:
            breakage = list(BROKEN.values())[len(bad) % len(BROKEN)]
            data = breakage(generator, data)
        name = f"{index % 7}/{index // 100:03d}/{index:06d}{suffix}"
        if index in wrong:
            bad.add(name)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return bad


def _whole(generator: np.random.Generator, index: int) -> tuple[str, bytes]:
    suffix, encode = list(KINDS.values())[index % len(KINDS)]
    return suffix, encode(_scene(generator))


def _scene(generator: np.random.Generator) -> Image.Image:
    """A gradient, a few shapes and some noise, 64 to 400 pixels a side."""
    width, height = (int(side) for side in generator.integers(64, 400, 2))
    across = np.linspace(0, 1, width)[None, :, None] * generator.integers(60, 200, 3)
    down = np.linspace(0, 1, height)[:, None, None] * generator.integers(0, 55, 3)
    grain = generator.integers(0, 12, (height, width, 1))
    image = Image.fromarray(np.clip(across + down + grain, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(3):
        x, y = (int(v) for v in generator.integers(0, (width, height)))
        radius = int(generator.integers(5, 60))
        color = tuple(int(v) for v in generator.integers(0, 256, 3))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    return image


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _sixteen_bit(image: Image.Image) -> bytes:
    grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
    return _encoded(Image.fromarray(grey), "PNG")


def _rotated(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encoded(image, "JPEG", exif=exif)


def _animated(image: Image.Image) -> bytes:
    frames = [image.rotate(90 * k) for k in range(1, 3)]
    return _encoded(image, "GIF", save_all=True, append_images=frames)


KINDS: dict[str, tuple[str, Callable[[Image.Image], bytes]]] = {
    "jpeg": (".jpg", lambda p: _encoded(p, "JPEG", quality=90)),
    "grey jpeg": (".JPG", lambda p: _encoded(p.convert("L"), "JPEG")),
    "cmyk jpeg": (".jpeg", lambda p: _encoded(p.convert("CMYK"), "JPEG")),
    "png": (".png", lambda p: _encoded(p, "PNG", compress_level=1)),
    "palette png": (".png", lambda p: _encoded(p.convert("P"), "PNG", compress_level=1)),
    "alpha png": (".png", lambda p: _encoded(p.convert("RGBA"), "PNG", compress_level=1)),
    "16-bit png": (".png", _sixteen_bit),
    "turned jpeg": (".jpg", _rotated),
    "animated gif": (".gif", _animated),
    "webp": (".webp", lambda p: _encoded(p, "WEBP", quality=80)),
    "bmp": (".bmp", lambda p: _encoded(p, "BMP")),
}


def _bomb(generator: np.random.Generator, data: bytes) -> bytes:
    """A PNG whose header claims 60000 x 60000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1000) + b"IDAT" + zlib.compress(b"")


BROKEN: dict[str, Callable[[np.random.Generator, bytes], bytes]] = {
    "empty": lambda generator, data: b"",
    "truncated": lambda generator, data: data[: max(40, len(data) // 3)],
    "text": lambda generator, data: b"<html>404 not found</html>\n",
    "bomb": _bomb,
    "noise": lambda generator, data: generator.bytes(500),
}
