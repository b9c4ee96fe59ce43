"""Vision towers behind one interface: pixels in, a grid of patch tokens out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from blip3o_dit.extraction.eva_clip import EvaClipVision
from blip3o_dit.extraction.preprocessing import Preprocessing
from blip3o_dit.extraction.weight_files import parameters_digest


class VisionEncoder(nn.Module):
    """A tower. `forward` takes [B, 3, size, size] and gives [B, grid * grid, width], row-major, no CLS.

    Args:
        tokens: what kind of tokens these are, for the manifest: layer, norm, projection.
        meaningful: False for random weights. commit: on the hub. weights: what tells these from others.
    """

    def __init__(
        self,
        *,
        name: str,
        revision: str | None,
        preprocessing: Preprocessing,
        grid: int,
        width: int,
        tokens: str,
        meaningful: bool = True,
        commit: str | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.revision = revision
        self.preprocessing = preprocessing
        self.grid = grid
        self.width = width
        self.tokens = tokens
        self.meaningful = meaningful
        self.commit = commit
        self.weights = weights

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the tower; JSON values."""
        return {
            "name": self.name,
            "revision": self.revision,
            "commit": self.commit,
            "weights": self.weights or parameters_digest(self),
            "width": self.width,
            "grid": self.grid,
            "tokens": self.tokens,
            "meaningful": self.meaningful,
            "preprocessing": self.preprocessing.describe(),
        }

    def with_vectors(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """What `forward` gives, and what the tower has of `KEPT`, [B, C] each, from the same pass."""
        return self(pixels), {}


class ClipEncoder(VisionEncoder):
    """CLIP: patch tokens -> post layer norm -> visual projection."""

    def __init__(self, model: CLIPVisionModelWithProjection, **about: Any) -> None:
        vision: Any = model.config  # its sizes are declared as int or pair; CLIP's are int
        super().__init__(
            grid=about["preprocessing"].size // vision.patch_size,
            width=vision.projection_dim,
            tokens="last layer, post layer norm, visual projection",
            **about,
        )
        self.model = model
        self.interpolate = about["preprocessing"].size != vision.image_size

    def forward(self, pixels: Tensor) -> Tensor:
        return self._projected(self._hidden(pixels)[:, 1:])

    def with_vectors(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The class token after the final norm, and its projection: the space of CLIP's texts."""
        hidden = self._hidden(pixels)
        token = self.model.vision_model.post_layernorm(hidden[:, 0])
        vectors = {"class": token, "pooled": self.model.visual_projection(token)}
        return self._projected(hidden[:, 1:]), vectors

    def _hidden(self, pixels: Tensor) -> Tensor:
        """[B, T, d], without the final norm."""
        vision = self.model.vision_model
        output = vision(pixel_values=pixels, interpolate_pos_encoding=self.interpolate)
        return output.last_hidden_state

    def _projected(self, hidden: Tensor) -> Tensor:
        return self.model.visual_projection(self.model.vision_model.post_layernorm(hidden))


class EvaClipEncoder(VisionEncoder):
    """EVA-CLIP: patch tokens -> final norm -> visual projection, on our own module."""

    def __init__(self, model: EvaClipVision, **about: Any) -> None:
        super().__init__(
            grid=model.config.grid,
            width=model.config.projection_dim,
            tokens="last layer, final norm, visual projection",
            **about,
        )
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels)

    def with_vectors(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The class token after the final norm, and its projection."""
        tokens, project = self.model.vision_model(pixels), self.model.visual_projection
        return project(tokens[:, 1:]), {"class": tokens[:, 0], "pooled": project(tokens[:, 0])}


class AutoModelEncoder(VisionEncoder):
    """A vision model of transformers' AutoModel: its last hidden patch tokens, without those before them.

    Args:
        layout: how they come out, as `TokenLayout.of` finds it. options: more arguments of the model.
    """

    def __init__(self, model: nn.Module, layout: TokenLayout, options: dict[str, Any], **about: Any) -> None:
        super().__init__(grid=layout.grid, width=layout.width, tokens="last hidden state", **about)
        self.model = model
        self.layout = layout
        self.options = options

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.model(pixel_values=pixels, **self.options).last_hidden_state
        return self.layout.patch_tokens(hidden, self.name)

    def with_vectors(self, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The first token before the patches, and what the model's own pooling makes, where it has these."""
        output = self.model(pixel_values=pixels, **self.options)
        hidden, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        vectors = {"class": hidden[:, 0]} if self.layout.prefix else {}
        if pooled is not None:
            vectors["pooled"] = pooled.flatten(1)
        return self.layout.patch_tokens(hidden, self.name), vectors


@dataclass(frozen=True)
class TokenLayout:
    """Where patch tokens are in a model's last hidden state.

    [B, prefix + grid * grid, width] (class token and registers first), or as a map [B, width, grid, grid].
    """

    grid: int
    width: int
    prefix: int = 0
    is_map: bool = False

    @classmethod
    def of(cls, hidden: Tensor, name: str, *, grid: int, max_prefix: int, hierarchical: bool) -> TokenLayout:
        """Of the last hidden state of one picture.

        Args:
            grid: patches per side. max_prefix: tokens that may come before them. hierarchical: patches are
                merged on the way, so that any square number of tokens is a grid.

        Raises:
            ValueError: no square grid.
        """
        if hidden.ndim == 4 and hidden.shape[2] == hidden.shape[3]:
            return cls(hidden.shape[2], hidden.shape[1], is_map=True)
        if hidden.ndim == 3:
            _, count, width = hidden.shape
            if 0 <= count - grid**2 <= max_prefix:
                return cls(grid, width, prefix=count - grid**2)
            if hierarchical and math.isqrt(count) ** 2 == count:
                return cls(math.isqrt(count), width)
        raise ValueError(
            f"{name}: expected {grid**2} patch tokens ({grid}x{grid}) and at most {max_prefix} others, found "
            f"shape {list(hidden.shape)}"
        )

    def patch_tokens(self, hidden: Tensor, name: str) -> Tensor:
        """[B, grid * grid, width], row-major."""
        tokens = hidden.flatten(2).transpose(1, 2) if self.is_map else hidden[:, self.prefix :]
        if tokens.shape[1:] != (self.grid**2, self.width):
            raise ValueError(
                f"{name}: expected {self.prefix + self.grid**2} tokens of {self.width}, found shape "
                f"{list(hidden.shape)}"
            )
        return tokens


class TimmEncoder(VisionEncoder):
    """A timm model's unpooled features. Not run in this project's tests: timm needs torchvision."""

    def __init__(self, model: Any, **about: Any) -> None:
        grid = about["preprocessing"].size // model.patch_embed.patch_size[0]
        super().__init__(grid=grid, width=model.num_features, tokens="timm forward_features", **about)
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.forward_features(pixels)[:, self.model.num_prefix_tokens :]
