"""A few samples on the page: every one with its own pictures and maps, in strips that fit a phone."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from blip3o_dit.evaluation.sample_maps import Block, ShownSamples, blocks


def image_at(address: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(address.split("base64,")[1]))).convert("RGB")


def samples(count: int) -> ShownSamples:
    """Every other picture is not known; each is of one colour, which tells whose it is."""
    tokens = np.random.default_rng(0).normal(size=(count, 4, 3))
    pictures = [
        {"picture": Image.new("RGB", (400, 300), (20 * i, 0, 0))} if i % 2 else {} for i in range(count)
    ]
    return ShownSamples(
        {"true tokens": tokens, "again": tokens}, [f"key {i}" for i in range(count)], pictures
    )


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (6, [6]), (7, [6, 1]), (13, [6, 6, 1])])
def test_samples_are_side_by_side_where_a_phone_has_room(count: int, sizes: list[int]) -> None:
    found = list(blocks(samples(count)))
    assert [len(block.numbers) for block in found] == sizes
    assert [number for block in found for number in block.numbers] == list(range(1, count + 1))
    assert all(len(strip.images) == len(block.numbers) for block in found for strip in block.strips)


def test_each_picture_stands_over_its_own_sample() -> None:
    pictures = [address for block in blocks(samples(8)) for address in _strip(block, "picture")]
    for number, address in enumerate(pictures):
        assert bool(address) == bool(number % 2)
        if address:
            image = image_at(address)
            assert abs(image.getpixel((5, 5))[0] - 20 * number) < 8 and max(image.size) <= 192


def test_equal_tokens_have_equal_colours_and_each_is_a_whole_square() -> None:
    (block,) = blocks(samples(2))
    first, second = _strip(block, "true tokens"), _strip(block, "again")
    assert first == second and first[0] != first[1]
    pixels = np.asarray(image_at(first[0]))
    assert pixels.shape == (128, 128, 3)
    assert (pixels[:64, :64] == pixels[0, 0]).all() and (pixels[64:, 64:] == pixels[-1, -1]).all()


def test_without_pictures_there_is_no_strip_of_them() -> None:
    shown = samples(2)
    (block,) = blocks(ShownSamples(shown.rows, shown.titles))
    assert [strip.name for strip in block.strips] == ["true tokens", "again"]


def _strip(block: Block, name: str) -> list[str]:
    return next(strip.images for strip in block.strips if strip.name == name)
