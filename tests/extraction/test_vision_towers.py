"""Towers behind one interface, against direct use of transformers' classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from blip3o_dit.extraction.vision_towers import Preprocessing, load_encoder, tiny_encoder

SIZES: dict[str, Any] = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=4
)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, intermediate_size=64, projection_dim=20))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("batch", [1, 7])
def test_clip_equals_transformers_classes(clip_folder: Path, batch: int) -> None:
    encoder = load_encoder(str(clip_folder)).eval()
    direct = CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()
    pixels = torch.randn(batch, 3, 24, 24)
    with torch.no_grad():
        found = encoder(pixels)
        output = direct.vision_model(pixel_values=pixels)
        tokens = direct.visual_projection(direct.vision_model.post_layernorm(output.last_hidden_state))
        pooled = direct(pixel_values=pixels).image_embeds
    assert found.shape == (batch, 36, 20) and (encoder.grid, encoder.width) == (6, 20)
    assert (found - tokens[:, 1:]).abs().max() < 1e-5
    # The same steps on the class token are what transformers itself returns: the norm is applied once.
    torch.testing.assert_close(tokens[:, 0], pooled, rtol=0, atol=1e-5)


def test_clip_weights_that_do_not_fit_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    config = CLIPVisionConfig(**(SIZES | {"num_hidden_layers": 3}), intermediate_size=64, projection_dim=20)
    CLIPVisionModelWithProjection.from_pretrained(clip_folder).save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights do not fit: 16 missing"):
        load_encoder(str(tmp_path))


def test_any_automodel_vision_tower(tmp_path: Path) -> None:
    registers = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3))
    siglip = SiglipVisionModel(SiglipVisionConfig(**SIZES, intermediate_size=64))
    for name, model, prefix in (("dino", registers, 4), ("siglip", siglip, 0)):
        model.eval().save_pretrained(tmp_path / name)
        size = {"height": 24, "width": 24}
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps({"size": size, "resample": 2}))
        encoder = load_encoder(str(tmp_path / name)).eval()
        assert encoder.preprocessing.size == 24 and encoder.preprocessing.resample == "bilinear"
        pixels = torch.randn(2, 3, 24, 24)
        with torch.no_grad():
            expected = model(pixel_values=pixels).last_hidden_state[:, prefix:]
            torch.testing.assert_close(encoder(pixels), expected)
        assert encoder(pixels).shape == (2, 36, 32)


def test_grids_that_are_not_square_or_not_known_are_refused(tmp_path: Path) -> None:
    sizes = SIZES | {"image_size": [24, 48]}
    ViTModel(ViTConfig(**sizes, intermediate_size=64)).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"expected a square image_size, found \[24, 48\]"):
        load_encoder(str(tmp_path / "wide"))
    encoder = load_encoder(str(stretching_tower(tmp_path / "dino"))).eval()
    with pytest.raises(ValueError, match=r"expected 36 patch tokens \(6x6\) and at most 1 others, found"):
        encoder(torch.randn(1, 3, 48, 24))


def stretching_tower(folder: Path) -> Path:
    """A DINOv2 checkpoint, whose positions stretch to any image."""
    Dinov2Model(Dinov2Config(**SIZES)).save_pretrained(folder)
    return folder


def test_preprocessing_is_read_from_the_checkpoint(clip_folder: Path, tmp_path: Path) -> None:
    assert load_encoder(str(clip_folder)).preprocessing == Preprocessing(24)
    CLIPVisionModelWithProjection.from_pretrained(clip_folder).save_pretrained(tmp_path)
    values = {"do_center_crop": True, "crop_size": 24, "size": {"shortest_edge": 24}, "resample": 3}
    values |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    encoder = load_encoder(str(tmp_path))
    assert encoder.preprocessing == Preprocessing(24, mean=(0.1, 0.2, 0.3), std=(1, 1, 2))
    described = encoder.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["preprocessing"]["mean"] == [0.1, 0.2, 0.3] and described["meaningful"] is True


def test_tiny_towers_are_seeded_and_say_that_they_mean_nothing() -> None:
    for side, width in (("eva", 64), ("clip", 48)):
        one, same, other = (tiny_encoder(side, seed=s).eval() for s in (0, 0, 1))
        pixels = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(one(pixels), same(pixels))
            assert not torch.equal(one(pixels), other(pixels))
            assert one(pixels).shape == (2, 256, width)
        assert one.describe()["meaningful"] is False
    with pytest.raises(ValueError, match="side: expected one of"):
        tiny_encoder("text")


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="expected a model folder or a hub id"):
        load_encoder(str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=r"expected config\.json, found none"):
        load_encoder(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        load_encoder(str(tmp_path))
    with pytest.raises(ValueError, match=r"pip install 'blip3o-dit\[timm\]'"):
        load_encoder("timm:eva02_base")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="no such folder, and the hub did not give it"):
        load_encoder("nobody/nothing")
