"""The dtype rule: what is float32 always, and what the network computes in.

* float32 always: times, rotary tables, data statistics, the source R(c) + s eps, x_t, the solver's state, the
  prediction that leaves the network, the loss. Averaged weights and the optimizer's master weights too.
* the compute dtype: everything between the network's first and last layer, residual stream and norms
  included. Norms, softmax and rotation accumulate in float32 inside, and round their result.

Tensors cross in `NextDiT` and nowhere else: on the way in `forward`, `encode_condition` and `predict` cast
what the first layers multiply, on the way out they return float32. Inside, autocast is off and every layer
follows its input's dtype, so training and inference, CPU and GPU, autocast, bfloat16 weights and FSDP's mixed
precision run the same operations in the same dtypes.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

BFLOAT16_VARIABLE = "BLIP3O_DIT_BFLOAT16"
"""Environment variable that declares bfloat16 "native" or "emulated" on a CPU, whatever the processor has."""

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
    return weight.dtype if multiplies(weight.dtype, weight.device) else torch.float32


def without_autocast(device: torch.device) -> torch.autocast:
    """A context in which operations follow the dtypes of their inputs."""
    return torch.autocast(device.type, enabled=False)


def multiplies(dtype: torch.dtype, device: torch.device) -> bool:
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
