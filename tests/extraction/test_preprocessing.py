"""Preprocessing against transformers' own image processors, and in bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_dit.extraction import preprocessing
from blip3o_dit.extraction.image_decoding import UnreadableImageError
from blip3o_dit.extraction.preprocessing import Preprocessing


def noise(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_preprocessing_resizes_crops_and_normalizes() -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255  # the central square is white
    prepare = Preprocessing(10, mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    pixels = prepare(Image.fromarray(wide))
    assert pixels.shape == (3, 10, 10)
    for channel, expected in enumerate((2.0, 1.0, 0.5)):
        torch.testing.assert_close(pixels[channel], torch.full((10, 10), expected))
    squashed = Preprocessing(10, resize="squash", resample="nearest", mean=(0, 0, 0), std=(1, 1, 1))
    assert squashed(Image.fromarray(wide)).mean() == pytest.approx(1 / 3, abs=0.07)


@pytest.mark.parametrize("size", [(61, 90), (90, 61), (24, 24), (10, 30)])
def test_preprocessing_equals_transformers_image_processors_bit_for_bit(size: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    square = {"height": 24, "width": 24}
    half = (0.5, 0.5, 0.5)
    for ours, theirs in (
        (Preprocessing(24), CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=square)),
        (
            Preprocessing(24, resize="squash", resample="bilinear", mean=half, std=half),
            SiglipImageProcessorPil(size=square, resample=2),
        ),
    ):
        expected = torch.as_tensor(np.asarray(theirs(image)["pixel_values"][0]))
        assert torch.equal(ours(image), expected)


def test_pixels_are_bytes_that_towers_of_one_geometry_share() -> None:
    one, other = Preprocessing(24), Preprocessing(24, mean=(0, 0, 0), std=(1, 1, 1))
    assert one.geometry == other.geometry and hash(one.geometry) == hash(other.geometry)
    for different in (Preprocessing(20), Preprocessing(24, resize="squash"), Preprocessing(24, resize_to=28)):
        assert different.geometry != one.geometry
    images = [noise(30, 40), noise(50, 20)]
    pixels = torch.stack([one.pixels(image) for image in images])
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 3, 24, 24) and pixels.is_contiguous()
    assert torch.equal(pixels, torch.stack([other.pixels(image) for image in images]))
    for prepare in (one, other):
        expected = torch.stack([prepare(image) for image in images])
        assert torch.equal(prepare.normalize(pixels), expected)


@pytest.mark.parametrize("shape", [(1, 3000), (3000, 1), (7, 900), (500, 300), (9, 10)])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_cropping_first_gives_nearly_the_same(
    shape: tuple[int, int], resample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(*shape)
    for sizes in (dict(size=48), dict(size=48, resize_to=55), dict(size=33), dict(size=50, resize_to=40)):
        prepare = Preprocessing(**sizes, resample=resample)  # type: ignore[arg-type]
        expected = prepare.pixels(image).int()
        with monkeypatch.context() as patch:
            patch.setattr(preprocessing, "MAX_SCALED_PIXELS", 0)
            assert (prepare.pixels(image).int() - expected).abs().max() <= 1


def test_the_longest_picture_is_prepared_as_a_short_one() -> None:
    def edge(length: int) -> torch.Tensor:
        stripes = np.zeros((1, length, 3), dtype=np.uint8)
        stripes[:, length // 2 :] = 255
        return Preprocessing(224).pixels(Image.fromarray(stripes)).int()

    assert (edge(3_000_000) - edge(300)).abs().max() <= 1


def test_what_cannot_be_prepared_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnreadableImageError, match="takes 24 x 24 pixels as they are, found 30 x 24"):
        Preprocessing(24, resize="none").pixels(noise(24, 30))

    def no_memory(*_: object) -> Image.Image:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", no_memory)
    with pytest.raises(UnreadableImageError, match="cannot be resized: MemoryError"):
        Preprocessing(24).pixels(noise(24, 30))
