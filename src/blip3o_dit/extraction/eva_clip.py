"""EVA-CLIP-8B's and 18B's vision tower (arXiv 2402.04252), read without remote code.

A pre-norm vision transformer: RMSNorm, learned positions, GELU MLP, no biases on q, k and v, no rotary
embedding. Parameter names are those of the published Hugging Face checkpoints; the text tower beside it is
left alone. In the shape comments B is the batch, T = patches + 1, d the hidden width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_dit.utils.validation import check_name, check_size

TEXT_TOWER = ("text_model.", "text_projection.", "logit_scale", "text.")
_UNSUPPORTED = ("use_rope", "use_swiglu_mlp", "use_sub_ln", "q_bias", "k_bias", "v_bias")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "quick_gelu": _quick_gelu}


@dataclass(frozen=True, kw_only=True)
class EvaClipConfig:
    """Sizes of the tower; the defaults are EVA-CLIP-8B's.

    `post_layernorm` puts the norms after attention and MLP, inside the residual branch, as in the 18B.
    """

    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    intermediate_size: int = 20480
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int = 1280
    layer_norm_eps: float = 1e-6
    post_layernorm: bool = False
    hidden_act: str = "gelu"

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size

    @classmethod
    def from_dict(cls, where: str, config: Mapping[str, Any]) -> EvaClipConfig:
        """From the content of a published config.json.

        Raises:
            ValueError: for a variant that this module does not implement, naming the field.
        """
        vision = config.get("vision_config")
        if not isinstance(vision, dict):
            raise ValueError(f"{where}: expected a vision_config, found none")
        for name in _UNSUPPORTED:
            if vision.get(name):
                raise ValueError(f"{where}: vision_config.{name}: expected false, found {vision[name]!r}")
        if vision.get("use_rms_norm", True) is not True:
            raise ValueError(f"{where}: vision_config.use_rms_norm: expected true, found false")
        if vision.get("hidden_act") is not None:
            check_name(f"{where}: vision_config.hidden_act", vision["hidden_act"], tuple(ACTIVATIONS))
        values = {f.name: vision[f.name] for f in fields(cls) if vision.get(f.name) is not None}
        if "projection_dim" in config:
            values["projection_dim"] = config["projection_dim"]
        for name in values:
            if type(getattr(cls, name)) is int:
                check_size(f"{where}: {name}", values[name])
        return cls(**values)


class EvaClipVision(nn.Module):
    """Pixels [B, 3, S, S] -> projected patch tokens [B, grid * grid, projection_dim]."""

    def __init__(self, config: EvaClipConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTransformer(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.vision_model(pixels)  # [B, T, d]
        return self.visual_projection(tokens[:, 1:])  # [B, T - 1, projection_dim]


class VisionTransformer(nn.Module):
    def __init__(self, config: EvaClipConfig) -> None:
        super().__init__()
        self.embeddings = PatchEmbeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embeddings(pixels)  # [B, T, d]
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class Encoder(nn.Module):
    def __init__(self, config: EvaClipConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))


class PatchEmbeddings(nn.Module):
    """Patches by a strided convolution, the class token before them, a learned position for each."""

    def __init__(self, config: EvaClipConfig) -> None:
        super().__init__()
        d, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(d) * 0.02)
        self.patch_embedding = nn.Conv2d(3, d, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(config.grid**2 + 1, d)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [B, T - 1, d]
        cls_token = self.class_embedding.expand(len(pixels), 1, -1)  # [B, 1, d]
        return torch.cat([cls_token, patches], dim=1) + self.position_embedding.weight


class EncoderLayer(nn.Module):
    def __init__(self, config: EvaClipConfig) -> None:
        super().__init__()
        self.post_layernorm = config.post_layernorm
        self.self_attn = SelfAttention(config)
        self.layer_norm1 = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.RMSNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        if self.post_layernorm:
            x = x + self.layer_norm1(self.self_attn(x))
            return x + self.layer_norm2(self.mlp(x))
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nn.Module):
    def __init__(self, config: EvaClipConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.out_proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (  # [B, H, T, d / H] each
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # [B, T, d]


class MLP(nn.Module):
    def __init__(self, config: EvaClipConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


def assign_weights(
    module: nn.Module, tensors: Iterable[tuple[str, Tensor]], *, where: str, dtype: torch.dtype
) -> None:
    """Give a module built on the meta device its weights, each converted as it is read; strict."""
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, tensor in tensors:
        if name.startswith(TEXT_TOWER) or name.endswith("position_ids"):
            continue
        if name not in expected:
            problems.append(f"unexpected {name}")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} expected {list(expected[name])}, found {list(tensor.shape)}")
        else:
            found[name] = tensor.to(dtype)
    problems += [f"missing {name}" for name in expected if name not in found]
    if problems:
        shown = "; ".join(problems[:3]) + ("; ..." if len(problems) > 3 else "")
        raise ValueError(f"{where}: {len(problems)} tensors do not fit the configuration: {shown}")
    module.load_state_dict(found, assign=True)
