"""The blocks' arithmetic between their products as Triton kernels, for inference on a GPU in 16-bit numbers.

There every pass over the activations takes time that products could have used. Between a layer's products are
four kernels: one adds a branch to the residual stream and norms the sum for the next product; one takes the
statistics of queries and keys; one norms, rotates and attends, to tokens and condition at once; one gates the
feed-forward's halves. Inside they compute in float32: results differ from `transformer.py`'s by
rounding.

A network that something else was done to (hooks, adapters, sharded weights, torch.compile), or whose samples
have more than 256 tokens, is computed layer by layer as everywhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from blip3o_dit.model import triton_kernels as kernels
from blip3o_dit.model.cpu_kernels import (
    FeedForward,
    NextDiTBlock,
    can_be_joined,
    is_hooked,
    joint_product,
)
from blip3o_dit.model.encoded_condition import KeysValues, Modulations

MAX_TOKENS = 256  # whose scores [64, 256] a program holds
QUERIES = 64  # that a program attends for


def can_run(blocks: Sequence[Any], x: Tensor, keys_values: Sequence[KeysValues], dtype: torch.dtype) -> bool:
    """Whether `run_blocks` serves these blocks and inputs."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if max(x.shape[1], keys_values[0].keys.shape[2]) > MAX_TOKENS:
        return False
    return all(is_plain(block) for block in blocks)


def is_plain(block: Any) -> bool:
    """A block that computes what the kernels compute for it."""
    if type(block) is not NextDiTBlock or type(block.feed_forward) is not FeedForward:
        return False
    if block._compiled_call_impl is not None:
        return False
    products: list[Any] = [*block.joint_layers()[0], *block.feed_forward.joint_layers()[0]]
    products += [block.attn2.to_out[0], block.feed_forward.linear_2]
    inner = (block, block.attn1, block.attn2, block.feed_forward, block.norm1, block.norm1.norm, block.norm2)
    norms = (block.ffn_norm1, block.ffn_norm2, block.attn1.norm_q, block.attn1.norm_k, block.attn2.norm_q)
    return can_be_joined(products) and not any(is_hooked(module) for module in (*inner, *norms))


def run_blocks(
    blocks: Sequence[Any],
    x: Tensor,
    keys_values: Sequence[KeysValues],
    modulations: Modulations,
    rope: tuple[Tensor, Tensor],
) -> Tensor:
    """The residual stream [B, N, d] through all blocks."""
    x = x.contiguous()
    parts = [joint.chunk(4, dim=-1) for joint in modulations.blocks]  # [B, d] each
    dtype = parts[0][0].dtype
    for i, (block, own, (scale_msa, gate_msa, scale_mlp, gate_mlp)) in enumerate(
        zip(blocks, keys_values, parts, strict=True)
    ):
        if i == 0:
            _, h = add_and_norm(x, norm=(block.norm1.norm, scale_msa), dtype=dtype)
        mixed = attend(block, h, own, rope)  # [B, N, d]
        branch = block.attn2.to_out[0](mixed)
        x, h = add_and_norm(
            x, branch, (block.norm2, gate_msa), norm=(block.ffn_norm1, scale_mlp), dtype=dtype
        )
        branch = block.feed_forward.linear_2(swiglu(block.feed_forward, h))
        following = (blocks[i + 1].norm1.norm, parts[i + 1][0]) if i + 1 < len(blocks) else None
        x, h = add_and_norm(x, branch, (block.ffn_norm2, gate_mlp), norm=following, dtype=dtype)
    return x


def add_and_norm(
    x: Tensor,
    branch: Tensor | None = None,
    gate: tuple[Any, Tensor] | None = None,
    *,
    norm: tuple[Any, Tensor] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x + rms(branch) weight tanh(gate), and its RMSNorm times weight (1 + scale).

    x [B, N, d], in any dtype; `branch` [B, N, d] with its (RMSNorm, gate [B, d]), or none; `norm`: (RMSNorm,
    scale [B, d]), or none. Returns the sum, x itself without a branch, and what is normed, in `dtype`, or
    nothing.
    """
    batch, tokens, width = x.shape
    total = x if branch is None else torch.empty_like(x)
    normed = torch.empty(x.shape if norm else 0, dtype=dtype, device=x.device)
    gate_norm, gates = gate or (None, x)
    next_norm, scales = norm or (None, x)
    kernels.add_and_norm[(batch * tokens,)](
        x,
        x if branch is None else branch.contiguous(),
        x if gate_norm is None else gate_norm.weight,
        gates,
        gates.stride(0),
        total,
        x if next_norm is None else next_norm.weight,
        scales,
        scales.stride(0),
        normed,
        tokens,
        width,
        0.0 if gate_norm is None else gate_norm.eps,
        0.0 if next_norm is None else next_norm.eps,
        ADD=branch is not None,
        NORM=norm is not None,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
    )
    return total, normed


def attend(block: NextDiTBlock, h: Tensor, keys_values: KeysValues, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Self-attention plus gated cross-attention, before their output projection: [B, N, d] -> [B, N, d]."""
    batch, tokens, width = h.shape
    keys, values, null_value = keys_values
    without = 0 if null_value is None else batch // 2  # samples that attend to the null condition, the first
    q, k, v, cross_q = block.project(h, h[without:] if without else h)  # the same one is one product
    own, cross = block.attn1, block.attn2
    heads, groups, size = width // own.head_dim, k.shape[-1] // own.head_dim, own.head_dim
    statistics = torch.empty(batch * tokens, 6, dtype=torch.float32, device=h.device)
    kernels.norm_statistics[(batch * tokens,)](
        q,
        k,
        cross_q,
        q.stride(1),
        k.stride(1),
        cross_q.stride(1),
        statistics,
        without * tokens,
        width,
        k.shape[-1],
        own.norm_q.eps,
        own.norm_k.eps,
        cross.norm_q.eps,
        BLOCK=triton.next_power_of_2(width),
        num_warps=8,
    )
    out = torch.empty_like(h)
    cos, sin = rope  # [N, h / 2] each
    null = values if null_value is None else null_value.contiguous()
    condition_tokens = keys.shape[2]
    kernels.attend[(batch * heads, triton.cdiv(tokens, QUERIES))](
        q,
        k,
        v,
        cross_q,
        q.stride(1),
        k.stride(1),
        v.stride(1),
        cross_q.stride(1),
        statistics,
        own.norm_q.weight,
        own.norm_q.bias,
        own.norm_k.weight,
        own.norm_k.bias,
        cross.norm_q.weight,
        cross.norm_q.bias,
        keys,
        values,
        *keys.stride()[:3],
        *values.stride()[:3],
        null,
        block.gate,
        cos,
        sin,
        out,
        without,
        tokens,
        condition_tokens,
        heads,
        heads // groups,
        size**-0.5,
        HEAD=size,
        WIDE=max(32, triton.next_power_of_2(size)),  # halves of 16 are the least that is multiplied
        QUERIES=QUERIES,
        TOKENS=max(16, triton.next_power_of_2(tokens)),
        CONDITION=max(16, triton.next_power_of_2(condition_tokens)),
        num_warps=4,
    )
    return out


def swiglu(feed_forward: FeedForward, h: Tensor) -> Tensor:
    """silu(linear_1 h) * linear_3 h: [B, N, d] -> [B, N, inner]."""
    (group,) = feed_forward.joint_layers()
    gate, up = joint_product(h, group, any_layout=True)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    inner, block = gate.shape[-1], 1024
    rows = gate.shape[0] * gate.shape[1]
    kernels.swiglu[(rows, triton.cdiv(inner, block))](
        gate, up, out, gate.stride(1), up.stride(1), inner, BLOCK=block, num_warps=4
    )
    return out


def quantized_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """x [m, k], a quantised weight [n, k] and its rows' scales [n] -> [m, n].

    The weight is widened on the chip: memory is read for one byte a number, which takes the time of few rows.
    """
    x = x.contiguous()
    (rows, width), columns = x.shape, len(weight)
    out = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    tile = 64 if columns >= 4096 else 32  # programs for all of a GPU's processors
    kernels.quantized_product[(triton.cdiv(columns, tile), triton.cdiv(rows, QUERIES))](
        x,
        weight,
        scale,
        out,
        rows,
        columns,
        WIDTH=width,
        ROWS=min(QUERIES, max(16, triton.next_power_of_2(rows))),
        COLUMNS=tile,
        DEPTH=128,
        num_warps=4,
        num_stages=4,
    )
    return out
