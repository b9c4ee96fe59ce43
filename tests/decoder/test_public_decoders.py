"""docs/pixels.md: its ways to the public decoders, on random weights of their real classes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from blip3o_dit.data.store import EmbeddingStore, StoreWriter
from blip3o_dit.extraction.vision_towers import load_encoder

PAGE = (Path(__file__).parents[2] / "docs" / "pixels.md").read_text()


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's functions are."""
    found: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        if "def " in block:
            exec(block, found)
    return found


def test_rae_decodes_what_a_store_holds(page: dict[str, Any], tmp_path: Path) -> None:
    """Tokens that went through a store decode as the autoencoder reconstructs."""
    from diffusers import AutoencoderRAE

    torch.manual_seed(0)
    rae = AutoencoderRAE(
        encoder_hidden_size=64,
        encoder_num_hidden_layers=1,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=64,
        encoder_input_size=56,
        patch_size=4,
        latents_mean=torch.randn(64, 4, 4),
        latents_std=torch.rand(64, 4, 4) + 0.5,
    ).eval()
    pictures = torch.rand(2, 3, 56, 56)
    with torch.no_grad():
        targets = page["tokens_of"](rae, pictures)
        assert targets.shape == (2, 16, 64)
        sizes: dict[str, Any] = dict(num_tokens=16, condition_dim=4, target_dim=64, dtype="float32")
        with StoreWriter(tmp_path / "store", **sizes) as writer:
            writer.append(torch.zeros(2, 16, 4), targets, [{"key": "a"}, {"key": "b"}])
        found = page["pictures_of"](rae, EmbeddingStore(tmp_path / "store").fetch([0, 1])[1])
        expected = rae(pictures).sample
    assert found.shape == (2, 3, 16, 16)
    assert torch.allclose(found, expected.clamp(0, 1), atol=1e-5)
    assert found.std() > 0.01


def test_versatile_diffusion_is_conditioned_on_our_tokens(page: dict[str, Any], tmp_path: Path) -> None:
    """Our tower's patch tokens and CLIP's own class token make what the pipeline makes of the picture."""
    from diffusers import VersatileDiffusionImageVariationPipeline

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    config = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=56, patch_size=14, projection_dim=24)
    model = CLIPVisionModelWithProjection(config).eval()
    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=56)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8))
    pipeline = SimpleNamespace(image_encoder=model, image_feature_extractor=processor)
    encode: Any = VersatileDiffusionImageVariationPipeline._encode_prompt
    tower = load_encoder(str(tmp_path))
    with torch.no_grad():
        expected = encode(pipeline, [picture], torch.device("cpu"), 1, False, None)
        pixels = tower.preprocessing.pixels(picture)[None]
        tokens = tower(tower.preprocessing.normalize(pixels))
        class_token = model(**processor(images=picture, return_tensors="pt")).image_embeds
        found = page["versatile_condition"](class_token, tokens)
    assert found.shape == (1, 17, 24)
    assert torch.allclose(found, expected, atol=1e-4)
