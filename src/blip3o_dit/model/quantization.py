"""Weights of one byte each, for generating: half of bfloat16's memory, a quarter of float32's.

Only the matrices in the blocks are quantised, 99 % of the default network: a weight w_ij becomes s_i q_ij
with a scale s_i for each output channel, and the product is s_i sum_j q_ij x_j. Activations, biases, norms,
embedders and the last layer stay as they are. q is an integer of 8 bits, or a float8 (e4m3, arXiv
2209.05433). Both are widened to the dtype of x without rounding, in `cpu_kernels.py` and `gpu_kernels.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blip3o_dit.model.layers import Linear
from blip3o_dit.utils.validation import check_name

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
LARGEST = {"int8": 127.0, "fp8": torch.finfo(torch.float8_e4m3fn).max}
FP8_CAPABILITY = (8, 9)  # of a GPU, from which on it converts float8 itself


def check_quantize(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError, of one line, for what cannot be quantised so."""
    check_name("quantize", kind, tuple(DTYPES))
    if dtype == torch.float16:  # sums of numbers up to 127 or 448 leave its range
        raise ValueError(f"quantize: expected dtype bfloat16 or float32 with {kind}, found float16")
    if kind == "fp8" and device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < FP8_CAPABILITY:
            raise ValueError(
                "quantize: expected int8 on this GPU, found fp8, which needs compute capability "
                f"{'.'.join(map(str, FP8_CAPABILITY))}: it has {'.'.join(map(str, found))}"
            )


def quantize_weight(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """[n, k] -> its numbers q [n, k], of one byte each, and the scales of its rows [n], float32."""
    weight = weight.float()
    scale = (weight.abs().amax(dim=1) / LARGEST[kind]).clamp(min=torch.finfo(torch.float32).tiny)
    scaled = weight / scale[:, None]
    return (scaled.round() if kind == "int8" else scaled).to(DTYPES[kind]), scale


def quantize_blocks(model: nn.Module, kind: str) -> list[str]:
    """Quantise the blocks of a `BLIP3oDiTModel` in place, also of one without memory (on the meta device).

    Returns the names of the weights.
    """
    names = []
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name.startswith("dit.layers."):
            weight, module.scale = quantize_weight(module.weight.detach(), kind)
            module.weight = nn.Parameter(weight, requires_grad=False)
            names.append(f"{name}.weight")
    return names


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, Linear) and module.scale is not None for module in model.modules())


def weight_bytes(model: nn.Module) -> int:
    """Memory of all that a model holds."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
