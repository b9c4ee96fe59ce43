"""Vision towers by name: loaded from a folder, the hub or a library, and checked; and pooling of tokens."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionConfig, CLIPVisionModelWithProjection, ViTModel

from blip3o_dit.extraction.encoders import (
    AutoModelEncoder,
    ClipEncoder,
    EvaClipEncoder,
    TimmEncoder,
    TokenLayout,
    VisionEncoder,
)
from blip3o_dit.extraction.eva_clip import EvaClipConfig, EvaClipVision, assign_weights
from blip3o_dit.extraction.preprocessing import Preprocessing
from blip3o_dit.extraction.processor_config import read_preprocessing
from blip3o_dit.extraction.weight_files import (
    count_parameters,
    other_layout,
    parameters_digest,
    read_tensors,
    refuse_impostor,
    weight_files,
    weights_digest,
)
from blip3o_dit.utils.hub import download
from blip3o_dit.utils.json_files import one_line, read_json_object, short_repr
from blip3o_dit.utils.logging import quiet_transformers
from blip3o_dit.utils.validation import check_name, check_size, is_hub_id, package_missing

# Bytes of a tower from which on it is said what it takes
LARGE = 4e9
# What transformers raises on folders that it cannot make a model of
NOT_LOADED = (
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)

logger = logging.getLogger(__name__)


def load_encoder(
    spec: str,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    preprocessing: str | Path | None = None,
    size: int | None = None,
) -> VisionEncoder:
    """A tower by folder or hub id (CLIP, EVA-CLIP, AutoModel vision towers), timm: or open_clip: name.

    A folder is read without touching the network, and no code in it is run.

    Args:
        preprocessing: a preprocessor_config.json to use instead of the tower's own.
        size: pixels a side, where the model takes others than it was trained on.

    Raises:
        ValueError, OSError: one line: nothing there, an architecture that is not supported, weights that
            do not fit, a missing extra.
    """
    if spec.startswith(("timm:", "open_clip:")):
        if preprocessing or size:
            raise ValueError(
                f"{spec}: expected the settings that come with it, found a file or size of yours"
            )
        return _load_timm(spec).to(dtype)
    folder, commit = find_folder(spec, revision)
    config = _read_config(folder)
    model_type = str(config.get("model_type"))
    is_eva = "EvaCLIP" in " ".join(map(str, config.get("architectures") or []))
    checkpoint = Checkpoint(folder, config, weight_files(folder), dtype)
    prepare = read_preprocessing(
        folder, "clip" if is_eva else model_type, checkpoint.image_size, given=preprocessing
    )
    about: dict[str, Any] = {"name": spec, "revision": revision, "commit": commit}
    about |= {
        "weights": weights_digest(checkpoint.files),
        "preprocessing": prepare.at(size) if size else prepare,
    }
    if is_eva:
        return _load_eva(checkpoint, about)
    if model_type in ("clip", "clip_vision_model"):
        return _load_clip(checkpoint, about, resized=size is not None)
    return _load_auto(checkpoint, about, resized=size is not None)


def digest_of_weights(spec: str, revision: str | None = None) -> str | None:
    """What `describe()` of the loaded tower says of its weights; None where only loading tells.

    Raises:
        ValueError, OSError: as `load_encoder`.
    """
    if spec.startswith(("timm:", "open_clip:")):
        return None
    return weights_digest(weight_files(find_folder(spec, revision)[0]))


def local_files(spec: str, revision: str | None = None) -> list[Path] | None:
    """The weight files of a tower that is on this disk; None for one that would be downloaded.

    Raises:
        ValueError, OSError: as `load_encoder`, for what is neither.
    """
    if spec.startswith(("timm:", "open_clip:")):
        return None
    if not is_hub_id(spec) or spec.count("/") != 1 or Path(spec).exists():
        return weight_files(find_folder(spec, revision)[0])
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return weight_files(Path(snapshot_download(spec, revision=revision, local_files_only=True)))
    except (LocalEntryNotFoundError, ValueError):  # nothing of it, or not all of its weights
        return None


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
        "weights": f"seed {seed}",
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


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, and how it is to be loaded."""

    folder: Path
    config: dict[str, Any]
    files: list[Path]
    dtype: torch.dtype

    @property
    def image_size(self) -> int | None:
        """Pixels a side that the tower was trained on. Raises ValueError for pictures that are not square."""
        vision = self.config.get("vision_config")
        size = (vision if isinstance(vision, dict) else self.config).get("image_size")
        sides = set(size) if isinstance(size, list) else {size}
        if len(sides) != 1:
            raise ValueError(f"{self.folder}: expected a square image_size, found {short_repr(size)}")
        side = sides.pop()
        if side is not None:
            check_size(f"{self.folder}: image_size", side)
        return side


def _load_eva(checkpoint: Checkpoint, about: dict[str, Any]) -> EvaClipEncoder:
    folder = checkpoint.folder
    with torch.device("meta"):
        model = EvaClipVision(EvaClipConfig.from_dict(str(folder / "config.json"), checkpoint.config))
    _check_size(folder, about["preprocessing"].size, model.config.image_size, model.config.patch_size)
    _say_size(about["name"], sum(p.numel() for p in model.parameters()), checkpoint.dtype)
    assign_weights(model, read_tensors(folder), where=str(folder), dtype=checkpoint.dtype)
    return EvaClipEncoder(model, **about)


def _load_clip(checkpoint: Checkpoint, about: dict[str, Any], *, resized: bool) -> ClipEncoder:
    model = _from_pretrained(CLIPVisionModelWithProjection, checkpoint, about["name"])
    vision: Any = model.config
    size = about["preprocessing"].size
    _check_size(checkpoint.folder, size, size if resized else vision.image_size, vision.patch_size)
    return ClipEncoder(model, **about)


def _check_size(folder: Path, size: int, expected: int, patch_size: int) -> None:
    if size != expected:
        raise ValueError(
            f"{folder}: expected pictures of {expected} pixels a side, its positions, found {size}"
        )
    if size % patch_size:
        raise ValueError(f"{folder}: {size} pixels are not a multiple of the patch size {patch_size}")


def _load_auto(checkpoint: Checkpoint, about: dict[str, Any], *, resized: bool) -> AutoModelEncoder:
    folder, size = checkpoint.folder, about["preprocessing"].size
    is_mae = checkpoint.config.get("model_type") == "vit_mae"
    model = _from_pretrained(ViTModel if is_mae else AutoModel, checkpoint, about["name"])
    vision = getattr(model.config, "vision_config", model.config)
    tower = getattr(model, "vision_model", model).eval()
    patch_size = getattr(vision, "patch_size", None)
    if not isinstance(patch_size, int):
        raise ValueError(f"{folder}: expected a vision tower with square patches, found {vision.model_type}")
    check_size(f"{folder}: patch_size", patch_size)
    _check_size(folder, size, size, patch_size)
    options: dict[str, Any] = {}
    if resized and "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
        options["interpolate_pos_encoding"] = True
    registers = getattr(vision, "num_register_tokens", None) or 0
    layout = TokenLayout.of(
        _try_out(tower, size, checkpoint, options),
        str(folder),
        grid=size // patch_size,
        max_prefix=1 + registers + (vision.model_type == "deit"),
        hierarchical=hasattr(vision, "depths"),
    )
    return AutoModelEncoder(tower, layout, options, **about)


@torch.no_grad()  # models keep tensors of a first call, which inference mode would mark for good
def _try_out(tower: nn.Module, size: int, checkpoint: Checkpoint, options: dict[str, Any]) -> Tensor:
    """The last hidden state of one grey picture: what a model does not take shows before any is read."""
    pixels = torch.zeros(1, 3, size, size, dtype=checkpoint.dtype)
    try:
        hidden = tower(pixel_values=pixels, **options).last_hidden_state
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        kind = checkpoint.config.get("model_type")
        raise ValueError(
            f"{checkpoint.folder}: expected a vision tower that takes pictures of {size} pixels, found a "
            f"{short_repr(kind)} model that does not: {one_line(error)}"
        ) from error
    if not isinstance(hidden, Tensor):
        raise ValueError(f"{checkpoint.folder}: expected a last hidden state, found none")
    return hidden


def _from_pretrained(kind: Any, checkpoint: Checkpoint, name: str) -> Any:
    """Tensors of other towers may be left over; this tower's own must all be there and fit (ValueError).

    Not the pooler's: it comes after the tokens, classification checkpoints have none, and it is left out.
    """
    folder = checkpoint.folder
    _say_size(name, count_parameters(checkpoint.files), checkpoint.dtype)
    try:
        with quiet_transformers():
            model, info = kind.from_pretrained(
                folder,
                dtype=checkpoint.dtype,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                local_files_only=True,
            )
    except NOT_LOADED as error:
        raise ValueError(f"{folder}: not a model that transformers loads: {one_line(error)}") from error
    missing = sorted(info.get("missing_keys") or ())
    if any(key.startswith("pooler.") for key in missing):
        model.pooler = None  # random, it would pool to nothing
        missing = [key for key in missing if not key.startswith("pooler.")]
    mismatched = sorted(str(key[0]) for key in info.get("mismatched_keys") or ())
    if missing or mismatched:
        raise ValueError(
            f"{folder}: weights do not fit: {len(missing)} missing {missing[:2]}, "
            f"{len(mismatched)} misshapen {mismatched[:2]}"
        )
    return model


def find_folder(spec: str, revision: str | None, more: Sequence[str] = ()) -> tuple[Path, str | None]:
    """The folder of a tower, and the commit it is at on the hub (None for a folder of the user's).

    `more` are names of files that are wanted from the hub beside configuration and weights.
    """
    path = Path(spec)
    if path.is_dir():
        return path, None
    if path.is_file():
        found = other_layout(path.parent, [path.name])
        raise FileNotFoundError(f"{spec}: expected a folder with config.json, or a hub id, found {found}")
    if spec.count("/") != 1 or not is_hub_id(spec):
        raise FileNotFoundError(f"{spec}: expected a model folder or a hub id (owner/name), found neither")
    folder = download(spec, revision, ["*.json", "*.safetensors", *more])
    if not list(folder.glob("model*.safetensors")):
        folder = download(spec, folder.name, ["*.json", "*.bin"])
    return folder, folder.name


def _load_timm(spec: str) -> TimmEncoder:
    kind, _, name = spec.partition(":")
    package = "timm" if kind == "timm" else "open_clip"
    if importlib.util.find_spec(package) is None:
        raise package_missing(spec, "timm" if kind == "timm" else "open_clip_torch")
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
    about: dict[str, Any] = {"weights": parameters_digest(model), "preprocessing": preprocessing}
    return TimmEncoder(model, name=spec, revision=None, **about)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: expected config.json, found {other_layout(folder) or 'none'}")
    refuse_impostor(file)
    return read_json_object(file)


def _say_size(name: str, parameters: int, dtype: torch.dtype) -> None:
    """What a large tower takes of memory, before it does."""
    size = parameters * dtype.itemsize
    if size < LARGE:
        return
    kind = str(dtype).removeprefix("torch.")
    less = f" (--dtype bfloat16: {2 * parameters / 1e9:.0f} GB)" if dtype.itemsize > 2 else ""
    logger.info("%s: %.1f B parameters in %s: %.0f GB%s", name, parameters / 1e9, kind, size / 1e9, less)
