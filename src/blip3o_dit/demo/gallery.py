"""Tokens as images, and the samples of a store: how they look, and which are nearest to given tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from blip3o_dit.data.embeddings import Embeddings, batches
from blip3o_dit.extraction.shown_images import Shown
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.utils.pca_colors import pca_colors
from blip3o_dit.utils.progress import working

PIXELS = 96  # of a map, a side, at most: the page scales it up
# Most samples that neighbours are looked for among: the page begins soon, also for a large store
MOST_SEARCHED = 20_000
# Tokens that the colours are fitted on
COLOUR_TOKENS = 1024


class Gallery:
    """The samples of a store, open for one model.

    Args:
        split: which samples the page offers; neighbours come from the whole store.
        shown: the pictures of keys.

    Attributes:
        offered: indices of the samples that the page offers.
        colour_reference: true tokens [n, N, C]; by their components equal colours mean equal tokens.
    """

    def __init__(self, inference: BLIP3oInference, source: Embeddings, split: str, shown: Shown) -> None:
        self.source, self._model, self._shown = source, inference.model, shown
        self.offered = inference.choose(source, split, None)
        few, many = (
            inference.choose(source, "all", min(most, source.num_samples))
            for most in (max(2, COLOUR_TOKENS // source.num_tokens), MOST_SEARCHED)
        )
        self.colour_reference: np.ndarray = self.true_tokens(few).numpy()
        self._searched, means = many, []
        with working("reading the store", len(many), "sample") as count:
            for piece in batches(many, 64):
                means.append(self.true_tokens(piece).mean(dim=1))
                count(len(piece))
        self._means = F.normalize(torch.cat(means), dim=-1)  # [n, C]

    def true_tokens(self, indices: Sequence[int]) -> Tensor:
        """[n, N, C] float32, normalised where the model's are."""
        return self._model.l2_normalize_if_configured(self.source.fetch(indices)[1].float())

    def keys(self, indices: Sequence[int]) -> list[str]:
        return [record["key"] for record in self.source.records(indices)]

    def views(self, indices: Sequence[int]) -> list[dict[str, Image.Image]]:
        """Each sample's picture as the towers saw it, by name; {} where it is not there."""
        return [views or {} for views in self._shown(self.keys(indices))]

    def thumbnails(self, indices: Sequence[int]) -> list[Image.Image]:
        """An image for each sample: its picture where it is there, else its true tokens."""
        maps = token_maps(self.true_tokens(indices), self.colour_reference)
        return [next(iter(views.values()), own) for views, own in zip(self.views(indices), maps, strict=True)]

    def nearest(self, tokens: Tensor, count: int) -> list[tuple[int, float]]:
        """Index and cosine of the samples whose mean true tokens are most like the mean of tokens [N, C]."""
        cosines = self._means @ F.normalize(tokens.float().mean(dim=0), dim=0)
        best = cosines.topk(min(count, len(cosines)))
        indices = [self._searched[row] for row in best.indices.tolist()]
        return list(zip(indices, best.values.tolist(), strict=True))


def token_maps(tokens: Tensor, reference: np.ndarray) -> list[Image.Image]:
    """Tokens [n, N, C] as colours, by three principal components of the reference tokens [k, N, C]."""
    return _maps(pca_colors(tokens.numpy(), reference))


def distance_maps(distances: Tensor) -> list[Image.Image]:
    """Distances [n, N] on one scale: none is white, the largest dark blue."""
    part = (distances / distances.max().clamp(min=1e-12)).numpy()[..., None]
    return _maps(1 - part * np.array([0.97, 0.81, 0.58]))


def _maps(colours: np.ndarray) -> list[Image.Image]:
    """Colours [n, N, 3] in 0..1, each token a square of whole pixels."""
    side = math.isqrt(colours.shape[1])
    pixels = np.rint(255 * colours).astype(np.uint8).reshape(-1, side, side, 3)
    scale = max(1, PIXELS // side)
    return [Image.fromarray(each.repeat(scale, axis=0).repeat(scale, axis=1)) for each in pixels]
