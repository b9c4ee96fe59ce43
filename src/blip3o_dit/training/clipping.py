"""Clipping by the global norm, and steps that change nothing: inside fused AdamW's pass over the weights.

Fused AdamW divides every gradient by `grad_scale` as it reads it, and takes no step where `found_inf` is 1;
other optimizers know neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def is_fused(optimizer: Any) -> bool:
    return all(group.get("fused") for group in optimizer.param_groups)


def clip(
    optimizer: Any,
    parameters: Iterable[Tensor],
    norm: Tensor,
    limit: float,
    *,
    inside: bool = True,
    read: bool = False,
) -> None:
    """Shrink gradients whose norm is above the limit: in the optimizer's step, or now.

    Args:
        norm: of all gradients together, a scalar.
        inside: False where something else uses `grad_scale`, as float16's loss scaler does.
        read: whether the norm is there already: a division by 1, which costs a processor a pass, is left out.
    """
    if not inside or not is_fused(optimizer):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        return
    excess = ((norm.float() + 1e-6) / limit).clamp(min=1.0)  # as in clip_grads_with_norm_
    optimizer.grad_scale = excess if not read or excess > 1.0 else None


def skip_unless(sound: Tensor, optimizer: Any) -> None:
    """Have fused AdamW change nothing in this step unless `sound`, a boolean on its device, is true."""
    assert is_fused(optimizer)
    optimizer.found_inf = 1.0 - sound.float()
