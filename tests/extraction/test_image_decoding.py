"""Decoding: what can be read is read right, what cannot is refused with its reason."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from blip3o_dit.extraction import image_decoding
from blip3o_dit.extraction.image_decoding import SCALED, UnreadableImageError, decode_image
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


@pytest.mark.parametrize(
    ("values", "kind", "expected", "white"),
    [
        (np.array([[0, 16384, 65535]], np.uint16), "TIFF", [0, 64, 255], 65535),
        (np.array([[0, 100, 200]], np.uint16), "PNG", [0, 0, 1], 65535),
        (np.array([[0, 100, 255]], np.int32), "TIFF", [0, 100, 255], 255),
        (np.array([[0, 257, 65535]], np.int32), "TIFF", [0, 1, 255], 65535),
        (np.array([[0, 0.5, 1]], np.float32), "TIFF", [0, 128, 255], 1),
        (np.array([[0, 99.7, 255]], np.float32), "TIFF", [0, 100, 255], 255),
        (np.array([[0, 256, 65535]], np.float32), "TIFF", [0, 1, 255], 65535),
        (np.zeros((1, 3), np.float32), "TIFF", [0, 0, 0], 1),
    ],
)
def test_grey_values_are_scaled_by_what_they_hold_and_it_is_said(
    values: np.ndarray, kind: str, expected: list[int], white: int
) -> None:
    image = decode_image(encoded(Image.fromarray(values), kind))
    assert np.asarray(image)[0, :, 1].tolist() == expected
    assert image.info[SCALED].endswith(f": {white} is white")
    assert SCALED not in decode_image(encoded(Image.new("L", (3, 3)))).info


@pytest.mark.parametrize("bad", [-1, np.nan, np.inf, -np.inf, 65536])
def test_grey_values_out_of_range_are_refused(bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.full((4, 5), 3, np.float32)
    values[2, 3] = bad
    for tile in (image_decoding.TILE_PIXELS, 7):
        monkeypatch.setattr(image_decoding, "TILE_PIXELS", tile)
        with pytest.raises(UnreadableImageError, match="out of range: expected 0 to 65535"):
            decode_image(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("tile", [1, 7, 60, 10_000])
def test_tile_by_tile_is_the_same(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0).integers(0, 256, (13, 11, 4), dtype=np.uint8)
    palette = Image.fromarray(random[..., :3]).quantize(16)
    files = [
        encoded(Image.fromarray(random)),
        encoded(Image.fromarray(random[..., :2], "LA")),
        encoded(palette, transparency=3),
        encoded(palette, transparency=bytes(range(0, 160, 10))),
        encoded(Image.fromarray(random[..., :3]), transparency=tuple(random[4, 5, :3].tolist())),
        encoded(Image.fromarray(random[..., 0].astype(np.uint16) * 200)),
        encoded(Image.fromarray(random[..., 0].astype(np.float32)), "TIFF"),
    ]
    whole = [pixels(file) for file in files]
    monkeypatch.setattr(image_decoding, "TILE_PIXELS", tile)
    for file, expected in zip(files, whole, strict=True):
        assert np.array_equal(pixels(file), expected)


def test_damaged_exif_loses_no_picture() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.5
    exif[0x8769] = {0x829A: (1, 30), 0x927C: b"notes"}
    start, random = exif.tobytes()[6:14], np.random.default_rng(0)
    for kind in ("JPEG", "WEBP"):
        data = encoded(corner_image(), kind, exif=exif)
        first = data.index(start)
        for _ in range(300):
            changed = np.frombuffer(data, np.uint8).copy()
            changed[first + random.integers(0, len(exif.tobytes()) - 6, 3)] = random.integers(0, 256, 3)
            assert decode_image(changed.tobytes()).size in ((4, 6), (6, 4))


def test_large_jpeg_2000_pictures_are_decoded_at_half_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (64, 32), (200, 20, 20)), "JPEG2000")
    assert decode_image(data).size == (64, 32)
    monkeypatch.setattr(image_decoding, "MAX_JPEG2000_PIXELS", 2047)
    half = decode_image(data)
    assert half.size == (32, 16) and np.abs(np.asarray(half).astype(int) - (200, 20, 20)).max() < 8


def bomb() -> bytes:
    """A few bytes that claim 12000 x 12000 pixels, below Pillow's limit; its data never comes."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 12000, 12000, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + struct.pack(">I", 1000) + b"IDAT" + zlib.compress(b"")


def swollen(chunk: bytes) -> bytes:
    """A PNG with a compressed chunk of a few bytes that holds 100 MB."""
    content = b"name\x00\x00" + zlib.compress(bytes(10**8), 9)
    extra = struct.pack(">I", len(content)) + chunk + content + struct.pack(">I", zlib.crc32(chunk + content))
    return WHOLE[:33] + extra + WHOLE[33:]


WHOLE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)))
REFUSED = {
    "empty": (b"", "empty file"),
    "text": (b"not a picture", "not a picture"),
    "truncated png": (WHOLE[: len(WHOLE) // 2], "damaged"),
    "truncated jpeg": (encoded(Image.open(BytesIO(WHOLE)), "JPEG")[:500], "damaged"),
    "bomb": (bomb(), "too large: 12000 x 12000 is above 100000000"),
    "text chunk": (swollen(b"zTXt"), "damaged: Decompressed data too large"),
    "profile": (swollen(b"iCCP"), "damaged: Decompressed data too large"),
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


def test_too_little_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", no_memory)
    with pytest.raises(UnreadableImageError, match="takes more memory than there is"):
        decode_image(WHOLE)


def large_pictures(folder: Path) -> Iterator[Path]:
    """Pictures of every kind that once took many times their size."""
    values = np.zeros((2000, 2000), np.uint8)
    values[::7] = 200
    grey, turned = Image.fromarray(values), Image.Exif()
    turned[0x0112] = 6
    frames = dict(save_all=True, append_images=[grey.rotate(90)])
    for name, image, options in (
        ("tall.png", Image.new("1", (1, 30_000)), {}),
        ("taller.png", Image.new("L", (1, 200_000)), {}),
        ("wide.png", Image.new("RGB", (200_000, 1)), {}),
        ("ribbon.png", Image.new("P", (30, 100_000)), {}),
        ("bits.bmp", Image.new("1", (5000, 5000)), {}),
        ("alpha.png", grey.convert("RGBA"), {"compress_level": 1}),
        ("grey-alpha.png", grey.convert("LA"), {"compress_level": 1}),
        ("palette.png", grey.convert("P"), {"transparency": 3}),
        ("sixteen.png", Image.fromarray(values.astype(np.uint16)), {"compress_level": 1}),
        ("integers.tif", Image.fromarray(values.astype(np.int32)), {}),
        ("floats.tif", Image.fromarray(values.astype(np.float32)), {}),
        ("cmyk.jpg", grey.convert("CMYK"), {}),
        ("progressive.jpg", grey.convert("RGB"), {"progressive": True, "subsampling": 0, "exif": turned}),
        ("animated.gif", grey, frames),
        ("profile.png", grey.convert("RGB"), {"icc_profile": bytes(500_000), "exif": turned}),
    ):
        image.save(folder / name, **options)
        yield folder / name


def test_no_picture_takes_more_than_four_times_its_bytes_and_some(tmp_path: Path) -> None:
    """30 MB here where 200 are promised: these pictures are smaller than those that the promise is for."""
    files = list(large_pictures(tmp_path))
    found = subprocess.run(
        [sys.executable, "-m", "tests.helpers.decode_within", "30", *map(str, files)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.splitlines() == [f"{file.name}: ok" for file in files]


@pytest.mark.parametrize(
    ("kind", "mode", "smaller"),
    [
        ("JPEG", "RGB", True),
        ("JPEG", "CMYK", True),
        ("JPEG", "L", True),
        ("PNG", "RGB", True),
        ("PNG", "RGBA", False),
        ("PNG", "P", False),
        ("TIFF", "RGB", True),
    ],
)
def test_a_picture_to_be_shown_is_smaller_and_the_same(kind: str, mode: str, smaller: bool) -> None:
    picture = Image.new("RGB", (640, 400), (200, 40, 40))
    picture.paste((20, 60, 220), (320, 0, 640, 400))
    picture.paste((250, 250, 250), (0, 0, 200, 100))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    out = BytesIO()
    picture.convert(mode).save(out, kind, exif=exif)
    whole, shown = decode_image(out.getvalue()), decode_image(out.getvalue(), shown_at=100)
    assert whole.size == (400, 640)
    assert (shown.size != whole.size) == smaller and min(shown.size) >= 100 and shown.mode == "RGB"
    ours, theirs = (np.asarray(each.resize((40, 64))).astype(int) for each in (shown, whole))
    assert np.abs(ours - theirs).mean() < 3


def test_a_picture_to_be_shown_takes_little_memory(tmp_path: Path) -> None:
    """Decoded whole, these 24 million pixels take 190 MB."""
    Image.new("RGB", (6000, 4000), "red").save(tmp_path / "large.jpg")
    code = (
        "import sys; from pathlib import Path; "
        "from blip3o_dit.extraction.shown_images import pictures_of_store; "
        "usage = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]); "
        "before = usage(); "
        "shown = pictures_of_store({}, sys.argv[1])(['large.jpg'])[0]; "
        "assert [max(view.size) for view in shown.values()] == [448]; "
        "assert usage() - before < 50_000, usage() - before"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
