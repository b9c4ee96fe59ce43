"""Towers behind one interface, against direct use of transformers' classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BeitConfig,
    BeitModel,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    ConvNextModel,
    Data2VecVisionConfig,
    Data2VecVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from blip3o_dit.extraction.preprocessing import Preprocessing
from blip3o_dit.extraction.vision_towers import VisionEncoder, load_encoder, tiny_encoder

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


# A small model of every family: class, configuration, tokens before those of the patches
FAMILIES: dict[str, tuple[Any, Any, int]] = {
    "vit": (ViTModel, ViTConfig(**SIZES, intermediate_size=64), 1),
    "deit": (DeiTModel, DeiTConfig(**SIZES, intermediate_size=64), 2),
    "dinov2": (Dinov2Model, Dinov2Config(**SIZES), 1),
    "dinov2 registers": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3),
        4,
    ),
    "dinov3": (
        DINOv3ViTModel,
        DINOv3ViTConfig(**SIZES, intermediate_size=64, num_register_tokens=4),
        5,
    ),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**SIZES, intermediate_size=64), 0),
    "beit": (BeitModel, BeitConfig(**SIZES, intermediate_size=64, use_relative_position_bias=True), 1),
    "data2vec": (Data2VecVisionModel, Data2VecVisionConfig(**SIZES, intermediate_size=64), 1),
}
MERGING = dict(image_size=64, patch_size=4, depths=[1, 1], hidden_sizes=[16, 32], num_stages=2)


def save(model: Any, folder: Path, **settings: Any) -> str:
    """A checkpoint with weights that tell places apart, and a preprocessor_config.json."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) + (parameter.ndim == 1))
    model.eval().save_pretrained(folder)
    size = settings.pop("size", 24)
    values = {"image_processor_type": "ViTImageProcessor", "size": {"height": size, "width": size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(values | settings))
    return str(folder)


def own_token_changes_most(encoder: VisionEncoder) -> bool:
    """Whether changing one cell of a picture changes the token at its place more than any other."""
    size = encoder.preprocessing.size
    cell = size // encoder.grid
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    for row, column in ((0, 1), (1, 0), (encoder.grid - 1, 1)):
        changed = pixels.clone()
        changed[:, :, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] += 1
        with torch.no_grad():
            moved = (encoder(changed) - encoder(pixels)).norm(dim=-1)[0]
        if moved.argmax() != row * encoder.grid + column:
            return False
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_patch_tokens_of_every_family(family: str, tmp_path: Path) -> None:
    kind, config, prefix = FAMILIES[family]
    model = kind(config)
    encoder = load_encoder(save(model, tmp_path)).eval()
    assert (encoder.grid, encoder.width) == (6, 32)
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        output = model(pixel_values=pixels)
        expected = output.last_hidden_state
        found = encoder(pixels)
        grid, vectors = encoder.with_vectors(pixels)
    assert expected.shape[1] == 36 + prefix
    torch.testing.assert_close(found, expected[:, prefix:])
    there = {"class": expected[:, 0] if prefix else None, "pooled": output.pooler_output}
    assert torch.equal(grid, found) and vectors.keys() == {name for name in there if there[name] is not None}
    for name, vector in vectors.items():
        torch.testing.assert_close(vector, there[name])
    assert own_token_changes_most(encoder)


@pytest.mark.parametrize("family", ["swin", "convnext"])
def test_towers_that_merge_patches(family: str, tmp_path: Path) -> None:
    model: Any = (
        SwinModel(SwinConfig(image_size=64, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2]))
        if family == "swin"
        else ConvNextModel(ConvNextConfig(**MERGING))
    )
    encoder = load_encoder(save(model, tmp_path, size=64)).eval()
    assert (encoder.grid, encoder.width) == (8, 32)
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixel_values=pixels).last_hidden_state
        expected = expected.flatten(2).transpose(1, 2) if expected.ndim == 4 else expected
        torch.testing.assert_close(encoder(pixels), expected)
    assert family == "swin" or own_token_changes_most(encoder)  # Swin's attention reaches beyond a cell


def test_a_masked_autoencoder_sees_the_whole_picture(tmp_path: Path) -> None:
    model = ViTMAEModel(ViTMAEConfig(**SIZES, intermediate_size=64))
    encoder = load_encoder(save(model, tmp_path)).eval()
    pixels = torch.randn(2, 3, 24, 24)
    model.config.mask_ratio = 0.0
    with torch.no_grad():
        order = torch.arange(36.0).expand(2, -1)
        expected = model(pixel_values=pixels, noise=order).last_hidden_state
        torch.testing.assert_close(encoder(pixels), expected[:, 1:])


def test_a_classification_checkpoint_needs_no_pooler(tmp_path: Path) -> None:
    model = ViTForImageClassification(ViTConfig(**SIZES, intermediate_size=64))
    encoder = load_encoder(save(model, tmp_path)).eval()
    pixels = torch.randn(1, 3, 24, 24)
    with torch.no_grad():
        torch.testing.assert_close(encoder(pixels), model.vit(pixels).last_hidden_state[:, 1:])
        assert encoder.with_vectors(pixels)[1].keys() == {"class"}  # and keeps none that nobody trained


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "dinov3", "siglip", "beit", "clip"])
def test_another_size_where_the_model_takes_it(family: str, clip_folder: Path, tmp_path: Path) -> None:
    if family == "clip":
        folder = str(clip_folder)
    else:
        kind, config, _ = FAMILIES[family]
        folder = save(kind(config), tmp_path)
    encoder = load_encoder(folder, size=32).eval()
    assert (encoder.preprocessing.size, encoder.grid) == (32, 8)
    assert encoder(torch.randn(1, 3, 32, 32)).shape[:2] == (1, 64)
    with pytest.raises(ValueError, match=r"25 pixels are not a multiple of the patch size 4"):
        load_encoder(folder, size=25)


def test_what_is_not_a_tower_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    sizes = SIZES | {"image_size": [24, 48]}
    wide = save(ViTModel(ViTConfig(**sizes, intermediate_size=64)), tmp_path / "wide")
    with pytest.raises(ValueError, match=r"expected a square image_size, found \[24, 48\]"):
        load_encoder(wide)
    vit = save(ViTModel(ViTConfig(**SIZES, intermediate_size=64)), tmp_path / "vit", size=28)
    with pytest.raises(ValueError, match="takes pictures of 28 pixels, found a 'vit' model that does not"):
        load_encoder(vit)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    bert = save(BertModel(BertConfig(**sizes, vocab_size=10)), tmp_path / "bert")
    with pytest.raises(ValueError, match="expected a vision tower with square patches, found bert"):
        load_encoder(bert)
    naflex = Siglip2VisionModel(Siglip2VisionConfig(**sizes, num_patches=36, patch_size=4))
    with pytest.raises(ValueError, match="expected a vision tower that takes pictures of 24 pixels"):
        load_encoder(save(naflex, tmp_path / "naflex"))
    with pytest.raises(ValueError, match=r"expected one of .*found 'Siglip2ImageProcessor'"):
        load_encoder(save(naflex, tmp_path / "naflex", image_processor_type="Siglip2ImageProcessor"))
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(ValueError, match=r"not a model that transformers loads: .*no such model"):
        load_encoder(vit)


def test_a_layout_that_changes_is_refused(tmp_path: Path) -> None:
    kind, config, _ = FAMILIES["dinov2"]
    encoder = load_encoder(save(kind(config), tmp_path)).eval()
    with pytest.raises(ValueError, match=r"expected 37 tokens of 32, found shape \[1, 73, 32\]"):
        encoder(torch.randn(1, 3, 48, 24))


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
    with pytest.raises(ValueError, match=r"pip install timm$"):
        load_encoder("timm:eva02_base")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match="found nothing there, and the hub did not give it"):
        load_encoder("nobody/nothing")
