"""Layers that follow the dtype rule, time features, rotation, checkpointing: nothing here knows the network.

The dtype rule:

* float32 always: times, rotary tables, data statistics, the source R(c) + s eps, x_t and the solver's state;
  the network's residual stream, its last layer and its output; the loss. So are averaged weights.
* the compute dtype: what the blocks compute between reading the residual stream and adding to it, the
  projected condition and the modulations. Norms, softmax and rotation accumulate in float32 inside.

Tensors cross in `NextDiT` and nowhere else: it takes and returns float32, and casts what its first layers
multiply. Inside, autocast is off and every layer follows its input's dtype, so training and inference, CPU
and GPU, autocast, bfloat16 weights and FSDP's mixed precision run the same operations in the same dtypes.

The residual stream is float32 because rounding it after each of 48 additions, and rounding the output, about
double the error of a bfloat16 sample, which guidance multiplies: 2.8 instead of 1.4 % in the worst case of
tests/test_precision.py. It costs some 5 % of a block's activations, and a seventh of what a GPU moves between
products in generation: a model can be configured to have it in bfloat16 (`residual`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

TIME_FREQUENCIES = 256

# Environment variable that declares bfloat16 "native" or "emulated" on a CPU, whatever the processor has.
BFLOAT16_VARIABLE = "BLIP3O_DIT_BFLOAT16"

# Names of x86 and of ARM processors' features.
_CPU_FEATURES = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "fp16_arith"),
}

# What selective checkpointing keeps: everything else of a block costs next to nothing to compute again.
SAVED_OPS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What a network with such weights computes in, where this is called.

    Inside autocast its dtype; else the weights', or float32 where theirs would be emulated. Of weights that
    are sharded with mixed precision (FSDP), the gathered ones count: call it in the forward pass.
    """
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype if has_native_matmul(weight.dtype, weight.device) else torch.float32


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which operations follow the dtypes of their inputs."""
    if torch.compiler.is_exporting():  # in float32; ONNX has no word for such a context
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def has_native_matmul(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the processor multiplies numbers of this type itself; otherwise torch emulates it, slowly.

    Raises:
        ValueError: for another value of `BLIP3O_DIT_BFLOAT16` than native and emulated.
    """
    if dtype in (torch.float32, torch.float64):
        return True
    if device.type == "cuda":
        with torch.cuda.device(device):
            return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if dtype == torch.bfloat16 and (declared := os.environ.get(BFLOAT16_VARIABLE)):
        if declared not in ("native", "emulated"):
            raise ValueError(f"{BFLOAT16_VARIABLE}: expected native or emulated, found {declared!r}")
        return declared == "native"
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _CPU_FEATURES.get(dtype, ()))


class Linear(nn.Linear):
    """`nn.Linear` that computes in its input's dtype, whatever its weights are stored in.

    A quantised weight (`quantization.py`) has a `scale` [out_features] in float32, one for each of its rows.
    """

    scale: Tensor | None

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.weight.to(x.dtype)
        if self.scale is None:
            return F.linear(x, weight, bias)
        out = (F.linear(x, weight) * self.scale).to(x.dtype)
        return out if bias is None else out + bias


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose weight and bias follow the input's dtype: torch's fused kernel takes one dtype only."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """RMSNorm, times its weight, times a modulation if there is one.

    Weight and modulation are multiplied first: they are small, x is not.
    """

    eps: float

    def forward(self, x: Tensor, modulation: Tensor | None = None) -> Tensor:
        """x [B, N, d], modulation [B, 1, d] -> [B, N, d] in the modulation's dtype, or x's without one."""
        dtype = x.dtype if modulation is None else modulation.dtype
        factor = self.weight.to(dtype)
        factor = (factor if modulation is None else factor * modulation).to(x.dtype)
        return self.normalize(x, factor).to(dtype)

    def normalize(self, x: Tensor, factor: Tensor) -> Tensor:
        """x [B, N, d] / rms(x), times a factor [d] or [B, 1, d] in x's dtype."""
        return F.rms_norm(x, self.normalized_shape, None, self.eps) * factor


def official_timestep(t: Tensor) -> Tensor:
    """t [B] in [0, 1] -> BLIP3-o's time, which its weights embed: 1000 is noise, 0 data (`conversion.py`)."""
    return 1000.0 * (1.0 - t)


def sinusoidal_features(timestep: Tensor) -> Tensor:
    """[...] -> [..., 256]: cosines, then sines, of periods from 2 pi to 2 pi 10000; float32."""
    half = TIME_FREQUENCIES // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    angles = timestep[..., None] * torch.exp(-math.log(10000.0) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotary_tables(
    grid: int, head_dim: int, theta: float, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [grid * grid, head_dim / 2], row-major positions, float32.

    Each axis has head_dim / 4 frequencies theta^(-4 k / head_dim); on the last axis height and width take
    turns (h0, w0, h1, w1, ...), as in Lumina-Next. Computed when needed: `from_pretrained` would leave a
    non-persistent buffer uninitialised, and the table is small.
    """
    exponent = torch.arange(0, head_dim, 4, dtype=torch.float32, device=device) / head_dim
    position = torch.arange(grid, dtype=torch.float32, device=device)
    angles = torch.outer(position, theta**-exponent)  # [grid, h / 4]
    height = angles[:, None].expand(grid, grid, -1)
    width = angles[None, :].expand(grid, grid, -1)
    table = torch.stack([height, width], dim=-1).reshape(grid * grid, head_dim // 2)
    return table.cos(), table.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each adjacent pair of channels of [B, H, N, h] by its position's angle, in float32."""
    cos, sin = rope
    assert cos.dtype == sin.dtype == torch.float32
    if not torch.compiler.is_compiling():  # one complex product is one pass over memory
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [B, H, N, h / 2]
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, H, N, h / 2] twice
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def checkpoint_block(block: Callable[..., Tensor], *inputs: Any, selective: bool) -> Tensor:
    """The block's output; only its inputs are kept, or with `selective` also the results of SAVED_OPS."""
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # no randomness inside
    if selective:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, SAVED_OPS)
    return checkpoint(block, *inputs, **settings)
