"""The EVA-CLIP tower against an independent functional form, and its loading."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from blip3o_dit.extraction.eva_clip import (
    TEXT_TOWER,
    EvaClipConfig,
    EvaClipVision,
    assign_weights,
)
from blip3o_dit.extraction.vision_towers import load_encoder

SMALL: dict[str, Any] = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=160,
    image_size=16,
    patch_size=4,
    projection_dim=20,
)


def reference_weights(seed: int = 0) -> dict[str, Tensor]:
    """Random weights in the layout of the authors' own code."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return 0.2 * torch.randn(*shape, generator=generator)

    weights = {
        "visual.cls_token": normal(1, 1, 32),
        "visual.pos_embed": normal(1, 17, 32),
        "visual.patch_embed.proj.weight": normal(32, 3, 4, 4),
        "visual.patch_embed.proj.bias": normal(32),
        "visual.norm.weight": 1 + normal(32),
        "visual.head.weight": normal(20, 32),
    }
    for i in range(2):
        block = f"visual.blocks.{i}."
        weights |= {
            block + "norm1.weight": 1 + normal(32),
            block + "norm2.weight": 1 + normal(32),
            block + "attn.qkv.weight": normal(96, 32),
            block + "attn.proj.weight": normal(32, 32),
            block + "attn.proj.bias": normal(32),
            block + "mlp.fc1.weight": normal(160, 32),
            block + "mlp.fc1.bias": normal(160),
            block + "mlp.fc2.weight": normal(32, 160),
            block + "mlp.fc2.bias": normal(32),
        }
    return weights


def from_reference_state_dict(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of baaivision/EVA's own layout (`visual.blocks...`) -> those of this module."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("visual.")
        if name.startswith(TEXT_TOWER):
            continue
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.weight", name):
            for part, weight in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"vision_model.encoder.layers.{match[1]}.self_attn.{part}_proj.weight"] = weight
            continue
        for pattern, replacement in _REFERENCE_NAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith("class_embedding"):
            tensor = tensor.flatten()
        elif name.endswith("position_embedding.weight"):
            tensor = tensor.squeeze(0)
        renamed[name] = tensor
    return renamed


_REFERENCE_NAMES = (
    (r"^cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^pos_embed$", "vision_model.embeddings.position_embedding.weight"),
    (r"^patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.out_proj."),
    (r"^blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
    (r"^norm\.", "vision_model.post_layernorm."),
    (r"^head\.", "visual_projection."),
)


def functional_tokens(weights: dict[str, Tensor], pixels: Tensor, *, post_norm: bool) -> Tensor:
    """The tower from its equations, in float64 and without modules."""
    w = {name.removeprefix("visual."): tensor.double() for name, tensor in weights.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * w[name]

    def attention(x: Tensor, block: str) -> Tensor:
        heads = []
        for head in (0, 1):
            rows = [slice(part * 32 + head * 16, part * 32 + head * 16 + 16) for part in range(3)]
            q, k, v = (x @ w[block + "attn.qkv.weight"][r].T for r in rows)
            heads.append((q @ k.transpose(1, 2) / 4).softmax(dim=-1) @ v)
        return torch.cat(heads, dim=-1) @ w[block + "attn.proj.weight"].T + w[block + "attn.proj.bias"]

    def mlp(x: Tensor, block: str) -> Tensor:
        inner = F.gelu(x @ w[block + "mlp.fc1.weight"].T + w[block + "mlp.fc1.bias"])
        return inner @ w[block + "mlp.fc2.weight"].T + w[block + "mlp.fc2.bias"]

    patches = (
        pixels.double().unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    )
    x = patches @ w["patch_embed.proj.weight"].flatten(1).T + w["patch_embed.proj.bias"]
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], dim=1) + w["pos_embed"]
    for i in range(2):
        block = f"blocks.{i}."
        for step, name in ((attention, "norm1.weight"), (mlp, "norm2.weight")):
            if post_norm:
                x = x + norm(step(x, block), block + name)
            else:
                x = x + step(norm(x, block + name), block)
    return (norm(x, "norm.weight") @ w["head.weight"].T)[:, 1:]


def published(tower: EvaClipVision) -> dict[str, Tensor]:
    """A whole published state dict: the vision tower, and a text tower to be left alone."""
    text = {
        "text_model.x.weight": torch.zeros(2),
        "logit_scale": torch.zeros(()),
        "text_projection.weight": torch.zeros(3),
    }
    return {**tower.state_dict(), **text}


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], kind: str, shards: int = 2) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    vision = {name: value for name, value in SMALL.items() if name != "projection_dim"}
    config: dict[str, Any] = {"architectures": ["EvaCLIPModel"], "model_type": "clip", "projection_dim": 20}
    (folder / "config.json").write_text(
        json.dumps({**config, "vision_config": {**vision, "use_rms_norm": True}})
    )
    names, stem = sorted(tensors), "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    weight_map = {}
    for shard in range(shards):
        file = f"part-{shard}.{kind}"
        part = {name: tensors[name].clone().contiguous() for name in names[shard::shards]}
        save_file(part, folder / file) if kind == "safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def tower() -> EvaClipVision:
    with torch.device("meta"):
        tower = EvaClipVision(EvaClipConfig(**SMALL))
    weights = from_reference_state_dict(reference_weights()).items()
    assign_weights(tower, weights, where="test", dtype=torch.float32)
    return tower.eval()


@pytest.mark.parametrize("post_norm", [False, True])
def test_tokens_equal_the_functional_form(post_norm: bool) -> None:
    with torch.device("meta"):
        tower = EvaClipVision(EvaClipConfig(**SMALL, post_layernorm=post_norm))
    weights = reference_weights()
    assign_weights(tower, from_reference_state_dict(weights).items(), where="test", dtype=torch.float32)
    pixels = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        found = tower(pixels)
    expected = functional_tokens(weights, pixels, post_norm=post_norm)
    assert found.shape == (3, 16, 20)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_8b_tower_has_the_parameters_of_its_sizes() -> None:
    with torch.device("meta"):
        tower = EvaClipVision(EvaClipConfig())
    d = 4096
    layer = 4 * d * d + d + 10 * d * d + 6 * d + 2 * d
    outside = 3 * 14**2 * d + d + d + 257 * d + d + 1280 * d
    assert sum(p.numel() for p in tower.parameters()) == 32 * layer + outside == 7_526_088_704


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sharded_checkpoint_loads(
    tower: EvaClipVision, tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    folder = write_checkpoint(tmp_path / "eva", published(tower), kind)
    encoder = load_encoder(str(folder), dtype=dtype)
    assert {p.dtype for p in encoder.parameters()} == {dtype}
    assert (encoder.grid, encoder.width) == (4, 20)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found, expected = encoder(pixels.to(dtype)).float(), tower(pixels)
    tolerance = 1e-6 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_weights_that_do_not_fit_are_refused(tower: EvaClipVision, tmp_path: Path) -> None:
    whole, gone = published(tower), "vision_model.post_layernorm.weight"
    broken = {
        "missing vision_model.post_layernorm.weight": {k: v for k, v in whole.items() if k != gone},
        "unexpected vision_model.extra": whole | {"vision_model.extra": torch.zeros(1)},
        r"post_layernorm.weight expected \[32\], found \[31\]": whole | {gone: torch.zeros(31)},
    }
    for number, (message, tensors) in enumerate(broken.items()):
        folder = write_checkpoint(tmp_path / str(number), tensors, "safetensors")
        with pytest.raises(ValueError, match=message):
            load_encoder(str(folder))


@pytest.mark.parametrize("name", ["use_rope", "use_swiglu_mlp", "use_sub_ln", "q_bias"])
def test_variants_that_are_not_implemented_are_named(tower: EvaClipVision, tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, published(tower), "safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"][name] = True
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"vision_config\.{name}: expected false, found True"):
        load_encoder(str(folder))


def with_vision_config(folder: Path, **values: Any) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_the_activation_is_the_checkpoints(tower: EvaClipVision, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, published(tower), "safetensors")
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(load_encoder(with_vision_config(folder, hidden_act="gelu"))(pixels), tower(pixels))
        quick = load_encoder(with_vision_config(folder, hidden_act="quick_gelu"))(pixels)
        for layer in tower.vision_model.encoder.layers:
            layer.mlp.activation = lambda x: x * torch.sigmoid(1.702 * x)
        torch.testing.assert_close(quick, tower(pixels))
    with pytest.raises(ValueError, match=r"hidden_act: expected one of .*found 'relu'"):
        load_encoder(with_vision_config(folder, hidden_act="relu"))


@pytest.mark.parametrize("value", [0, -4, "16", 2.5, True, [16]])
def test_sizes_are_sizes(value: Any, tower: EvaClipVision, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, published(tower), "safetensors")
    with pytest.raises(ValueError, match="patch_size: expected a positive integer, found"):
        load_encoder(with_vision_config(folder, patch_size=value))


def test_its_positions_are_for_one_size(tower: EvaClipVision, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, published(tower), "safetensors")
    with pytest.raises(ValueError, match=r"expected pictures of 16 pixels a side.*found 32"):
        load_encoder(str(folder), size=32)


def test_a_bin_file_that_is_a_program_is_refused(tower: EvaClipVision, tmp_path: Path) -> None:
    class Program:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    folder = write_checkpoint(tmp_path / "eva", published(tower), "bin", shards=1)
    with open(folder / "part-0.bin", "wb") as file:
        pickle.dump({"weights": Program()}, file)
    with pytest.raises(ValueError, match=r"part-0\.bin: "):
        load_encoder(str(folder))
    assert not (tmp_path / "ran").exists()
