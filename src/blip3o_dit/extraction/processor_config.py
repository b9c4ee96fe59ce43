"""A checkpoint's own preprocessing, read from its JSON by the rules of transformers' image processors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip3o_dit.extraction.preprocessing import CLIP_MEAN, CLIP_STD, MAX_SIDE, RESAMPLING, Preprocessing
from blip3o_dit.extraction.weight_files import refuse_impostor
from blip3o_dit.utils.json_files import read_json_object, short_repr
from blip3o_dit.utils.validation import check_integer, error_context, is_number

# Newer transformers save the image processor inside of the processor's file
FILES = ("processor_config.json", "preprocessor_config.json")
GIVE_ONE = "name one with --eva_preprocessing FILE or --clip_preprocessing FILE"

_HALF = (0.5, 0.5, 0.5)
_CLIP: dict[str, Any] = dict(
    size={"shortest_edge": 224}, do_center_crop=True, resample=3, image_mean=CLIP_MEAN, image_std=CLIP_STD
)
_SQUASH: dict[str, Any] = dict(do_center_crop=False, image_mean=_HALF, image_std=_HALF)
# What a processor does where its file says nothing, by its name without "ImageProcessor". A plain number as
# `size` is the shorter side where the default is one.
PROCESSORS: dict[str, dict[str, Any]] = {
    "CLIP": _CLIP,
    "ChineseCLIP": _CLIP,
    "Bit": _CLIP,
    "Siglip": _SQUASH | dict(size={"height": 224, "width": 224}, resample=3),
    "ViT": _SQUASH | dict(size={"height": 224, "width": 224}, resample=2),
    "Beit": _SQUASH | dict(size={"height": 224, "width": 224}, resample=3),
    "DeiT": _SQUASH | dict(size={"height": 256, "width": 256}, resample=3, do_center_crop=True),
    "ConvNext": _SQUASH | dict(size={"shortest_edge": 384}, resample=3, crop_pct=224 / 256),
    "DINOv3ViT": _SQUASH
    | dict(size={"height": 224, "width": 224}, resample=2)
    | dict(image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225)),
}
# The processor of a model type, for files that name none
_BY_MODEL_TYPE = {
    "clip": "CLIP",
    "siglip": "Siglip",
    "dinov2": "Bit",
    "dinov3_vit": "DINOv3ViT",
    "dinov3_convnext": "DINOv3ViT",
    "vit": "ViT",
    "vit_mae": "ViT",
    "vit_msn": "ViT",
    "swin": "ViT",
    "swinv2": "ViT",
    "ijepa": "ViT",
    "deit": "DeiT",
    "beit": "Beit",
    "data2vec-vision": "Beit",
    "convnext": "ConvNext",
    "convnextv2": "ConvNext",
}
# Steps of other processors that no tower here asks for
_UNKNOWN_STEPS = (
    "do_pad",
    "do_thumbnail",
    "do_align_long_axis",
    "do_crop_margin",
    "do_flip_channel_order",
    "do_image_splitting",
    "do_pan_and_scan",
    "do_color_quantize",
    "rescale_offset",
    "include_top",
    "max_num_patches",
    "size_divisor",
    "keep_aspect_ratio",
    "use_square_size",
)


def read_preprocessing(
    folder: Path, model_type: str, image_size: int | None, given: str | Path | None = None
) -> Preprocessing:
    """A tower's preprocessing, by the JSON file `given` or those in its folder.

    CLIP and EVA-CLIP checkpoints without a file are taken to be trained as CLIP, at `image_size`.

    Raises:
        ValueError, OSError: for any other tower without a file, and for a rule that is not known; names the
            file and the setting.
    """
    files = [Path(given)] if given else [folder / name for name in FILES if (folder / name).is_file()]
    for file in files:
        refuse_impostor(file)
        values = read_json_object(file)
        inner = values.get("image_processor")
        if isinstance(inner, dict):
            values = inner
        elif file.name == FILES[0]:
            continue  # a text processor's only
        with error_context(file):
            return from_processor(values, model_type, image_size)
    if model_type in ("clip", "clip_vision_model"):
        return Preprocessing(image_size or 224)
    raise ValueError(
        f"{folder}: expected {FILES[1]}, which says how pictures are prepared, found none: {GIVE_ONE}"
    )


def from_processor(values: Mapping[str, Any], model_type: str, image_size: int | None) -> Preprocessing:
    """From the settings of an image processor. Raises ValueError for a rule that is not known."""
    name = _processor_name(values, model_type)
    asked = {key: value for key, value in values.items() if value is not None}
    for key in (*_UNKNOWN_STEPS, *(() if name == "ConvNext" else ("crop_pct",))):
        if asked.get(key):
            raise ValueError(f"{key}: a step of preprocessing that is not known here, found {asked[key]!r}")
    settings = PROCESSORS[name] | asked
    mean, std = _triple(settings, "image_mean"), _triple(settings, "image_std")
    if settings.get("do_normalize") is False:
        mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if min(std) <= 0:
        raise ValueError(f"image_std: expected numbers above 0, found {list(std)}")
    rescale = 1.0 if settings.get("do_rescale") is False else settings.get("rescale_factor", 1 / 255)
    if not is_number(rescale) or not 0 < rescale <= 1:
        raise ValueError(
            f"rescale_factor: expected a number above 0 and up to 1, found {short_repr(rescale)}"
        )
    how, to, size = _sizes(settings, name, image_size, has_crop="crop_size" in asked)
    return Preprocessing(
        size, how, _resampling(settings), mean, std, resize_to=None if to == size else to, rescale=rescale
    )


def _processor_name(values: Mapping[str, Any], model_type: str) -> str:
    said = values.get("image_processor_type") or values.get("feature_extractor_type")
    if said is None:
        plain = model_type.removesuffix("_vision_model").removesuffix("_with_registers")
        if plain not in _BY_MODEL_TYPE:
            raise ValueError(
                f"image_processor_type: expected a name, found none for model type {model_type!r}"
            )
        return _BY_MODEL_TYPE[plain]
    name = str(said).removesuffix("Fast").removesuffix("Pil")
    name = name.removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if name not in PROCESSORS:
        known = ", ".join(PROCESSORS)
        raise ValueError(f"image_processor_type: expected one of {known}, found {short_repr(said)}")
    return name


def _sizes(
    settings: Mapping[str, Any], name: str, image_size: int | None, *, has_crop: bool
) -> tuple[str, int | None, int]:
    """How it is resized, to what, and the side of the square that is left.

    A crop that is the processor's default (224) and not the file's own is no larger than what is resized to.
    """
    crop = _side(settings.get("crop_size", 224), "crop_size") if settings.get("do_center_crop") else None
    if settings.get("do_resize") is False:
        return ("crop", None, crop) if crop else ("none", None, image_size or 224)
    shorter, side = _resized_side(settings["size"], "shortest_edge" in PROCESSORS[name]["size"])
    if name == "ConvNext" and shorter:
        fraction = settings["crop_pct"]
        if not is_number(fraction) or not 0 < fraction <= 1:
            raise ValueError(f"crop_pct: expected a number in (0, 1], found {short_repr(fraction)}")
        return ("squash", side, side) if side >= 384 else ("shortest", int(side / fraction), side)
    if shorter and crop is None:
        raise ValueError("size: expected height and width, or a center crop, found the shorter side only")
    if crop and not has_crop:
        crop = min(crop, side)
    if crop and crop > side:
        raise ValueError(f"crop_size: expected at most {side}, what the picture is resized to, found {crop}")
    return ("shortest" if shorter else "squash"), side, crop or side


def _resized_side(size: Any, shorter_by_default: bool) -> tuple[bool, int]:
    """Whether the shorter side is meant, and what it is resized to."""
    if isinstance(size, dict):
        size = {key: value for key, value in size.items() if value is not None}
        if set(size) == {"shortest_edge"}:
            return True, _side(size["shortest_edge"], "size.shortest_edge")
        return False, _side(size, "size")
    return shorter_by_default, _side(size, "size")


def _side(value: Any, key: str) -> int:
    if isinstance(value, dict):
        value = {name: number for name, number in value.items() if number is not None}
        if set(value) != {"height", "width"} or value["height"] != value["width"]:
            raise ValueError(f"{key}: expected a square's height and width, found {short_repr(value)}")
        value = value["height"]
    check_integer(key, value, 1)
    if value > MAX_SIDE:
        raise ValueError(f"{key}: expected at most {MAX_SIDE} pixels, found {value}")
    return int(value)


def _resampling(settings: Mapping[str, Any]) -> str:
    names = {number: name for name, number in RESAMPLING.items()}
    number = settings["resample"]
    if not isinstance(number, int) or number not in names:
        raise ValueError(f"resample: expected one of {names}, found {short_repr(number)}")
    return names[number]


def _triple(settings: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    values = settings[key]
    if (
        not isinstance(values, list | tuple)
        or len(values) != 3
        or not all(is_number(value) and math.isfinite(value) for value in values)
    ):
        raise ValueError(f"{key}: expected three numbers, found {short_repr(values)}")
    return (values[0], values[1], values[2])
