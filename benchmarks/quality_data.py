"""The data sets of the quality benchmark, in memory, each as an `Embeddings`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from blip3o_dit.data.checks import Indices, Record
from examples.digits.towers import ClipTower, EvaTower, digit_tokens, encode
from tests.helpers.linear_gaussian import LinearGaussian


@dataclass
class MemorySource:
    """Conditions [n, L, C_eva] and targets [n, N, C] that are simply there; `held_out` marks samples.

    `groups` [n] numbers the group of each sample, such as the picture that it is a crop of, if there are any.
    """

    name: str
    eva: Tensor
    clip: Tensor
    held_out: np.ndarray
    labels: np.ndarray | None = None
    groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.path = Path(self.name)
        self.num_samples, self.num_tokens, self.condition_dim = self.eva.shape
        self.target_dim = self.clip.shape[2]
        self.shard_starts = np.array([0, self.num_samples])

    def fetch(self, indices: Indices) -> tuple[Tensor, Tensor]:
        rows = torch.as_tensor(np.asarray(indices))
        return self.eva[rows], self.clip[rows]

    def records(self, indices: Indices | None = None) -> list[Record]:
        rows = range(self.num_samples) if indices is None else indices
        if self.labels is None:
            return [{"key": str(int(i))} for i in rows]
        return [{"key": str(int(i)), "label": str(self.labels[i])} for i in rows]


def digits(seed: int = 0) -> MemorySource:
    """scikit-learn's digits seen by two small towers that were trained on the training part."""
    held_out = _every_fifth(1797)
    tokens = digit_tokens(np.flatnonzero(~held_out), seed=seed, progress=False)
    return MemorySource("digits", tokens.condition, tokens.target, held_out, tokens.labels)


def photographs(count: int = 3000, seed: int = 0) -> MemorySource:
    """Crops of three photographs that ship in packages, seen by two random vision transformers.

    The photographs: scikit-learn's china.jpg and flower.jpg, matplotlib's grace_hopper.jpg. Held-out crops
    come from the right quarter of each, training crops from the rest: none share a pixel.
    """
    hopper = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    pictures = [np.asarray(Image.open(hopper).convert("RGB")), *load_sample_images().images]
    generator = np.random.default_rng(seed)
    held_out = _every_fifth(count)
    crops = np.stack([_crop(pictures[i % 3], generator, right=held_out[i]) for i in range(count)])
    eva, clip = EvaTower(seed=100 + seed), ClipTower(seed=101 + seed)
    condition, target = (encode(tower, crops, progress=False) for tower in (eva, clip))
    return MemorySource("photographs", condition, target, held_out)


def linear_gaussian(count: int = 4096, seed: int = 0) -> MemorySource:
    """Targets A c + b + L z; see `linear_gaussian.py`."""
    data = LinearGaussian(num_samples=count, num_tokens=16, seed=seed)
    eva, clip = data.fetch(np.arange(count))
    return MemorySource("linear-Gaussian", eva.contiguous(), clip, _every_fifth(count))


@dataclass
class Modes(MemorySource):
    """A condition that leaves a mixture open: given c, all tokens of a sample share one of four modes.

    x_1 = A c + m_k + 0.1 z with k drawn with `weights`; `matrix` is A [C, C_eva], `centres` m [4, N, C].
    """

    matrix: Tensor = None  # type: ignore[assignment]
    centres: Tensor = None  # type: ignore[assignment]
    weights: tuple[float, ...] = (0.4, 0.3, 0.2, 0.1)

    def mode_of(self, eva: Tensor, clip: Tensor) -> Tensor:
        """The mode whose centre is nearest, [n]; -1 where none is within four deviations of the noise."""
        left = clip - eva @ self.matrix.T  # [n, N, C]
        distance = (left[:, None] - self.centres).square().mean(dim=(2, 3)).sqrt()  # [n, 4]
        nearest = distance.min(dim=1)
        return torch.where(nearest.values < 0.4, nearest.indices, -1)


def modes(count: int = 4096, seed: int = 0) -> Modes:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(8, 8, generator=generator) / 8**0.5
    centres = 1.2 * torch.randn(4, 1, 8, generator=generator).expand(-1, 4, -1)
    eva = torch.randn(count, 1, 8, generator=generator).expand(-1, 4, -1).contiguous()
    chosen = torch.multinomial(torch.tensor(Modes.weights), count, replacement=True, generator=generator)
    noise = 0.1 * torch.randn(count, 4, 8, generator=generator)
    clip = eva @ matrix.T + centres[chosen] + noise
    return Modes("modes", eva, clip, _every_fifth(count), matrix=matrix, centres=centres)


SETS = {
    "digits": digits,
    "photographs": photographs,
    "linear-Gaussian": linear_gaussian,
    "modes": modes,
}


def _every_fifth(count: int) -> np.ndarray:
    return np.arange(count) % 5 == 4


def _crop(picture: np.ndarray, generator: np.random.Generator, *, right: bool) -> np.ndarray:
    """A square crop of 40 to 100 pixels, brought to 32 x 32."""
    size = int(generator.integers(40, 101))
    border = 3 * picture.shape[1] // 4
    low, high = (border, picture.shape[1]) if right else (0, border)
    size = min(size, high - low)
    x = int(generator.integers(low, high - size + 1))
    y = int(generator.integers(0, picture.shape[0] - size + 1))
    crop = Image.fromarray(picture[y : y + size, x : x + size])
    return np.asarray(crop.resize((32, 32), Image.Resampling.BICUBIC))
