"""Checks of what callers give a model: ValueError with the expected and the found shape, type or value."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_dit.model.config import BLIP3oDiTConfig
from blip3o_dit.utils.json_files import short_repr


def conditions_of_data(config: BLIP3oDiTConfig, embeddings: Any) -> Tensor:
    """Conditions in the units of the data, a tensor or array, as floats [B, L, C_eva] on their device.

    Raises:
        ValueError: for other shapes, another number of tokens than the model has, NaN and infinity.
    """
    eva = _as_floats(embeddings)
    tokens, width = config.num_tokens, config.eva_embedding_size
    if eva.ndim != 3 or eva.shape[1:] != (tokens, width):
        raise ValueError(
            f"condition: expected shape [batch, {tokens}, {width}], found {list(eva.shape)}"
            + _what_to_do(eva, tokens, width)
        )
    if not math.isfinite(eva.sum(dtype=torch.float32)):  # one pass; finite numbers may sum to infinity too
        _check_finite(eva)
    return eva


def _check_finite(eva: Tensor) -> None:
    bad = torch.nonzero(~torch.isfinite(eva).flatten(1).all(dim=1)).flatten().tolist()
    if bad:
        raise ValueError(
            f"condition: expected finite numbers, found NaN or infinity in {len(bad)} of {len(eva)} samples, "
            f"first in sample {bad[0]}"
        )


def check_forward(
    config: BLIP3oDiTConfig,
    device: torch.device,
    hidden_states: Tensor,
    timestep: Tensor,
    condition: Tensor,
    source_mean: Tensor | None,
) -> None:
    """Refuse (ValueError) what `BLIP3oDiTModel.forward` cannot take; its docstring has the shapes."""
    given = {"hidden_states": hidden_states, "timestep": timestep, "condition": condition}
    for name, tensor in (given if source_mean is None else given | {"source_mean": source_mean}).items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"{name}: expected a tensor of floats, found {found}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected the device of the model, {device}, found {tensor.device}")
    batch = len(hidden_states) if hidden_states.ndim else 0
    expected = [batch, config.num_tokens, config.in_channels]
    _check_shape("hidden_states", hidden_states, expected)
    _check_shape("timestep", timestep, [batch])
    if timestep.dtype not in (torch.float32, torch.float64):  # bfloat16 keeps half of 1000 levels apart
        raise ValueError(f"timestep: expected float32, found {timestep.dtype}")
    width = config.eva_embedding_size
    if condition.ndim != 3 or condition.shape[-1] != width or not condition.shape[1]:
        raise ValueError(f"condition: expected shape [batch, tokens, {width}], found {list(condition.shape)}")
    if condition.shape[0] != batch:
        raise ValueError(f"condition: expected a batch of {batch}, found {condition.shape[0]}")
    if source_mean is not None:
        _check_shape("source_mean", source_mean, expected)
    elif config.flow.source != "noise" and condition.shape[1] != config.num_tokens:
        raise ValueError(
            f"condition: expected {config.num_tokens} tokens, from which the source is computed, found "
            f"{condition.shape[1]}"
        )


def _check_shape(name: str, tensor: Tensor, expected: list[int]) -> None:
    if list(tensor.shape) != expected:
        raise ValueError(f"{name}: expected shape {expected}, found {list(tensor.shape)}")


def _as_floats(embeddings: Any) -> Tensor:
    """Numbers of any real type as a tensor of floats; of an array, on the same memory where that can be."""
    if isinstance(embeddings, np.ndarray) and embeddings.dtype.kind in "fiu":
        array = np.ascontiguousarray(embeddings, dtype=np.float32)
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    try:
        tensor = torch.as_tensor(embeddings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"condition: expected a tensor or array, found {short_repr(embeddings)}") from error
    if tensor.is_complex() or tensor.dtype == torch.bool or tensor.layout != torch.strided:
        raise ValueError(
            f"condition: expected a dense tensor of floats, found {tensor.dtype}, {tensor.layout}"
        )
    narrow = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return tensor if narrow else tensor.float()


def _what_to_do(eva: Tensor, tokens: int, width: int) -> str:
    if eva.ndim == 2 and eva.shape == (tokens, width):
        return ": one sample is a batch of one, x[None]"
    if eva.ndim == 3 and eva.shape[1] == tokens + 1 and eva.shape[2] == width:
        return ": leave out the class token, x[:, 1:]"
    return ""
