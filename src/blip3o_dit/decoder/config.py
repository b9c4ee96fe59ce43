"""The sizes of a decoder, and the settings that one is trained with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from blip3o_dit.data.choices import SPLIT_RULES, check_split
from blip3o_dit.training.config import SPLIT_SETTINGS, TrainingConfig
from blip3o_dit.utils.settings import check_settings, setting
from blip3o_dit.utils.validation import check_bool, check_integer, check_range, check_size

if TYPE_CHECKING:
    from blip3o_dit.data.dataset import Split
    from blip3o_dit.data.embeddings import Embeddings

# Pixels a side of what one token of the network paints, at most.
MAX_PATCH = 8
# Pixels a side of a picture, about, where nobody says.
USUAL_SIZE = 64

_at_least_0 = partial(check_integer, low=0)
_at_least_1 = partial(check_integer, low=1)
_nonnegative = partial(check_range, low=0.0, high=1e3)


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The sizes of a decoder; what its config.json holds.

    Args:
        num_tokens: N, a square grid, row-major. channels: C, the width of a token.
        picture_size: S, pixels a side, a multiple of the grid's side.
        normalize_embeddings: each token is L2-normalised first.

    Raises:
        ValueError: names the field, what it expects and what it found.
    """

    num_tokens: int
    channels: int
    picture_size: int
    width: int
    num_layers: int
    num_heads: int
    normalize_embeddings: bool = False

    def __post_init__(self) -> None:
        for name in ("num_tokens", "channels", "picture_size", "width", "num_layers", "num_heads"):
            check_size(name, getattr(self, name))
        check_bool("normalize_embeddings", self.normalize_embeddings)
        if math.isqrt(self.num_tokens) ** 2 != self.num_tokens:
            raise ValueError(f"num_tokens: expected a square, found {self.num_tokens}")
        if self.picture_size % self.grid:
            raise ValueError(
                f"picture_size: expected a multiple of {self.grid}, the side of the grid of tokens, "
                f"found {self.picture_size}"
            )
        if self.width % self.num_heads:
            raise ValueError(f"width: expected a multiple of {self.num_heads} heads, found {self.width}")

    @property
    def grid(self) -> int:
        """Tokens a side."""
        return math.isqrt(self.num_tokens)

    @property
    def split(self) -> int:
        """A token becomes split x split tokens of the network, each of which paints `patch` pixels a side."""
        own = self.picture_size // self.grid
        return next(k for k in range(1, own + 1) if own % k == 0 and own // k <= MAX_PATCH)

    @property
    def patch(self) -> int:
        """Pixels a side that one token of the network paints."""
        return self.picture_size // (self.grid * self.split)


def usual_picture_size(num_tokens: int, wanted: int = USUAL_SIZE) -> int:
    """The multiple of the grid's side that is nearest to so many pixels."""
    grid = math.isqrt(num_tokens)
    return grid * max(1, round(wanted / grid))


@dataclass(frozen=True, kw_only=True)
class DecoderTrainingConfig:
    """How a decoder is trained: one field per flag of `blip3o-dit train-decoder`.

    Raises:
        ValueError: names the field, what it expects and what it found.
    """

    picture_size: int | None = setting(
        None,
        "pixels a side of its pictures, a multiple of the grid's side (default: about 64, or what the tower "
        "saw where that is less)",
        group="decoder",
        check=check_size,
    )
    width: int = setting(128, "hidden width", check=check_size)
    num_layers: int = setting(2, "transformer layers", check=check_size)
    num_heads: int = setting(4, "attention heads", check=check_size)
    steps: int | None = setting(
        None,
        "optimizer steps (default: 10 passes over the pictures, from 400 to 4000 steps)",
        group="optimisation",
        check=_at_least_1,
    )
    batch_size: int = setting(32, "pictures per step", check=_at_least_1)
    learning_rate: float = setting(2e-3, "peak learning rate of AdamW", check=_nonnegative)
    noise: float = setting(
        0.4,
        "noise on the tokens, in units of a channel's deviation: each picture's own, |N(0, noise)| (RAE, "
        "arXiv 2510.11690, takes 0.8)",
        check=_nonnegative,
    )
    edges: float = setting(1.0, "weight of the steps from pixel to pixel in the loss", check=_nonnegative)
    seed: int = setting(42, "names every random draw, the split among them, as for train", check=_at_least_0)
    num_samples: int = setting(
        20_000,
        "most training pictures, chosen by the seed; they are kept in memory, 12 kB each of 64 pixels",
        group="samples",
        check=_at_least_1,
    )
    eval_split: float = setting(0.1, "share of the samples held out, as for train")
    split_by: str = setting("permutation", "how samples are held out, as for train", choices=SPLIT_RULES)
    group_pattern: str = setting("", "what takes a group out of a key, as for train")
    normalize_embeddings: bool = setting(
        False, "L2-normalise every token, as for train: for models that were trained so"
    )
    device: str = setting("auto", "where to train", group="device", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        check_settings(self)
        check_split(self.eval_split, self.split_by, self.group_pattern)

    def split(self, source: Embeddings) -> Split:
        """The samples that a model's training with these settings trains on, holds out and holds back."""
        return TrainingConfig(**{name: getattr(self, name) for name in SPLIT_SETTINGS}).split(source)
