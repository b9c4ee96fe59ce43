"""Vision towers behind one interface: pixels in, a grid of patch tokens out, which is pooled."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from blip3o_dit.extraction.eva_clip import EvaClipConfig, EvaClipVision, load_eva_clip
from blip3o_dit.extraction.preprocessing import CLIP_MEAN, CLIP_STD, RESAMPLING, Preprocessing
from blip3o_dit.utils.json_files import one_line, read_json
from blip3o_dit.utils.logging import quiet_transformers
from blip3o_dit.utils.validation import check_name, is_hub_id

# Downloaded from the hub: never code
HUB_FILES = ["*.json", "*.safetensors", "*.bin"]


class VisionEncoder(nn.Module):
    """A tower. `forward` takes [B, 3, size, size] and gives [B, grid * grid, width], row-major, no CLS.

    Args:
        tokens: what kind of tokens these are, for the manifest: layer, norm, projection.
        meaningful: False for random weights.
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
    ) -> None:
        super().__init__()
        self.name = name
        self.revision = revision
        self.preprocessing = preprocessing
        self.grid = grid
        self.width = width
        self.tokens = tokens
        self.meaningful = meaningful

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the tower; JSON values."""
        return {
            "name": self.name,
            "revision": self.revision,
            "width": self.width,
            "grid": self.grid,
            "tokens": self.tokens,
            "meaningful": self.meaningful,
            "preprocessing": self.preprocessing.describe(),
        }


class ClipEncoder(VisionEncoder):
    """CLIP: patch tokens -> post layer norm -> visual projection."""

    def __init__(self, model: CLIPVisionModelWithProjection, **about: Any) -> None:
        vision: Any = model.config  # its sizes are declared as int or pair; CLIP's are int
        super().__init__(
            grid=vision.image_size // vision.patch_size,
            width=vision.projection_dim,
            tokens="last layer, post layer norm, visual projection",
            **about,
        )
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        vision = self.model.vision_model
        hidden = vision(pixel_values=pixels).last_hidden_state  # [B, T, d], without the final norm
        return self.model.visual_projection(vision.post_layernorm(hidden[:, 1:]))


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


class AutoModelEncoder(VisionEncoder):
    """Any vision model of transformers' AutoModel: its last hidden patch tokens."""

    def __init__(
        self, model: nn.Module, *, patch_size: int, hidden_size: int, registers: int, **about: Any
    ) -> None:
        grid = about["preprocessing"].size // patch_size
        super().__init__(grid=grid, width=hidden_size, tokens="last hidden state", **about)
        self.model = model
        self.max_prefix_tokens = 1 + registers

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.model(pixel_values=pixels).last_hidden_state  # [B, prefix + grid * grid, d]
        prefix = hidden.shape[1] - self.grid**2  # CLS and registers come first
        if hidden.ndim != 3 or not 0 <= prefix <= self.max_prefix_tokens:
            raise ValueError(
                f"{self.name}: expected {self.grid**2} patch tokens ({self.grid}x{self.grid}) and at most "
                f"{self.max_prefix_tokens} others, found shape {list(hidden.shape)}"
            )
        return hidden[:, prefix:]


class TimmEncoder(VisionEncoder):
    """A timm model's unpooled features. Not run in this project's tests: timm needs torchvision."""

    def __init__(self, model: Any, **about: Any) -> None:
        grid = about["preprocessing"].size // model.patch_embed.patch_size[0]
        super().__init__(grid=grid, width=model.num_features, tokens="timm forward_features", **about)
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.forward_features(pixels)[:, self.model.num_prefix_tokens :]


def load_encoder(
    spec: str, *, dtype: torch.dtype = torch.float32, revision: str | None = None
) -> VisionEncoder:
    """A tower by folder or hub id (CLIP, EVA-CLIP, any AutoModel vision tower), timm: or open_clip: name.

    A folder is read without touching the network, and no code in it is run.

    Raises:
        ValueError, OSError: one line: nothing there, an architecture that is not supported, weights that
            do not fit, a missing extra.
    """
    if spec.startswith(("timm:", "open_clip:")):
        return _load_timm(spec).to(dtype)
    folder = Path(spec)
    if not folder.is_dir():
        folder = _download(spec, revision)
    config = _read_json(folder / "config.json")
    architectures = " ".join(config.get("architectures") or [])
    about: dict[str, Any] = {"name": spec, "revision": revision, "meaningful": True}
    if "EvaCLIP" in architectures:
        model = load_eva_clip(folder, config, dtype)
        about["preprocessing"] = _read_preprocessing(folder, model.config.image_size)
        return EvaClipEncoder(model, **about)
    if config.get("model_type") in ("clip", "clip_vision_model"):
        clip = _from_pretrained(CLIPVisionModelWithProjection, folder, dtype)
        about["preprocessing"] = _read_preprocessing(folder, clip.config.image_size)
        return ClipEncoder(clip, **about)
    return _load_auto(folder, dtype, about)


def pool_tokens(tokens: Tensor, num_tokens: int) -> Tensor:
    """Mean over square windows: [B, G * G, C] -> [B, num_tokens, C], both grids row-major.

    16x16 patches become 8x8 tokens by 2x2 means, as in BLIP3-o (arXiv 2505.09568).

    Raises:
        ValueError: for token counts that are no squares, or a grid that does not pool evenly; says both.
    """
    grid, side = math.isqrt(tokens.shape[1]), math.isqrt(num_tokens)
    if grid * grid != tokens.shape[1]:
        raise ValueError(f"patch tokens: expected a square number (an n x n grid), found {tokens.shape[1]}")
    if side < 1 or side * side != num_tokens:
        raise ValueError(f"tokens: expected a square number, found {num_tokens}")
    if side > grid or grid % side:
        raise ValueError(
            f"tokens: a grid of {grid}x{grid} patches does not pool evenly into {side}x{side} = {num_tokens}"
        )
    window = grid // side
    cells = tokens.unflatten(1, (side, window, side, window))  # [B, side, window, side, window, C]
    return cells.mean(dim=(2, 4)).flatten(1, 2)


def tiny_encoder(side: str, *, seed: int = 0) -> VisionEncoder:
    """A small random tower of the real classes, to try the pipeline without weights.

    Args:
        side: "eva" (64 wide) or "clip" (48 wide); both 64x64 pixels in a 16x16 grid.
    """
    check_name("side", side, ("eva", "clip"))
    about = {
        "name": f"random {side} tower, seed {seed}",
        "revision": None,
        "preprocessing": Preprocessing(64),
        "meaningful": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2 * seed + (side == "clip"))
        if side == "eva":
            return EvaClipEncoder(EvaClipVision(_TINY_EVA), **about)
        return ClipEncoder(CLIPVisionModelWithProjection(CLIPVisionConfig(**_TINY_CLIP)), **about)


_TINY: dict[str, Any] = dict(num_attention_heads=4, image_size=64, patch_size=4)
_TINY_EVA = EvaClipConfig(
    hidden_size=64, num_hidden_layers=2, intermediate_size=128, projection_dim=64, **_TINY
)
_TINY_CLIP = dict(hidden_size=48, num_hidden_layers=1, intermediate_size=96, projection_dim=48, **_TINY)


def _load_auto(folder: Path, dtype: torch.dtype, about: dict[str, Any]) -> AutoModelEncoder:
    with quiet_transformers():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    model = _from_pretrained(AutoModel, folder, dtype)
    vision = getattr(config, "vision_config", config)
    tower = getattr(model, "vision_model", model)
    image_size, patch_size = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not isinstance(patch_size, int):
        raise ValueError(f"{folder}: expected a vision tower with square patches, found {config.model_type}")
    sides = set(image_size) if isinstance(image_size, list | tuple) else {image_size or 224}
    if len(sides) != 1:
        raise ValueError(f"{folder}: expected a square image_size, found {list(image_size or [])}")
    preprocessing = _read_preprocessing(folder, sides.pop())
    if preprocessing.size % patch_size:
        raise ValueError(
            f"{folder}: {preprocessing.size} pixels are not a multiple of the patch size {patch_size}"
        )
    about |= {"preprocessing": preprocessing, "registers": getattr(vision, "num_register_tokens", 0) or 0}
    return AutoModelEncoder(tower, patch_size=patch_size, hidden_size=vision.hidden_size, **about)


def _from_pretrained(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Tensors of other towers may be left over; this tower's own must all be there and fit (ValueError)."""
    with quiet_transformers():
        model, info = kind.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            local_files_only=True,
        )
    missing = sorted(info.get("missing_keys") or ())
    mismatched = sorted(str(key[0]) for key in info.get("mismatched_keys") or ())
    if missing or mismatched:
        raise ValueError(
            f"{folder}: weights do not fit: {len(missing)} missing {missing[:2]}, "
            f"{len(mismatched)} misshapen {mismatched[:2]}"
        )
    return model


def _read_preprocessing(folder: Path, image_size: int) -> Preprocessing:
    """From preprocessor_config.json, read as plain JSON; CLIP's where the file is missing."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return Preprocessing(image_size)
    values = _read_json(file)
    names = {number: name for name, number in RESAMPLING.items()}
    size = values.get("crop_size") if values.get("do_center_crop") else values.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    resize = values.get("size")
    shortest = bool(values.get("do_center_crop")) or (isinstance(resize, dict) and "shortest_edge" in resize)
    return Preprocessing(
        size=size if isinstance(size, int) else image_size,
        resize="shortest" if shortest else "squash",
        resample=names.get(values.get("resample", 3), "bicubic"),
        mean=cast("tuple[float, float, float]", tuple(values.get("image_mean") or CLIP_MEAN)),
        std=cast("tuple[float, float, float]", tuple(values.get("image_std") or CLIP_STD)),
    )


def _download(spec: str, revision: str | None) -> Path:
    """A hub repository's configuration and weights; a path that does not exist is said to be one."""
    if spec.count("/") != 1 or not is_hub_id(spec):
        raise FileNotFoundError(f"{spec}: expected a model folder or a hub id (owner/name), found neither")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec, revision=revision, allow_patterns=HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = one_line(error, max_length=160)
        raise FileNotFoundError(f"{spec}: no such folder, and the hub did not give it: {reason}") from error


def _load_timm(spec: str) -> TimmEncoder:
    kind, _, name = spec.partition(":")
    package = "timm" if kind == "timm" else "open_clip"
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{spec}: expected the package {package}, found none: pip install 'blip3o-dit[{kind}]' "
            "(it needs torchvision)"
        )
    if kind == "timm":
        import timm

        model = timm.create_model(name, pretrained=True, num_classes=0)
    else:
        import open_clip

        architecture, _, tag = name.partition("/")
        model = open_clip.create_model(architecture, pretrained=tag or None).visual.trunk
    data = model.pretrained_cfg
    preprocessing = Preprocessing(data["input_size"][-1], mean=tuple(data["mean"]), std=tuple(data["std"]))
    if math.isqrt(model.patch_embed.num_patches) ** 2 != model.patch_embed.num_patches:
        raise ValueError(f"{spec}: expected a square grid, found {model.patch_embed.num_patches} patches")
    return TimmEncoder(model, name=spec, revision=None, preprocessing=preprocessing)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent}: expected {file.name}, found none")
    values = read_json(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(values).__name__}")
    return values
