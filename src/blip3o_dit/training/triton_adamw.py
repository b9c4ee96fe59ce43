"""AdamW of split weights (`split_weights.py`) on a GPU: each number is read once and written once.

A launch for each tensor. The arithmetic is that of torch's fused AdamW in float32, its results differ by the
rounding of single operations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

BLOCK = 2048


@triton.jit
def _nearest_half(bits):
    return (((bits + 32768) >> 16) & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def split_adamw(
    weight_ptr,
    remainder_ptr,
    gradient_ptr,
    mean_ptr,
    square_ptr,
    corrections_ptr,
    gradient_scale_ptr,
    skipped_ptr,
    numel,
    seed,
    rate,
    beta1,
    beta2,
    eps,
    decay,
    HALF_MOMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`corrections`: 1 - beta1^step, 1 - beta2^step, step. bfloat16 numbers are given as int16."""
    if tl.load(skipped_ptr) == 0.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < numel
        bits = tl.load(weight_ptr + place, mask=inside, other=0).to(tl.int32) << 16
        bits += tl.load(remainder_ptr + place, mask=inside, other=0).to(tl.int32)
        weight = bits.to(tl.float32, bitcast=True)
        gradient = tl.load(gradient_ptr + place, mask=inside, other=0.0).to(tl.float32)
        gradient /= tl.load(gradient_scale_ptr)
        mean = tl.load(mean_ptr + place, mask=inside, other=0.0).to(tl.float32)
        square = tl.load(square_ptr + place, mask=inside, other=0.0).to(tl.float32)

        mean += (gradient - mean) * (1.0 - beta1)
        square = square * beta2 + gradient * gradient * (1.0 - beta2)
        root = tl.sqrt(square) / tl.sqrt(tl.load(corrections_ptr + 1))
        weight -= weight * (rate * decay)
        weight -= rate / tl.load(corrections_ptr) * mean / (root + eps)

        if HALF_MOMENTS:  # the second one is rounded at random: its changes are below half a bfloat16 step
            step = tl.load(corrections_ptr + 2).to(tl.int32)
            random = tl.randint(seed + step, place.to(tl.int32)).to(tl.int32, bitcast=True) & 0xFFFF
            square_bits = (square.to(tl.int32, bitcast=True) + random) & -65536
            square = square_bits.to(tl.float32, bitcast=True)
        tl.store(mean_ptr + place, mean.to(mean_ptr.dtype.element_ty), mask=inside)
        tl.store(square_ptr + place, square.to(square_ptr.dtype.element_ty), mask=inside)
        bits = weight.to(tl.int32, bitcast=True)
        tl.store(weight_ptr + place, _nearest_half(bits), mask=inside)
        tl.store(remainder_ptr + place, (bits & 0xFFFF).to(tl.uint16).to(tl.int16, bitcast=True), mask=inside)


def step(
    parameters: Sequence[nn.Parameter],
    remainders: Mapping[nn.Parameter, Tensor],
    states: Mapping[Any, dict[str, Any]],
    group: Mapping[str, Any],
    gradient_scale: Tensor | None,
    skipped: Tensor | None,
) -> None:
    """One step of parameters that have a gradient. `skipped`: a scalar, 1 where nothing is to change."""
    device = parameters[0].device
    skipped = torch.zeros((), device=device) if skipped is None else skipped
    gradient_scale = torch.ones((), device=device) if gradient_scale is None else gradient_scale
    steps = [states[parameter]["step"] for parameter in parameters]
    torch._foreach_add_(steps, 1.0 - skipped)
    beta1, beta2 = group["betas"]
    counts = torch.stack(steps).double()
    corrections = torch.stack([1 - beta1**counts, 1 - beta2**counts, counts], dim=1).float()  # [P, 3]
    for number, parameter in enumerate(parameters):
        state, gradient = states[parameter], parameter.grad
        assert gradient is not None
        numel = parameter.numel()
        split_adamw[(triton.cdiv(numel, BLOCK),)](
            parameter.detach().view(torch.int16),
            remainders[parameter],
            gradient.contiguous(),
            state["exp_avg"],
            state["exp_avg_sq"],
            corrections[number],
            gradient_scale,
            skipped,
            numel,
            number << 20,  # a stream of its own for each tensor
            float(group["lr"]),
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            HALF_MOMENTS=state["exp_avg"].dtype != torch.float32,
            BLOCK=BLOCK,
            num_warps=8,
        )
