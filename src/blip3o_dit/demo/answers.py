"""What the page shows of one picture or sample: tokens as colours, decoded pictures, figures, neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from blip3o_dit.data.checks import non_finite_samples
from blip3o_dit.decoder.network import TokenDecoder
from blip3o_dit.demo.gallery import Gallery, distance_maps, token_maps
from blip3o_dit.extraction.conditions import pooled_tokens
from blip3o_dit.extraction.image_decoding import UnreadableImageError, decode_image
from blip3o_dit.extraction.tower_views import tower_views
from blip3o_dit.extraction.vision_towers import VisionEncoder
from blip3o_dit.inference.pipeline import BLIP3oInference
from blip3o_dit.inference.translate import spread_of
from blip3o_dit.metrics.fidelity import measure_tokens
from blip3o_dit.utils.validation import checked_integer

NEAREST = 6
TRUE, MEAN = "true tokens", "mean of the draws"

# Images, each with what stands under it
Row = list[tuple[Image.Image, str]]


@dataclass(frozen=True)
class Question:
    """A condition [1, L, C_eva], its true tokens [1, N, C] if they are known, and what it was made from.

    `index` is that of a sample of the store.
    """

    title: str
    condition: Tensor
    true: Tensor | None
    views: Mapping[str, Image.Image]
    index: int | None = None


@dataclass(frozen=True)
class Answer:
    """A title, a sentence with the figures, and rows of images by what stands over them."""

    title: str
    figures: str
    rows: Mapping[str, Row]


@dataclass(frozen=True)
class Demo:
    """A model and what stands around it.

    Args:
        condition_tower, target_tower: read pictures; without the first the page takes none, without the
            second it shows no true tokens of them.
        gallery: the samples of a store. decoder: turns tokens into pictures.
        notes: sentences for the page, of what is left out and why.
    """

    inference: BLIP3oInference
    condition_tower: VisionEncoder | None = None
    target_tower: VisionEncoder | None = None
    gallery: Gallery | None = None
    decoder: TokenDecoder | None = None
    notes: list[str] = field(default_factory=list)

    def picture(self, data: bytes) -> Question:
        """What the towers see in the bytes of a picture.

        Raises:
            UnreadableImageError, ValueError: one line: no picture, or no tower that reads it.
        """
        eva, clip = self.condition_tower, self.target_tower
        if eva is None:
            raise ValueError("expected a sample of the store: no tower is here that reads pictures")
        image, true = decode_image(data), None
        if clip is not None:
            true = self.inference.model.l2_normalize_if_configured(self._read(clip, image))
        towers = {"eva": eva.describe(), "clip": (clip or eva).describe()}
        views = tower_views({"encoders": towers})(image)
        return Question("Your picture", self._read(eva, image), true, views)

    def sample(self, number: int) -> Question:
        """The sample of this number among those offered. Raises ValueError when there is none."""
        if self.gallery is None:
            raise ValueError("expected a picture, found none")
        offered = self.gallery.offered
        if not 0 <= checked_integer("sample", number) < len(offered):
            raise ValueError(f"sample: expected 0 to {len(offered) - 1}, found {number}")
        chosen = [offered[number]]
        (record,), (views,) = self.gallery.source.records(chosen), self.gallery.views(chosen)
        title = ": ".join(filter(None, (record["key"], record.get("caption"))))
        condition, _ = self.gallery.source.fetch(chosen)
        return Question(title, condition, self.gallery.true_tokens(chosen), views, chosen[0])

    def answer(self, asked: Question, *, seed: int, draws: int) -> Answer:
        """Draw, and show. Raises ValueError for a seed that is no whole number, or less than 2 draws."""
        drawn = self._draw(asked, checked_integer("seed", seed), checked_integer("draws", draws, low=2))
        mean, true = drawn.mean(dim=0, keepdim=True), asked.true
        shown = {} if true is None else {TRUE: true}
        shown[MEAN] = self.inference.model.l2_normalize_if_configured(mean)
        nearest = {
            f"Nearest in the store to the {name}": self._nearest(tokens, asked.index)
            for name, tokens in shown.items()
        }
        shown |= {f"draw {number + 1}": tokens[None] for number, tokens in enumerate(drawn)}
        distances, figures = _distances(drawn, mean, true)
        views: Row = [(view, name) for name, view in asked.views.items()]
        rows = {
            "Tokens as colours: like colours, like tokens": views + self._as_colours(shown),
            "The same tokens, decoded to pictures": self._decoded(shown),
            "How far off at each token: the darker, the farther": distances,
            **nearest,
        }
        return Answer(asked.title, figures, {name: row for name, row in rows.items() if row})

    def _read(self, tower: VisionEncoder, image: Image.Image) -> Tensor:
        """[1, N, C] of a picture. Raises UnreadableImageError for tokens that are not finite."""
        size = self.inference.model.config.num_tokens
        tokens = pooled_tokens(tower, tower.preprocessing(image)[None], size)
        if len(non_finite_samples(tokens)):
            raise UnreadableImageError("its tokens are not finite")
        return tokens

    @torch.no_grad()
    def _draw(self, asked: Question, seed: int, draws: int) -> Tensor:
        """[draws, N, C]; the first is what `generate` makes of the sample."""
        generate, index = self.inference.model.generate, [asked.index or 0]
        drawn = [
            generate(asked.condition, seed=seed, sample_index=index, sample_number=number).cpu()
            for number in range(draws)
        ]
        return torch.cat(drawn)

    def _as_colours(self, shown: Mapping[str, Tensor]) -> Row:
        """Maps of these tokens [1, N, C], each with its cosine to the true ones."""
        tokens, captions = torch.cat(list(shown.values())), list(shown)
        reference = tokens[:1].numpy() if self.gallery is None else self.gallery.colour_reference
        if TRUE in shown:
            cosines = measure_tokens(tokens, shown[TRUE].expand_as(tokens)).cosine.mean(dim=1).tolist()
            captions[1:] = [
                f"{name}, cosine {cosine:.3f}" for name, cosine in zip(captions[1:], cosines[1:], strict=True)
            ]
        return list(zip(token_maps(tokens, reference), captions, strict=True))

    def _decoded(self, shown: Mapping[str, Tensor]) -> Row:
        if self.decoder is None:
            return []
        pixels = self.decoder.decode(torch.cat(list(shown.values()))).numpy()
        return list(zip(map(Image.fromarray, pixels), shown, strict=True))

    def _nearest(self, tokens: Tensor, index: int | None) -> Row:
        """The samples of the store that are nearest to tokens [1, N, C]."""
        if self.gallery is None:
            return []
        found = self.gallery.nearest(tokens[0], NEAREST)
        indices = [each for each, _ in found]
        captions = [
            f"{'this sample' if each == index else key}, cosine {cosine:.3f}"
            for (each, cosine), key in zip(found, self.gallery.keys(indices), strict=True)
        ]
        return list(zip(self.gallery.thumbnails(indices), captions, strict=True))


def _distances(drawn: Tensor, mean: Tensor, true: Tensor | None) -> tuple[Row, str]:
    """Of draws [K, N, C] the spread at each token, beside the error of their mean [1, N, C]; and in words."""
    found = {"spread of the draws": spread_of(drawn)}
    if true is not None:
        found["error of their mean"] = (mean - true).square().sum(dim=-1).sqrt()[0]
    length = float((mean if true is None else true).square().sum(dim=-1).mean().sqrt()) or 1.0
    percents = [f"{100 * float(each.square().mean().sqrt()) / length:.0f} %" for each in found.values()]
    captions = [f"{name}, {percent}" for name, percent in zip(found, percents, strict=True)]
    row = list(zip(distance_maps(torch.stack(list(found.values()))), captions, strict=True))
    expected = f"{percents[0]} of a token's length away from the true tokens"
    if true is None:
        said = (
            f"By the spread of the {len(drawn)} draws, their mean is {expected}, which no tower here tells."
        )
    else:
        cosine = float(measure_tokens(mean, true).cosine.mean())
        said = (
            f"By the spread of the {len(drawn)} draws, their mean should be {expected}; it is {percents[1]} "
            f"away, at a cosine of {cosine:.3f}."
        )
    return row, said
