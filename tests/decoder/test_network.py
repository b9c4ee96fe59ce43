"""The decoder's network: where a token paints, what it begins with, its loss, and its sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from blip3o_dit.decoder.config import DecoderConfig, DecoderTrainingConfig, usual_picture_size
from blip3o_dit.decoder.network import TokenDecoder, picture_loss
from blip3o_dit.decoder.pictures import quality
from blip3o_dit.decoder.pixel_ridge import _patches, _picture
from tests.helpers.painted import random_decoder


@pytest.mark.parametrize(
    ("num_tokens", "picture_size", "split", "patch"),
    [(1, 64, 8, 8), (9, 12, 1, 4), (16, 32, 1, 8), (64, 64, 1, 8), (256, 64, 1, 4), (256, 224, 2, 7)],
)
def test_sizes(num_tokens: int, picture_size: int, split: int, patch: int) -> None:
    sizes = DecoderConfig(
        num_tokens=num_tokens, channels=5, picture_size=picture_size, width=8, num_layers=1, num_heads=2
    )
    assert (sizes.split, sizes.patch) == (split, patch)
    pictures = TokenDecoder(sizes).eval().decode(torch.randn(2, num_tokens, 5))
    assert pictures.shape == (2, picture_size, picture_size, 3) and pictures.dtype == torch.uint8


@pytest.mark.parametrize(("num_tokens", "size"), [(1, 64), (9, 63), (49, 63), (64, 64), (10**4, 100)])
def test_the_usual_size_is_a_multiple_of_the_grid(num_tokens: int, size: int) -> None:
    assert usual_picture_size(num_tokens) == size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 10}, "num_tokens: expected a square, found 10"),
        ({"picture_size": 13}, "picture_size: expected a multiple of 3, .* found 13"),
        ({"num_heads": 3}, "width: expected a multiple of 3 heads, found 16"),
        ({"channels": "8"}, "channels: expected a positive integer, found '8'"),
        ({"normalize_embeddings": 1}, "normalize_embeddings: expected true or false, found 1"),
    ],
)
def test_sizes_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        random_decoder(**changes)


def test_settings_that_cannot_be() -> None:
    for changes, message in (
        ({"noise": -1.0}, "noise: expected a number in"),
        ({"split_by": "luck"}, "split_by: expected one of"),
        ({"split_by": "group"}, "group_pattern"),
        ({"steps": 0}, "steps: expected an integer >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            DecoderTrainingConfig(**changes)


def test_a_new_decoder_paints_the_mean_picture() -> None:
    torch.manual_seed(1)
    sizes = dict(num_tokens=9, channels=8, picture_size=12, width=16, num_layers=1, num_heads=2)
    decoder = TokenDecoder(DecoderConfig(**sizes))
    decoder.mean_picture.uniform_(0.2, 0.8)
    expected = (255 * decoder.mean_picture).round().byte().permute(1, 2, 0)
    assert torch.equal(decoder.eval().decode(torch.randn(3, 9, 8)), expected.expand(3, 12, 12, 3))


def test_a_token_paints_where_it_stands() -> None:
    """Without attention and smoothing a change of token (row 0, column 2) changes the upper right square."""
    decoder = random_decoder()
    decoder.layers = torch.nn.ModuleList()
    for layer in (decoder.smooth[0], decoder.smooth[-1]):
        torch.nn.init.zeros_(layer.weight)
    tokens = torch.randn(1, 9, 8)
    changed = tokens.clone()
    changed[0, 2] += 1.0
    differs = (decoder(tokens) != decoder(changed)).any(dim=1)[0]
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[:4, 8:] = True
    assert torch.equal(differs, expected)


def test_tokens_are_standardised_and_normalised_as_the_training_s() -> None:
    decoder = random_decoder()
    decoder.token_mean.fill_(2.0)
    decoder.token_std.fill_(4.0)
    tokens = torch.randn(2, 9, 8)
    assert torch.equal(decoder.standardize(tokens), (tokens - 2) / 4)
    normalising = random_decoder(normalize_embeddings=True)
    assert torch.allclose(normalising.standardize(tokens), tokens / tokens.norm(dim=-1, keepdim=True))
    assert torch.equal(normalising.decode(tokens), normalising.decode(8 * tokens))


def test_other_tokens_are_refused() -> None:
    for shape in ((2, 9, 7), (2, 4, 8), (9, 8)):
        with pytest.raises(ValueError, match=r"^tokens: expected \[B, 9, 8\], found"):
            random_decoder().decode(torch.randn(shape))


def test_the_loss_in_closed_form() -> None:
    true = torch.rand(2, 3, 8, 8)
    assert picture_loss(true, true, edges=1.0) == 0
    # A constant offset has no edges; one bright column of eight has two.
    assert torch.isclose(picture_loss(true + 0.25, true, edges=5.0), torch.tensor(0.25))
    column = torch.zeros(1, 3, 8, 8)
    column[..., 3] = 1.0
    fine = 1 / 8 + 2 / 7
    two = 0.5 * (1 / 4 + 2 / 3)
    four = 0.25 * (1 / 2 + 1)
    found = picture_loss(column, torch.zeros_like(column), edges=1.0)
    assert torch.isclose(found, torch.tensor((fine + two + four) / 3))
    without = picture_loss(column, torch.zeros_like(column), edges=0.0)
    assert torch.isclose(without, torch.tensor(1 / 8))


def test_squares_of_a_picture_and_back() -> None:
    pictures = torch.rand(2, 3, 12, 12)
    squares = _patches(pictures, 3)
    assert squares.shape == (2, 9, 48)
    assert torch.equal(squares[:, 5].view(2, 3, 4, 4), pictures[:, :, 4:8, 8:])
    assert torch.equal(_picture(squares, 3), pictures)


def test_quality_in_closed_form() -> None:
    true = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    found = true.clone()
    found[1] += 51  # a fifth of 255
    figures = quality(found, true)
    assert np.allclose(figures["psnr"], [60, -20 * np.log10(0.2)])
    assert np.allclose(figures["l1"], [0, 0.2])
