"""A checkpoint's preprocessing, read as transformers' own image processors read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from blip3o_dit.extraction.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from blip3o_dit.extraction.processor_config import PROCESSORS, from_processor, read_preprocessing

SHAPES = [(61, 90), (90, 61), (40, 40), (300, 20), (400, 500)]
SQUARE = {"height": 32, "width": 32}
# By family: the processor, and what its file says beside that
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIP": ("CLIP", {}),
    "CLIP of old": ("CLIP", {"size": 32, "crop_size": 32, "do_center_crop": True}),
    "SigLIP": ("Siglip", {"size": SQUARE, "resample": 2}),
    "ViT": ("ViT", {"size": SQUARE}),
    "ViT of old": ("ViT", {"size": 32}),
    "DINOv2": ("Bit", {"size": {"shortest_edge": 40}, "crop_size": SQUARE}),
    "DeiT": ("DeiT", {"size": 40, "crop_size": 32}),
    "DeiT by default": ("DeiT", {}),
    "BEiT": ("Beit", {"size": SQUARE, "do_center_crop": False, "crop_size": SQUARE}),
    "BEiT cropped": ("Beit", {"size": {"height": 40, "width": 40}, "do_center_crop": True, "crop_size": 32}),
    "ConvNext": ("ConvNext", {"size": {"shortest_edge": 32}, "crop_pct": 0.9}),
    "ConvNext by default": ("ConvNext", {}),
    "MAE, Swin": ("ViT", {"size": SQUARE, "resample": 3, "image_mean": [0.4, 0.5, 0.6]}),
    "not normalised": ("ViT", {"size": SQUARE, "do_normalize": False}),
    "not rescaled": ("ViT", {"size": SQUARE, "do_rescale": False}),
    "another scale": ("CLIP", {"size": {"shortest_edge": 32}, "crop_size": 32, "rescale_factor": 1 / 127.5}),
    "cropped only": ("CLIP", {"do_resize": False, "crop_size": 36}),
    "nulls": ("CLIP", {"size": {"shortest_edge": 32}, "crop_size": SQUARE, "resample": None, "do_pad": None}),
}


@pytest.mark.parametrize("family", FILES)
def test_the_same_bits_as_transformers(family: str) -> None:
    kind, settings = FILES[family]
    theirs = getattr(transformers, f"{kind}ImageProcessorPil")(
        **{k: v for k, v in settings.items() if v is not None}
    )
    for values in (settings, theirs.to_dict()):  # as written by hand, and as transformers saves it
        ours = from_processor({"image_processor_type": f"{kind}ImageProcessor"} | values, "", 32)
        for shape in SHAPES:
            image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
            expected = torch.as_tensor(np.asarray(theirs(image)["pixel_values"][0]))
            assert torch.equal(ours(image), expected), shape


@pytest.mark.parametrize("kind", sorted(set(PROCESSORS) - {"DINOv3ViT"}))
def test_defaults_are_those_of_transformers(kind: str) -> None:
    theirs = json.loads(getattr(transformers, f"{kind}ImageProcessorPil")().to_json_string())
    ours = json.loads(json.dumps(PROCESSORS[kind]))
    assert {key: theirs.get(key) or False for key in ours} == ours


def test_dinov3_within_rounding() -> None:
    """Its processor needs torchvision, which scales floats; here bytes are scaled, as Pillow does."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8))
    ours = from_processor({"image_processor_type": "DINOv3ViTImageProcessorFast", "size": SQUARE}, "", None)
    floats = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    scaled = F.interpolate(floats, (32, 32), mode="bilinear", antialias=True, align_corners=False)[0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (ours.mean, ours.std))
    assert ((ours(image) - (scaled - mean) / std) * std * 255).abs().max() < 1.01
    assert ours.mean == (0.485, 0.456, 0.406)


def test_where_it_is_read_from(tmp_path: Path) -> None:
    def write(name: str, values: Any) -> Path:
        (tmp_path / name).write_text(json.dumps(values))
        return tmp_path / name

    assert read_preprocessing(tmp_path, "clip", 32) == Preprocessing(32)
    with pytest.raises(ValueError, match=r"found none: name one with --eva_preprocessing FILE or --clip"):
        read_preprocessing(tmp_path, "beit", 32)
    write("processor_config.json", {"processor_class": "a text processor"})
    assert read_preprocessing(tmp_path, "clip", 32) == Preprocessing(32)
    write("preprocessor_config.json", {"size": 40, "crop_size": 40, "image_mean": [0.1, 0.2, 0.3]})
    assert read_preprocessing(tmp_path, "clip", 32) == Preprocessing(40, mean=(0.1, 0.2, 0.3))
    inner = {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, "resample": 2}
    write("processor_config.json", {"image_processor": inner})  # as transformers 5 saves it
    half = (0.5, 0.5, 0.5)
    siglip = Preprocessing(32, "squash", "bilinear", half, half)
    assert read_preprocessing(tmp_path, "clip", 32) == siglip
    given = write("mine.json", {"image_processor_type": "ViTFeatureExtractor", "size": 48})
    assert read_preprocessing(tmp_path, "clip", 32, given=given).size == 48
    with pytest.raises(FileNotFoundError):
        read_preprocessing(tmp_path, "clip", 32, given=tmp_path / "gone.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resample": 7}, "resample: expected one of"),
        ({"resample": "bicubic"}, "resample: expected one of"),
        ({"size": {"height": 32, "width": 48}}, "size: expected a square's height and width"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "size: expected a square's"),
        ({"size": {"max_height": 32, "max_width": 64}}, "size: expected a square's"),
        ({"size": 0}, "size: expected an integer >= 1"),
        ({"size": 10**6}, "size: expected at most 8192 pixels"),
        ({"size": 32, "crop_size": 40}, "crop_size: expected at most 32"),
        ({"do_center_crop": False}, "expected height and width, or a center crop, found the shorter"),
        ({"do_pad": True}, "do_pad: a step of preprocessing that is not known"),
        ({"crop_pct": 0.9}, "crop_pct: a step of preprocessing that is not known"),
        ({"image_processor_type": "LevitImageProcessor"}, "image_processor_type: expected one of CLIP, "),
        ({"image_mean": [0.5]}, "image_mean: expected three numbers"),
        ({"image_std": [1, 0, 1]}, "image_std: expected numbers above 0"),
        ({"rescale_factor": 0}, "rescale_factor: expected a number above 0"),
        (
            {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 2},
            r"crop_pct: expected a number in",
        ),
    ],
)
def test_a_rule_that_is_not_known_is_named(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as caught:
        read_preprocessing(tmp_path, "clip", 32)
    assert str(tmp_path / "preprocessor_config.json") in str(caught.value)


def test_old_stores_describe_clip_as_before() -> None:
    expected = {"size": 224, "resize": "shortest", "resample": "bicubic"}
    expected |= {"mean": list(CLIP_MEAN), "std": list(CLIP_STD)}  # type: ignore[dict-item]
    assert Preprocessing(224).describe() == expected
    assert Preprocessing(224, resize_to=256).describe() == expected | {"resize_to": 256}
