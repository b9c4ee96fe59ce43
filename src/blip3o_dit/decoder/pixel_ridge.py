"""The baseline of a decoder: ridge regression from a token to the pixels under it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from blip3o_dit.data.embeddings import Embeddings
from blip3o_dit.decoder.network import TokenDecoder
from blip3o_dit.decoder.pictures import Pictures
from blip3o_dit.ridge import TokenRidge


class _Pairs:
    """Standardised tokens [n, N, C] and the pixels under each [n, N, 3 p p], as `TokenRidge` reads them."""

    def __init__(self, decoder: TokenDecoder, source: Embeddings, pictures: Pictures) -> None:
        self.decoder, self.source, self.pictures = decoder, source, pictures
        self.condition_dim = source.target_dim
        self.target_dim = 3 * (decoder.config.picture_size // decoder.config.grid) ** 2

    def fetch(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        tokens = self.source.fetch(self.pictures.indices[rows])[1]
        standardized = self.decoder.standardize(tokens.to(self.decoder.token_mean.device)).cpu()
        return standardized, _patches(self.pictures.floats(rows), self.decoder.config.grid)


@dataclass(frozen=True)
class PixelRidge:
    """One linear map for all positions, which knows nothing of what is around a token."""

    decoder: TokenDecoder
    ridge: TokenRidge

    @classmethod
    def fit(
        cls, decoder: TokenDecoder, source: Embeddings, pictures: Pictures, *, max_samples: int
    ) -> PixelRidge:
        """Fitted on the first of these pictures."""
        pairs: Any = _Pairs(decoder, source, pictures)
        return cls(decoder, TokenRidge.fit(pairs, np.arange(min(len(pictures), max_samples))))

    def decode(self, tokens: Tensor) -> Tensor:
        """As `TokenDecoder.decode`."""
        standardized = self.decoder.standardize(tokens.to(self.decoder.token_mean.device)).cpu()
        pixels = _picture(self.ridge.predict(standardized), self.decoder.config.grid)
        return (255 * pixels.clamp(0, 1)).round().byte().permute(0, 2, 3, 1)


def _patches(pictures: Tensor, grid: int) -> Tensor:
    """[n, 3, S, S] -> [n, N, 3 p p]."""
    own = pictures.shape[-1] // grid
    squares = pictures.unflatten(3, (grid, own)).unflatten(2, (grid, own))  # [n, 3, g, p, g, p]
    return squares.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _picture(patches: Tensor, grid: int) -> Tensor:
    """[n, N, 3 p p] -> [n, 3, S, S]."""
    own = round((patches.shape[-1] / 3) ** 0.5)
    squares = patches.view(-1, grid, grid, 3, own, own).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(-1, 3, grid * own, grid * own)
