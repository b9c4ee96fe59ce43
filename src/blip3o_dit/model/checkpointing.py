"""Activation checkpointing of a block: which of its results are kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# What selective checkpointing keeps: everything else of a block costs next to nothing to compute again.
SAVED_OPS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


def checkpoint_block(block: Callable[..., Tensor], *inputs: Any, selective: bool) -> Tensor:
    """The block's output; only its inputs are kept, or with `selective` also the results of SAVED_OPS."""
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # no randomness inside
    if selective:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, SAVED_OPS)
    return checkpoint(block, *inputs, **settings)
