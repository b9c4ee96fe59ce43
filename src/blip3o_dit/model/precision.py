"""The dtype rule: what is float32 always, and what follows the compute dtype.

* float32 always: times, rotary tables, data statistics, the source R(c) + s eps, x_t and the solver's state;
  the network's residual stream, its last layer and its output; the loss. So are averaged weights.
* the compute dtype: what the blocks compute between reading the residual stream and adding to it, the
  projected condition and the modulations. Norms, softmax and rotation accumulate in float32 inside.

Tensors cross in `NextDiT` and nowhere else: it takes and returns float32, and casts what its first layers
multiply. Inside, autocast is off and every layer follows its input's dtype, so training and inference, CPU
and GPU, autocast, bfloat16 weights and FSDP's mixed precision run the same operations in the same dtypes.

The residual stream is float32 because rounding it after each of 48 additions, and rounding the output, about
double the error of a bfloat16 sample, which guidance multiplies: 2.8 instead of 1.4 % in the worst case of
tests/test_precision.py. It costs some 5 % of a block's activations.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

# Environment variable that declares bfloat16 "native" or "emulated" on a CPU, whatever the processor has.
BFLOAT16_VARIABLE = "BLIP3O_DIT_BFLOAT16"

# Names of x86 and of ARM processors' features.
_CPU_FEATURES = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "fp16_arith"),
}


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What a network with such weights computes in, where this is called.

    Inside autocast its dtype; else the weights', or float32 where theirs would be emulated. Of weights that
    are sharded with mixed precision (FSDP), the gathered ones count: call it in the forward pass.
    """
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype if has_native_matmul(weight.dtype, weight.device) else torch.float32


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which operations follow the dtypes of their inputs."""
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
