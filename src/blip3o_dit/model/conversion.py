"""Weights to and from other layouts: the official BLIP3-o state dict and diffusers' Lumina class.

Here t = 0 is noise, t = 1 is data, and the network predicts dx/dt (about data minus noise). There timestep
1000 is noise, 0 is data, and the network predicts dx/dsigma (noise minus data). So the network embeds
1000 (1 - t), and the sign of the output layer flips on the way.

Nothing is guessed: a missing, unexpected or misshapen tensor is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from blip3o_dit.flow.config import FlowMatchingConfig
from blip3o_dit.model.blip3o_dit import BLIP3oDiTModel
from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.model.loading import compare_shapes, count_and_show
from blip3o_dit.utils.json_files import weight_files_of
from blip3o_dit.utils.validation import damage_refused

OFFICIAL_PREFIXES = ("model.dit.model.", "dit.model.", "model.", "")
CONDITION_PREFIX = "caption_projection."
OUTPUT_LAYER = "norm_out.linear_2."

# What else a released checkpoint holds beside the DiT: language model, vision towers, decoder.
OTHER_GROUPS = (
    "visual.",
    "embed_tokens.",
    "norm.",
    "latent_queries",
    "gen_vision_tower.",
    "vae.",
    "lm_head.",
    "vision_tower.",
    "mm_projector.",
    "down_projector.",
)

# BLIP3-o's path is x_sigma = (1 - sigma) x + sigma eps, its condition dropout 0.1.
_OFFICIAL_FLOW = FlowMatchingConfig(sigma_min=0.0, sigma_max=1.0, condition_dropout=0.1)

# Noise left at t = 1 that changes nothing next to bfloat16 weights; the released model's is 0.
MAX_SIGMA_MIN = 1e-3


def to_official_state_dict(model: BLIP3oDiTModel, prefix: str = OFFICIAL_PREFIXES[0]) -> dict[str, Tensor]:
    """The network in the released layout (noise minus data), under `prefix`; see `_check_exportable`.

    Raises:
        ValueError: for a model that was trained otherwise than the released one.
    """
    _check_exportable("to_official_state_dict", model)
    weights = flip_velocity_sign(model.dit.state_dict())
    return {prefix + name: tensor for name, tensor in weights.items()}


def from_official_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    input_size: int = 8,
    config: BLIP3oDiTConfig | None = None,
) -> BLIP3oDiTModel:
    """A model from a released state dict, which may hold other groups beside the DiT's.

    Args:
        state_dict: names under any of `OFFICIAL_PREFIXES`.
        input_size: side of the token grid (weights do not tell), used when `config` is None.
        config: sizes to expect; None reads them off the tensors.

    Raises:
        ValueError: no DiT found, or tensors missing, unexpected or misshapen.
    """
    names = _dit_names(state_dict)
    weights = flip_velocity_sign({stripped: state_dict[name] for name, stripped in names.items()})
    if config is None:
        config = _config_from_shapes(weights, input_size)
    model = BLIP3oDiTModel(config)
    _load(model.dit, weights)
    return model


def load_official_checkpoint(path: str | Path, *, input_size: int = 8) -> BLIP3oDiTModel:
    """As `from_official_state_dict`, from a .safetensors file or a folder of (sharded) ones."""
    files = _safetensors_files(Path(path))
    where = {name: file for file in files for name in _tensor_names(file)}
    wanted = _dit_names(where)
    weights: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            weights |= {name: tensors.get_tensor(name) for name in wanted if where[name] == file}
    return from_official_state_dict(weights, input_size=input_size)


def diffusers_config(config: BLIP3oDiTConfig) -> dict[str, Any]:
    """Keyword arguments that build `LuminaNextDiT2DModel` with this network's sizes.

    diffusers derives the feed-forward width from a multiplier and rounds up to `multiple_of`; asking for
    next to nothing, rounded up to one multiple of our width, gives exactly our width.
    """
    return {
        "sample_size": config.input_size,
        "patch_size": 1,
        "in_channels": config.in_channels,
        "hidden_size": config.model_dim,
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "multiple_of": config.ffn_dim,
        "ffn_dim_multiplier": 1.0 / config.model_dim,
        "norm_eps": config.norm_eps,
        "learn_sigma": False,
        "qk_norm": True,
        "cross_attention_dim": config.model_dim,
    }


def to_diffusers_state_dict(model: BLIP3oDiTModel) -> dict[str, Tensor]:
    """Weights for a `LuminaNextDiT2DModel` built with `diffusers_config`, to be fed timesteps
    1000 (1 - t) and the output of `model.dit.caption_projection`; it predicts noise minus data, which is
    what `FlowMatchEulerDiscreteScheduler` integrates.

    The class has no condition projection (kept out) and an unused `pad_token` (zeros).

    Raises:
        ValueError: for a model that does not predict the velocity of a linear path from noise.
    """
    _check_exportable("to_diffusers_state_dict", model)
    weights = flip_velocity_sign(model.dit.state_dict())
    weights = {k: v for k, v in weights.items() if not k.startswith(CONDITION_PREFIX)}
    weights["pad_token"] = torch.zeros(model.config.model_dim, dtype=model.dtype)
    return weights


def from_diffusers_state_dict(
    state_dict: Mapping[str, Tensor],
    config: BLIP3oDiTConfig,
    *,
    caption_projection: Mapping[str, Tensor],
) -> BLIP3oDiTModel:
    """Inverse of `to_diffusers_state_dict`; `caption_projection` holds linear_1 and linear_2."""
    weights = {k: v for k, v in state_dict.items() if k != "pad_token"}
    weights.update({CONDITION_PREFIX + k: v for k, v in caption_projection.items()})
    model = BLIP3oDiTModel(config)
    _load(model.dit, flip_velocity_sign(weights))
    return model


def flip_velocity_sign(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same network predicting the velocity of the other convention (its own inverse)."""
    return {name: -x if name.startswith(OUTPUT_LAYER) else x for name, x in state_dict.items()}


def _check_exportable(what: str, model: BLIP3oDiTModel) -> None:
    """Refuse (ValueError) what neither layout can say: both mean BLIP3-o's velocity, in raw units."""
    flow = model.config.flow
    expected: dict[str, Any] = {
        "source": "noise",
        "prediction_type": "v_prediction",
        "schedule_type": "linear",
        "sigma_max": 1.0,
        "student_steps": 0,
    }
    found = {name: getattr(flow, name) for name in expected}
    if flow.sigma_min > MAX_SIGMA_MIN:
        expected["sigma_min"], found["sigma_min"] = f"at most {MAX_SIGMA_MIN}", flow.sigma_min
    if model.has_statistics:
        expected["standardize"], found["standardize"] = False, model.config.standardize
    wrong = [
        f"{name} {found[name]} (expected {expected[name]})"
        for name in expected
        if found[name] != expected[name]
    ]
    if wrong:
        raise ValueError(f"{what}: expected a model of --recipe paper, found {', '.join(wrong)}")


def _dit_names(names: Iterable[str]) -> dict[str, str]:
    """Which of the names are the DiT's -> their names without the prefix they were found under."""
    names = list(names)
    for prefix in OFFICIAL_PREFIXES:
        if prefix + "norm_out.linear_2.weight" in names:
            stripped = {name: name[len(prefix) :] for name in names if name.startswith(prefix)}
            return {k: v for k, v in stripped.items() if not v.startswith(OTHER_GROUPS)}
    raise ValueError(
        "state dict: expected a DiT's tensors (norm_out.linear_2.weight) under one of the prefixes "
        f"{OFFICIAL_PREFIXES}, found {len(names)} tensors, none of that name"
    )


def _config_from_shapes(weights: Mapping[str, Tensor], input_size: int) -> BLIP3oDiTConfig:
    def shape(name: str) -> torch.Size:
        if name not in weights:
            raise ValueError(f"state dict: 1 missing ({name}), needed to read the sizes")
        return weights[name].shape

    model_dim, in_channels = shape("patch_embedder.proj.weight")
    num_heads = shape("layers.0.gate")[0]
    indices = [re.match(r"layers\.(\d+)\.", name) for name in weights]
    return BLIP3oDiTConfig(
        model_dim=model_dim,
        num_layers=1 + max(int(match[1]) for match in indices if match),
        num_heads=num_heads,
        num_kv_heads=shape("layers.0.attn1.to_k.weight")[0] // (model_dim // num_heads),
        ffn_dim=shape("layers.0.feed_forward.linear_1.weight")[0],
        in_channels=in_channels,
        eva_embedding_size=shape("caption_projection.linear_1.weight")[1],
        input_size=input_size,
        flow_matching=vars(_OFFICIAL_FLOW),
    )


def _load(network: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Strict: every tensor present once, with its shape; the message hints at the known trap."""
    expected = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: list(tensor.shape) for name, tensor in weights.items()}
    problems = compare_shapes(expected, found)
    misshapen = [
        f"{name} expected {expected[name]}, found {found[name]}" for name in problems.pop("mismatched")
    ]
    problems["misshapen"] = misshapen
    said = [count_and_show(kind, names, "; ") for kind, names in problems.items() if names]
    if any("feed_forward" in text for text in misshapen):
        said.append(
            "the feed-forward width differs: released weights have 4864 for model_dim 1792, while "
            "diffusers >= 0.33 builds 7168 from the same file; set ffn_dim"
        )
    if said:
        raise ValueError("state dict: " + ", ".join(said))
    network.load_state_dict(dict(weights))


def _safetensors_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return weight_files_of(index)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path}: expected a .safetensors file or a folder of them, found none")
    return files


def _tensor_names(file: Path) -> list[str]:
    with damage_refused(file), safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())
